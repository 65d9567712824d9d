"""Where the tokens of a forward pass stand, counted from the end of each row's prompt. Everything is derived on the
device from the pass's own inputs; nothing here waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Prompts:
    """Where the prompts of a batch end.

    A forward pass with an empty cache is a prompt: its attention mask says where each row ends, and the tokens after
    it stand at 0, 1, ... A pass with a filled cache continues it. `set` and a running `generate` know better.
    """

    def __init__(self) -> None:
        # [2, batch or 1]: the column behind the prompt's last token; the column where generated tokens begin, which is
        # further right where the prompt is padded on the right.
        self._ends: Tensor | None = None
        self._fixed = False
        self._generation: Tensor | None = None  # the same, while `generate` runs

    def set(self, columns: int | Sequence[int] | None) -> None:
        """See `Steering.set_prompt`."""
        self._ends, self._fixed = None if columns is None else _both(columns), columns is not None

    def begin_generation(self, arguments: dict[str, Any]) -> Tensor | None:
        """`generate` was called with these arguments: its prompt ends where its input ends, however many passes read
        it. Returns the input, if it is a tensor."""
        given = {**arguments, **arguments.get("kwargs", {})}
        inputs = [given.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        tokens = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        mask = given.get("attention_mask")
        seen = [*tokens, *([mask] if isinstance(mask, Tensor) and mask.ndim == 2 else [])]
        self._generation = _both(max((tensor.shape[1] for tensor in seen), default=1))
        return tokens[0] if tokens else None

    @property
    def generating(self) -> bool:
        return self._generation is not None

    def end_generation(self) -> None:
        """What `set` said holds again; else the cache that `generate` leaves can be continued."""
        if self._generation is not None and not self._fixed:
            self._ends = self._generation
        self._generation = None

    def positions(self, mask: Any, past: Any, batch: int, length: int, device: torch.device) -> Tensor:
        """`[batch, length]` int32 for a pass of this shape over `past` cached tokens (a tensor for a static cache)."""
        ends = self._ends_of(mask, past, batch, length, device)
        column = torch.arange(length, dtype=torch.int32, device=device) + past
        end, begin = ends.unsqueeze(-1)
        return torch.where(column >= begin, column - begin, column - end).to(torch.int32)

    def _ends_of(self, mask: Any, past: Any, batch: int, length: int, device: torch.device) -> Tensor:
        if self._fixed or self._generation is not None:
            return self._known(batch, device)
        begin = torch.full((batch,), length, dtype=torch.int32, device=device)
        end = begin
        if isinstance(mask, Tensor) and mask.ndim == 2:
            columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            end = (columns * (mask != 0)).amax(1).to(device, torch.int32)
        here = torch.stack([end, begin])
        if isinstance(past, Tensor):
            here = torch.where(past.to(device) == 0, here, self._earlier(here, past))
        elif past:
            here = self._earlier(here, past)
        self._ends = here
        return here

    def _known(self, batch: int, device: torch.device) -> Tensor:
        ends: Tensor = self._ends if self._generation is None else self._generation  # type: ignore[assignment]
        ends = ends.to(device)
        if ends.shape[1] not in (1, batch):
            raise ValueError(
                f"the batch has {batch} rows, but set_prompt was given {ends.shape[1]} numbers: give one for all rows "
                "or one per row"
            )
        return ends.expand(2, batch)

    def _earlier(self, like: Tensor, past: Any) -> Tensor:
        """Where the prompt ended that this pass continues; behind the cache, if that prompt was not seen."""
        if self._ends is None or self._ends.shape[1] not in (1, like.shape[1]):
            return (torch.zeros_like(like) + past).to(torch.int32)
        return self._ends.to(like.device).expand_as(like)


def _both(columns: int | Sequence[int]) -> Tensor:
    """`[2, batch or 1]`: a prompt's end and where generated tokens begin, at the same column."""
    return torch.as_tensor(columns, dtype=torch.int32).reshape(1, -1).repeat(2, 1)
