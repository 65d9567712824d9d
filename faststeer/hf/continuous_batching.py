"""Continuous batching of transformers (`generate_batch`, `init_continuous_batching`): which request a token belongs to.

A manager runs all its requests in a thread of its own, in passes of one row in which the requests stand one after
another. The pass says where they begin; the manager's batch says which they are.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

from faststeer.hf.positions import Inputs
from faststeer.hf.row_plans import RowPlans
from faststeer.hf.streams import Stream

KEPT = (
    "the model keeps a manager of continuous batching from outside of this context, with cached blocks and graphs of "
    "other plans: call model.destroy_cached_continuous_batching_manager() first"
)
REPLAYED = (
    "one plan per request, positions and latched gates need a look at every pass of continuous batching, and graphs, "
    "compiled passes and asynchronous batching leave none: leave out use_cuda_graph, use_async_batching, "
    "default_compile_level and the compile configurations, or use the Engine"
)
CAPTURED = (
    "graphs of a manager of continuous batching hold the plans' sites: stop the manager before plans are changed, or "
    "enter steer(...) with a plan per request"
)
UNREADABLE = (
    "this version of transformers keeps the requests of a pass elsewhere, so that nobody knows which token belongs to "
    "which: use generate, or the Engine; one plan for all with positions='all' and without latched gates works"
)
PROBED = "projections of continuous batching cannot be told apart by request: read them with generate, or the Engine"
COPIED = (
    "freeze(...) runs each row twice, unsteered and steered, and continuous batching has all requests in one row: use "
    "model.generate(...), or Engine(model, tokenizer, freeze=...), each with a plan per request"
)
LEFT = "steer(...) was left while a manager of continuous batching ran: stop the manager inside"


class RequestStream(Stream):
    """The requests of one manager.

    Attributes:
        manager: a `ContinuousBatchingManager`.
        captured: whether graphs or compiled passes may hold what acted when they were made.
        capacity: sequences for which latched gates have room.
    """

    def __init__(self, manager: Any, captured: bool, check_request: Callable[[int], None]) -> None:
        super().__init__(0)
        self.manager, self.captured, self.capacity = manager, captured, 64
        self._check_request, self._lock = check_request, threading.Lock()
        self._originals = manager.add_request, manager.add_requests
        manager.add_request, manager.add_requests = self.add_request, self.add_requests
        self.restart_numbers()

    def restart_numbers(self) -> None:
        """The next request is the first one."""
        self._added = 0
        # By request: its number and the tokens of its prompt; and, from its first pass on, its column in `gates`, which
        # its return sequences share, as they decide alike.
        self._prompts: dict[str, tuple[int, int]] = {}
        self._sequences: dict[str, int] = {}

    def add_request(self, input_ids: list[int], request_id: str | None = None, *args: Any, **options: Any) -> Any:
        """As the manager's own; the plan of the n-th request is the n-th plan.

        Raises:
            ValueError: there are fewer plans.
        """
        with self._lock:
            self._check_request(self._added)
            name = f"req_{self._added}" if request_id is None else request_id
            self._prompts[name] = self._added, len(input_ids)
            self._sequences.pop(name, None)  # of one of this name that has ended
            self._added += 1
        return self._originals[0](input_ids, name, *args, **options)

    def add_requests(self, inputs: list[list[int]], *args: Any, **options: Any) -> list[Any]:
        """As the manager's own, in the order of the plans."""
        return [self.add_request(input_ids, None, *args, **options) for input_ids in inputs]

    def check_readable(self) -> None:
        """Raise RuntimeError unless the manager says which requests are in a pass."""
        if self.manager.batch_processor is None:
            self.manager.warmup()
        self._batch()

    def _batch(self) -> list[tuple[str, int]]:
        """The requests of the pass under way and the number of their tokens in it, in their order in the row."""
        try:
            batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
            return [(_request(each.state.request_id), each.query_length) for each in batch]
        except AttributeError as error:
            raise RuntimeError(UNREADABLE) from error

    def tokens(self, inputs: Inputs, boundaries: Tensor) -> Tensor:
        """`[3, tokens]` int32 of a pass: each token's request, by its number, its position and its sequence. The
        requests begin and end in the row at `boundaries` (`cu_seq_lens_q`)."""
        if inputs.recorded:
            raise ValueError(REPLAYED)
        names, lengths = zip(*self._batch(), strict=True)
        if [0, *accumulate(lengths)] != boundaries.tolist() or not self._prompts.keys() >= set(names):
            raise RuntimeError(UNREADABLE)
        with self._lock:
            self._drop_ended(names)
            numbers, prompts = zip(*[self._prompts[name] for name in names], strict=True)
            self._check_request(max(numbers))
            for name in set(names) - self._sequences.keys():
                self._sequences[name] = min(set(range(len(self._sequences) + 1)) - set(self._sequences.values()))
            sequences = [self._sequences[name] for name in names]
        while self.capacity < len(self._sequences):
            self.capacity *= 2
        requests = torch.tensor([numbers, prompts, sequences], dtype=torch.int32, device=inputs.device)
        tokens = requests.repeat_interleave(torch.tensor(lengths, device=inputs.device), 1, output_size=inputs.length)
        tokens[1] = inputs.position_ids.reshape(-1) - tokens[1]
        return tokens

    def _drop_ended(self, batch: Sequence[str]) -> None:
        """Forget requests that were in a pass and that the manager, in whose thread this runs, no longer has."""
        try:
            scheduler = self.manager.batch_processor.scheduler
            live = {*batch, *map(_request, [*scheduler.active_requests, *scheduler.waiting_requests])}
        except AttributeError:  # a version that keeps them elsewhere: they stay
            return
        for name in self._sequences.keys() - live:
            del self._sequences[name], self._prompts[name]

    def decisions(self, entries: int, batch: int, device: torch.device) -> Tensor:
        """`[entries, batch]`, what latched gates have decided; `batch` is `capacity`."""
        if self.gates is not None and self.gates.shape[1] < batch:
            with torch.inference_mode(False):
                self.gates = torch.nn.functional.pad(self.gates, (0, batch - self.gates.shape[1]))
        return super().decisions(entries, batch, device)

    def forget(self, kept: list[bool] | None) -> None:
        """Latched gates are undecided again, but for requests whose plan is kept."""
        if self.gates is None:
            return
        stays = [False] * self.gates.shape[1]
        if kept is not None:
            with self._lock:
                for name, sequence in self._sequences.items():
                    stays[sequence] = kept[0] if len(kept) == 1 else kept[self._prompts[name][0]]
        self.gates &= torch.tensor(stays, device=self.gates.device)

    def stop(self) -> None:
        """End the manager: its requests fail, and nothing of it is used again."""
        if self.manager.is_running():
            self.manager.stop(hard_stop=True)
        model = self.manager.model
        if getattr(model, "_cached_continuous_batching_manager", None) is self.manager:
            model.destroy_cached_continuous_batching_manager()
        self.manager.add_request, self.manager.add_requests = self._originals


