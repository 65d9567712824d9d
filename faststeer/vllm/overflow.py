"""Which requests of a step have rows that are not finite. Runs in the worker behind each pass, outside what is compiled
or captured; no step waits for it.

One number per row decides: the sum of the absolute values of the row's final hidden states. NaN and infinity stay in
the residual stream from where they arise up to the last layer, so the sum is not finite; a row so large that the final
norm's sum of squares overflows comes out of that norm as zeros, so the sum is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faststeer.vllm.switch import OVERFLOWS_KEY


@dataclass(frozen=True)
class StepSums:
    """The sums of one step's rows on their way to the host.

    Attributes:
        request_ids, counts: whose the rows are, in their order, and how many each has.
        computed: the tokens of each request before the step.
        steered: the requests with a plan.
        sums: `[rows]` fp32, on the host once `ready` says so.
        ready: a CUDA event; None: they are there.
    """

    request_ids: Sequence[str]
    counts: Sequence[int]
    computed: Mapping[str, int]
    steered: Set[str]
    sums: Tensor
    ready: Any

    @classmethod
    @torch.inference_mode()
    def of(
        cls, hidden: Tensor, rows: tuple[Sequence[str], Sequence[int]], computed: Mapping[str, int], steered: Set[str]
    ) -> StepSums:
        """Queue the sums of the final hidden states `[rows or more, hidden]`, and their copy; bad rows become zero.

        Args:
            hidden: the final hidden states.
            rows, computed, steered: see above.
        """
        request_ids, counts = rows
        total = sum(counts)
        sums, ready = torch.linalg.vector_norm(hidden[:total], 1, dim=-1, dtype=torch.float32), None
        # Samplers are not made for NaN; what is drawn for such a row is given to nobody.
        hidden[:total].masked_fill_(~(sums.isfinite() & (sums > 0)).unsqueeze(1), 0)
        if sums.is_cuda:
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            sums, ready = host.copy_(sums, non_blocking=True), torch.cuda.Event()
            ready.record()
        return cls(request_ids, counts, computed, steered, sums, ready)

    def overflows(self) -> dict[str, tuple[int, str]]:
        """The requests that have a bad row: the number of its first such token, and why, a key of `REASONS`."""
        if self.ready is not None:
            self.ready.synchronize()
        sums = self.sums.numpy()
        bad = ~(np.isfinite(sums) & (sums > 0))
        if not bad.any():
            return {}
        starts = np.cumsum([0, *self.counts])
        overflows: dict[str, tuple[int, str]] = {}
        for row in np.flatnonzero(bad)[::-1].tolist():  # backwards, so that a request's first one stays
            number = int(np.searchsorted(starts, row, side="right")) - 1
            name = self.request_ids[number]
            token = self.computed[name] + row - int(starts[number])
            overflows[name] = token, "plan" if name in self.steered else "model"
        return overflows

    def attach(self, output: Any) -> Any:
        """Let a step's output carry the overflows to the scheduler. An asynchronous output gets them when it is
        waited for: the sums were queued before its tokens."""
        if hasattr(output, "get_output"):
            wait = output.get_output
            output.get_output = lambda: self.attach(wait())
        elif output is not None and (overflows := self.overflows()):
            setattr(output, OVERFLOWS_KEY, overflows)
        return output


def final_states(runner: Any, hidden_size: int) -> Tensor | None:
    """The final hidden states of the pass that a model runner has just run and not sampled from yet; None: it has run
    none, or is not the last pipeline stage."""
    state = getattr(runner, "execute_model_state", None)
    hidden = getattr(state, "hidden_states", None)
    if hidden is None and isinstance(state, tuple):
        hidden = next((t for t in state if isinstance(t, Tensor) and t.ndim == 2 and t.shape[1] == hidden_size), None)
    return hidden if isinstance(hidden, Tensor) else None
