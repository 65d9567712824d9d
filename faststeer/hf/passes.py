"""The forward pass under way, and what acts on it at each site. What holds for a pass is made once, when it begins:
each row's slot, position and sequence. A site is one function over that."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from faststeer.hf.cache import cache_in, caches_in
from faststeer.hf.continuous_batching import PROBED, Managers
from faststeer.hf.fused import Add, RmsNorm
from faststeer.hf.positions import Inputs
from faststeer.hf.probe_log import ProbeLog
from faststeer.hf.row_plans import RowPlans
from faststeer.hf.streams import PACKED, UNCOUNTED, Stream, Streams
from faststeer.ops import Prepared, Tables, add_steer, add_steer_rmsnorm, latch_, takes_prepared
from faststeer.ops import steer as steer_rows
from faststeer.ops.dispatch import plain_choice
from faststeer.plan import site_name
from faststeer.program import Program

OUTSIDE = (
    "a decoder layer was called outside the model's forward pass, which says where each row stands: use "
    "faststeer.hook(...) on single modules; if another thread entered steer(...) while this one ran the model, enter "
    "it in the thread that runs it; if a backward pass runs it again, switch checkpointing on by the model's "
    "gradient_checkpointing_enable() before steer(...) is entered, or checkpoint the whole model"
)

CHANGED = "the model's layers were changed inside steer(...): leave it and enter it again"
INTERRUPTED = (
    "a change of plans was interrupted, so that nobody knows what acts: change them again, by assign(...) or load(...)"
)


class Here:
    """What ops are given on one device in one pass."""

    def __init__(self, program: Program, rows: Tensor, gates: Tensor | None) -> None:
        self.program, self.rows, self.gates = program, rows, gates
        self.by_site = None if program.requires_grad else program.by_site
        # By whether gradients are on: in a reentrant checkpoint's forward pass they are off.
        self._live: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, site: int) -> Tables:
        """The tables at a site; with the present values of what is being trained, read once per pass."""
        if self.by_site is not None:
            return self.by_site[site]
        enabled = torch.is_grad_enabled()
        if enabled not in self._live:
            self._live[enabled] = self.program.live()
        bank, entries, scalars = self._live[enabled]
        return self.program.tables(site)._replace(bank=bank, entries=entries, scalars=scalars)


@dataclass(eq=False)
class Pass:
    """A forward pass: `copies` times `batch` x `length` tokens, of which the last `batch` are the steered ones.

    Attributes:
        kept: the pass's `logits_to_keep`: layers without keys of their own may take the last so many tokens alone.
        logged: whether what probes see is kept.
    """

    plans: RowPlans
    rows: Tensor
    batch: int
    copies: int
    stream: Stream
    sequences: int
    kept: Any
    logged: bool = True

    def __post_init__(self) -> None:
        self.tokens = self.rows.shape[1]
        self._here: dict[torch.device, Here] = {}
        self._last: dict[torch.device, Here] = {}

    def on(self, device: torch.device) -> Here:
        """What ops are given on a device."""
        if device not in self._here:
            program, gates = self.plans.on(device), None
            if program.latching and (program.positioned or not self.stream.why):
                gates = self.stream.decisions(program.capacity.entries, self.sequences, device)
            self._here[device] = Here(program, self.rows.to(device), gates)
        return self._here[device]

    def on_last(self, x: Tensor) -> Here | None:
        """What ops are given for the last `kept` tokens of each row; None if x is something else."""
        columns = self.tokens // (self.copies * self.batch)
        if not isinstance(self.kept, int) or not 0 < self.kept < columns or x.shape[:-1] != (self.batch, self.kept):
            return None
        if x.device not in self._last:
            whole = self.on(x.device)
            rows = whole.rows.unflatten(1, (-1, columns))[:, :, -self.kept :].flatten(1).contiguous()
            self._last[x.device] = Here(whole.program, rows, whole.gates)
        return self._last[x.device]

    def steered(self, probe: Tensor) -> Tensor:
        """`[batch, length, k]` of `[tokens, k]`."""
        return probe.view(self.copies, self.batch, -1, probe.shape[-1])[-1]


@dataclass
class _LastPass:
    """The last pass of a thread, of plans that ask for nothing but its shape, and what else it depends on. The next
    one is the same one if that is as it was, so that a step of decoding derives nothing anew.

    Attributes:
        prepared: what its sites called first, while `choice` chose the back end.
    """

    now: Pass
    version: int
    inference: bool
    shape: torch.Size
    on_gpu: bool
    cache: weakref.ref[Any]
    prepared: Prepared | None = None
    choice: tuple[str | None] | None = None

    def is_repeated_by(self, given: Mapping[str, Any], version: int) -> bool:
        """Whether a pass with these arguments has the same plans, rows and cache."""
        ids = given.get("input_ids")
        return (
            self.version == version
            and ids is not None
            and ids.shape == self.shape
            and cache_in(given) is self.cache() is not None
            and given.get("cu_seq_lens_q") is None
            and given.get("logits_to_keep", 0) is self.now.kept
            and torch.is_inference_mode_enabled() is self.inference
            and not (self.on_gpu and torch.cuda.is_current_stream_capturing())
        )


class _ThreadPasses:
    def __init__(self) -> None:  # a compiler guards against attributes that appear later
        self.now: Pass | None = None
        self.last: _LastPass | None = None
        self.opening: Stream | None = None  # the pass's, where it was given no cache and may make one


class _Threads(threading.local):
    def __init__(self) -> None:  # an object, as a compiled function sets no attribute of this itself
        self.passes = _ThreadPasses()


class Passes:
    """The passes of one steering, each of its own thread.

    Attributes:
        streams: which sequences they go on with.
        managers: of continuous batching, that run passes.
        copies: how often each row stands in a pass below the model's inputs; the last is steered.
        residual_streams: how many each token has, in front of and behind `[batch, tokens]`; all are steered.
        inside: the modules inside layers that are hooked, with where they stand.
        overridden: whether the `forward` of a module that is steered was replaced by somebody else.
        signature: what a compiled or captured graph takes for constant; "" while nothing is attached.
        prepared: what a site may call first, of the device and the thread that were last at one; it serves no others.
    """

    def __init__(
        self,
        plans: RowPlans,
        log: ProbeLog,
        n_layers: int,
        copies: int = 1,
        residual_streams: tuple[int, int] = (1, 1),
    ) -> None:
        self.plans, self.log, self.streams, self.copies = plans, log, Streams(), copies
        self.managers, self.residual_streams = Managers(), residual_streams
        self.signature = ""
        self.inside: list[tuple[Mapping[str, Any], str, Any]] = []
        self.overridden: Callable[[], bool] = lambda: False
        self.prepared: Prepared | None = None
        self._n_layers, self._threads = n_layers, _Threads()
        self._given: tuple[Tensor, Stream, int] | None = None  # with the number of sequences
        self._giver = 0  # the thread that gave them, and alone may use them
        # By site, always the same functions.
        self.steer, self.add = functools.cache(self._steer), functools.cache(self._add)

    @property
    def _thread(self) -> _ThreadPasses:
        return self._threads.passes

    @property
    def now(self) -> Pass | None:
        """The pass under way in this thread."""
        return self._thread.now

    def rows_on(self, device: torch.device) -> Tensor:
        """The rows of the pass under way."""
        return self._now().rows.to(device)

    def _set(self, now: Pass | None) -> None:
        self._thread.now, self.prepared = now, None

    def _now(self) -> Pass:
        now = self._thread.now
        if now is None:
            raise RuntimeError(OUTSIDE)
        return now

    @property
    def derived(self) -> bool:
        """Whether where rows stand is derived from the inputs of a pass."""
        return self._given is None

    def give(self, rows: Tensor | None, n_sequences: int) -> None:
        """`Steering.set_rows`."""
        self._giver = threading.get_ident()
        if rows is None:
            self._given = None
        elif self._given is None or self._given[2] != n_sequences:
            self._given = rows, self.streams.given(), n_sequences
        else:
            self._given = rows, *self._given[1:]

    def forget(self, sequence: int) -> None:
        """`Steering.forget`."""
        if self._given is not None and self._given[1].gates is not None:
            self._given[1].gates[:, sequence] = False

    def close(self) -> None:
        """No pass is seen any more."""
        self._set(None)
        self._thread.opening = self._thread.last = None
        self.signature, self.inside = "", []
        self.streams.close()

    def forget_gates(self, kept: list[bool] | None) -> None:
        """Latched gates are undecided again, but for rows whose plan is kept."""
        self.streams.forget(kept)
        self.managers.forget(kept)

    def begin(self, given: Mapping[str, Any], traced: bool) -> None:
        """A pass reaches the layers: derive each row's slot and position from its inputs, on the device.

        Args:
            traced: by a compiler.
        """
        asked = traced and self._given is None and self.plans.program.positioned
        if asked and not self.streams.is_told_in_graph(cache_in(given)):
            self._begin_untraced(given)
            return
        thread, self.prepared = self._thread, None
        thread.now = thread.opening = None
        version, last = self.plans.version, None if traced else thread.last
        if last is not None:
            if last.is_repeated_by(given, version) and self._given is None and self.streams.only_read(last.cache()):
                thread.now = last.now
                if last.prepared is not None and plain_choice() == last.choice:
                    self.prepared = last.prepared
                return
            thread.last = None
        if self.plans.interrupted:
            raise RuntimeError(INTERRUPTED)
        inputs = Inputs.of(given, traced)
        if self._given is not None:
            rows, stream, sequences = self._given
            elsewhere = not traced and threading.get_ident() != self._giver
            if elsewhere or rows.shape[1] != inputs.batch * inputs.length:
                raise RuntimeError(
                    f"set_rows was given {rows.shape[1]} rows{' in another thread' * elsewhere}, but the forward pass "
                    f"has {inputs.batch} x {inputs.length} tokens; while an Engine generates, nobody else runs its "
                    "model: exhaust or close its iterator first"
                )
            self._start(rows, inputs.batch, stream, sequences)
            return
        if inputs.length > 1 and not traced and self.overridden():  # not in every step of decoding
            raise RuntimeError(CHANGED)
        past, needed = self.streams.past(inputs), self.plans.program.positioned
        if inputs.packed and self._start_requests(given, inputs, needed or self.plans.per_row):
            return
        stream = Stream(None, UNCOUNTED) if past is None else self.streams.of(inputs, past)
        rows = self.plans.rows(inputs, self.streams.run)
        if needed:
            rows = stream.placed(rows, inputs, 0 if past is None else past)
        kept = given.get("logits_to_keep", 0)
        self._start(rows, inputs.batch, stream, inputs.batch, kept)
        if isinstance(past, int):
            stream.columns = past + inputs.length
        if inputs.cache is None:
            thread.opening = None if traced else stream
        elif inputs.ids and not (inputs.packed or inputs.recorded) and self.plans.need_shape_alone(inputs.batch):
            with suppress(TypeError):  # no weak reference to this kind of cache
                how = version, torch.is_inference_mode_enabled(), given["input_ids"].shape, inputs.device.type == "cuda"
                thread.last = _LastPass(self._now(), *how, weakref.ref(inputs.cache))

    @torch.compiler.disable
    def _begin_untraced(self, arguments: Mapping[str, Any]) -> None:
        self.begin(arguments, False)

    def _start_requests(self, given: Mapping[str, Any], inputs: Inputs, told_apart: bool) -> bool:
        """Start a packed pass if its requests must be told apart; False: one plan acts on all tokens."""
        requests = self.managers.of(inputs.cache)
        if requests is not None and self.plans.probing:
            raise ValueError(PROBED)
        if not told_apart:
            return False
        if requests is None:
            raise ValueError(PACKED)
        rows = requests.tokens(inputs, given["cu_seq_lens_q"])
        rows[0] = self.plans.slots(rows[0])
        self._start(rows, inputs.batch, requests, requests.capacity, given.get("logits_to_keep", 0))
        return True

    def _start(self, rows: Tensor, batch: int, stream: Stream, sequences: int, kept: Any = 0) -> None:
        if self.copies > 1:
            other = rows.clone()
            other[0] = -1
            rows = torch.cat([*[other] * (self.copies - 1), rows], 1)
        ahead, behind = self.residual_streams
        if ahead * behind > 1:
            rows = rows.repeat(1, ahead).repeat_interleave(behind, 1)
        self._set(Pass(self.plans, rows, batch, self.copies, stream, sequences, kept))

    def end(self, output: Any) -> None:
        """The pass is over; a cache that it made is its stream's."""
        thread = self._thread
        opening, thread.opening, thread.now, self.prepared = thread.opening, None, None, None
        if opening is not None:
            for cache in caches_in(output):
                self.streams.cached(opening, cache)

    @contextmanager
    def resumed(self, now: Pass) -> Iterator[None]:
        """A part of a pass, which may be over, runs (again)."""
        before = self._thread.now
        self._set(now)
        try:
            yield
        finally:
            self._set(before)

    # Sites

    # These run at every site in every step of decoding, so that they do as little as they can.

    def _steer(self, site: int) -> Callable[[Tensor], Tensor]:
        """The function that steers a tensor at a site."""

        def steer(x: Tensor) -> Tensor:
            prepared = None if is_dynamo_compiling() else self.prepared
            if prepared is not None and (steered := prepared.steer(x, site)) is not None:
                return steered
            return self._steer_wholly(site, x)

        return steer

    def steered_forward(self, site: int, module: nn.Module) -> Callable[..., Any]:
        """A `forward` for a module that steers at a site what its class's returns."""
        steer = self.steer(site)

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = type(module).forward(module, *args, **kwargs)
            x = output if isinstance(output, Tensor) else output[0]
            prepared = None if is_dynamo_compiling() else self.prepared
            if prepared is None or (steered := prepared.steer(x, site)) is None:
                steered = steer(x)
            return steered if x is output else (steered, *output[1:])

        return forward

    def _add(self, site: int) -> Add:
        """The function that adds a branch to the residual stream, steers the sum and makes the next norm of it."""

        def add(branch: Tensor, residual: Tensor, norm: RmsNorm | None) -> tuple[Tensor, Tensor | None]:
            prepared, pair = None if is_dynamo_compiling() else self.prepared, None
            if prepared is not None and norm is not None:
                pair = prepared.add_steer_rmsnorm(branch, residual, *norm, site)
            if pair is not None:
                return pair[::-1]
            return self._add_wholly(site, branch, residual, norm)

        return add

    def _prepare(self, x: Tensor) -> Prepared | None:
        """What the sites on x's device may call from now on; None if they do, or must not."""
        if is_compiling():
            return None
        now, last = self._now(), self._thread.last
        here = now.on(x.device)
        if here.by_site is None or not takes_prepared(x):
            return None
        prepared, before = here.program.prepared(here.rows, here.gates), self.prepared
        self.prepared = prepared
        if last is not None and last.now is now:
            last.prepared, last.choice = prepared, plain_choice()
        return None if prepared is before else prepared

    def _at(self, site: int, x: Tensor) -> tuple[Pass, Here]:
        """The pass under way, and what ops are given at a site."""
        now = self._now()
        here = now.on(x.device)
        if (rows := math.prod(x.shape[:-1])) != now.tokens:
            if (last := now.on_last(x)) is None:
                at, layer = site_name(site, self._n_layers)
                raise RuntimeError(
                    f"{at} of layer {layer} has {rows} rows in a forward pass of {now.tokens} tokens: this model "
                    "cannot be steered there"
                )
            here = last
        return now, here

    def _steer_wholly(self, site: int, x: Tensor) -> Tensor:
        if (prepared := self._prepare(x)) is not None and (steered := prepared.steer(x, site)) is not None:
            return steered
        return self._run(steer_rows, site, x).view_as(x)

    def _add_wholly(
        self, site: int, branch: Tensor, residual: Tensor, norm: RmsNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        if branch.dtype != residual.dtype or branch.device != residual.device:  # under autocast, say
            return self._steer_wholly(site, residual + branch), None
        prepared = self._prepare(branch)
        if norm is None:
            return self._run(add_steer, site, branch, residual).view_as(branch), None
        if prepared is not None and (pair := prepared.add_steer_rmsnorm(branch, residual, *norm, site)) is not None:
            return pair[::-1]
        normed, hidden = self._run(add_steer_rmsnorm, site, branch, residual, *norm)
        return hidden.view_as(branch), normed.view_as(branch)

    def _run(self, op: Callable[..., Any], site: int, x: Tensor, residual: Tensor | None = None, *norm: Any) -> Any:
        """What an op gives of the rows of x at a site, where latched gates decide first and probes are kept."""
        now, here = self._at(site, x)
        program, tables = here.program, here.tables(site)
        flat = (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])
        rest = () if residual is None else (residual.reshape_as(flat),)
        if here.gates is not None and program.latches[site]:
            latch_(flat, tables, here.rows, here.gates, residual=rest[0] if rest else None)
        columns, probe = program.columns[site], None
        if columns:
            probe = flat.new_zeros(flat.shape[0], columns, dtype=torch.float32)
        result = op(flat, *rest, *norm, tables, here.rows, here.gates, probe)
        if probe is not None and now.logged:
            self.log.add(site, now.steered(probe))
        return result