def _request(name: str) -> str:
    """The request that a return sequence is of."""
    return name.partition("__child#")[0]


class Managers:
    """The managers that were made inside of one context, for as long as somebody has them."""

    def __init__(self) -> None:
        self._streams: tuple[weakref.ref[RequestStream], ...] = ()

    def streams(self) -> list[RequestStream]:
        """Of the managers."""
        return [stream for each in self._streams if (stream := each()) is not None]

    def of(self, cache: Any) -> RequestStream | None:
        """The requests of the manager that runs passes with this cache."""
        streams = self.streams()
        return next((s for s in streams if getattr(s.manager.batch_processor, "cache", None) is cache), None)

    def manage(self, model: Any, original: Callable[..., Any], arguments: dict[str, Any], plans: RowPlans) -> Any:
        """`model.init_continuous_batching(**arguments)`, which is `original`, for passes under these plans.

        Raises:
            ValueError: tokens cannot be told apart as the plans need, or not as the caller's configuration is.
            RuntimeError: the model keeps a manager from outside of the context, or transformers is too new.
        """
        arguments.pop("self")
        if plans.probing:
            raise ValueError(PROBED)
        read = plans.per_row or plans.program.positioned
        config, captured = configuration(model, arguments, read)
        cached = getattr(model, "_cached_continuous_batching_manager", None)
        stream = next((stream for stream in self.streams() if stream.manager is cached), None)
        if cached is not None and stream is None:
            raise RuntimeError(KEPT)
        manager = original(**{**arguments, "continuous_batching_config": config})
        if stream is None:
            stream = RequestStream(manager, captured, plans.check_request)
            self._streams = *(each for each in self._streams if each() is not None), weakref.ref(stream)
        else:
            stream.restart_numbers()
        if read:
            stream.check_readable()
        return manager

    def check_changeable(self) -> None:
        """Raise RuntimeError if plans cannot be changed, since graphs may hold what acts."""
        managers = [stream.manager for stream in self.streams() if stream.captured]
        if any(manager.is_running() or manager.batch_processor is not None for manager in managers):
            raise RuntimeError(CAPTURED)

    def forget(self, kept: list[bool] | None) -> None:
        """Latched gates are undecided again, but for requests whose plan is kept."""
        for stream in self.streams():
            stream.forget(kept)

    def stop(self) -> None:
        """End them all: the context is left."""
        for stream in self.streams():
            stream.stop()


def configuration(model: Any, arguments: Mapping[str, Any], read: bool) -> tuple[ContinuousBatchingConfig, bool]:
    """How a manager is to run, by the arguments of `init_continuous_batching`, and whether passes are compiled or made
    graphs of. Requests share no blocks, since one may have another plan than the one that filled them.

    Raises:
        ValueError: every pass is looked at (`read`), and the caller's configuration asks for some that cannot be.
    """
    generation = arguments.get("generation_config") or model.generation_config
    config = arguments.get("continuous_batching_config") or getattr(generation, "continuous_batching_config", None)
    config = ContinuousBatchingConfig() if config is None else copy.copy(config)
    config.allow_block_sharing = False
    compiles = (
        config.varlen_compile_config is not None
        or config.decode_compile_config is not None
        or config.default_compile_level > 0
        or getattr(model.config.get_text_config(), "compile_config", None) is not None
    )
    if not read:
        return config, compiles or model.device.type != "cpu"
    if compiles or config.use_cuda_graph not in (None, False, (False, False)) or config.use_async_batching:
        raise ValueError(REPLAYED)
    config.use_cuda_graph, config.use_async_batching = (False, False), False
    return config, False
