"""Which sequences a forward pass goes on with, and where their prompts end.

A stream is the set of sequences behind one cache. A pass with a new or empty cache opens one, a pass with a known cache
goes on with it, a pass without a cache is one of its own; a running `generate` has its own, whatever passes it makes.
What cannot be known is an error where a plan asks for it; nothing is assumed.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from faststeer.hf.cache import length_of
from faststeer.hf.known import by_name
from faststeer.hf.positions import SAY, Inputs, Mask, Prompts, for_rows, mask_of
from faststeer.vector import whole_number

UNSEEN = f"the cache was filled outside of this context, or copied, so that nobody knows where its prompt ends: {SAY}"
CROPPED = f"the cache was cropped into its prompt, so that nobody knows where the one that is read now ends: {SAY}"
UNCOUNTED = (
    "the model's recurrent state was made outside of this context and does not say how many tokens it has read: read "
    "the prompt inside, or use positions='all'"
)
UNDECIDED = (
    "the cache was filled outside of this context, so that nobody knows what latched gates say of its prompt: read the "
    "prompt inside"
)
TURNS = (
    "passes without a cache, in turn, inside one generate cannot be told apart: generate with use_cache=True, or leave "
    "out what makes the other passes (guidance_scale)"
)
AHEAD = (
    "generate reads its prompt in pieces or with guesses behind it, as embeddings whose number differs from that of "
    "its tokens, so that nobody knows where it ends: switch prefill_chunk_size, assisted and prompt-lookup decoding off"
)
PIECES = "generate reads a prompt with padding in pieces: give it the attention_mask of the whole prompt"
PACKED = (
    "a packed pass (sequences one after another in a row) does not say where their prompts end: it takes one plan for "
    "all, with positions='all' and without latched gates; give each sequence a row of its own, or use generate_batch"
)
# What makes `generate` read less or more than its prompt in its first pass.
PIECEWISE = (
    "prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"
)  # fmt: skip


class Stream(Prompts):
    """Sequences: where their prompts end, and what their latched gates have decided.

    Attributes:
        gates: `[entries, batch]`, once a plan has latched gates.
        columns: that were read, where the cache does not count them.
    """

    def __init__(self, begin: int | Tensor | None, why: str = "", mask: Mask | None = None) -> None:
        super().__init__(begin, why, mask)
        self.gates: Tensor | None = None
        self.columns = 0

    def decisions(self, entries: int, batch: int, device: torch.device) -> Tensor:
        """`gates`, for this many rows."""
        if self.why:
            raise ValueError(self.why)
        if self.gates is None:
            # Not in inference mode: a later pass may be outside of it.
            with nullcontext() if is_compiling() else torch.inference_mode(False):
                self.gates = torch.zeros(entries, batch, dtype=torch.bool, device=device)
        elif self.gates.shape[1] != batch or self.gates.device != device:
            self.gates = for_rows(self.gates, batch).to(device)
        return self.gates

    def restart(self, past: Tensor, other: Stream) -> None:
        """Become another stream if nothing is cached; decided on the device."""
        fresh = past == 0
        pairs = [
            [torch.as_tensor(each, device=past.device) for each in (stream.begin, stream.ends()) if each is not None]
            for stream in (other, self)
        ]
        self._ends = torch.where(fresh, pairs[0][-1], pairs[1][-1])
        self.begin = torch.where(fresh, pairs[0][0], pairs[1][0])
        if self.gates is not None:
            self.gates &= ~fresh


@dataclass(eq=False)
class GenerateCall:
    """A `generate` that is running in this thread.

    Attributes:
        total: columns of its prompt, as far as its arguments show them; None: they do not.
        kind: what its prompt was given as, "input_ids" or "inputs_embeds".
        piecewise: whether its first pass may read less or more than the prompt.
        continues: whether it was given a cache.
        batch: rows of its prompt, before they are repeated.
    """

    modules: list[nn.Module] = field(default_factory=list)
    total: int | None = None
    kind: str = "input_ids"
    piecewise: bool = False
    continues: bool = False
    batch: int | None = None
    mask: Tensor | None = None
    stream: Stream | None = None
    cache: Any = None
    width: int = 0  # of the last pass without a cache

    def read(self, module: Any, arguments: Mapping[str, Any]) -> None:
        """Take from the arguments of a `generate` what they show: the outermost mask, the innermost tokens."""
        mask = arguments.get("attention_mask")
        if self.mask is None and isinstance(mask, Tensor) and mask.ndim == 2:
            self.mask = mask
        config = arguments.get("generation_config") or getattr(module, "generation_config", None)
        settings = [arguments.get(name) or getattr(config, name, None) for name in PIECEWISE]
        self.piecewise |= any(each is not None and each is not False for each in settings)
        tokens = {n: arguments.get(n) for n in ("inputs_embeds", "input_ids", "inputs")}
        for name, each in tokens.items():
            if isinstance(each, Tensor) and each.ndim >= 2:
                self.kind = "inputs_embeds" if name == "inputs_embeds" or each.is_floating_point() else "input_ids"
                self.batch, self.total = each.shape[:2]
                break
        self.continues |= any(arguments.get(name) is not None for name in ("cache", "past_key_values"))
        if self.continues and self.total is not None and self.mask is not None:
            self.total = max(self.total, self.mask.shape[1])  # the new tokens alone may be given


# What the modules around the layers are called with, from the outermost inwards: names of parameters, args, kwargs.
Around = list[tuple[tuple[str, ...], tuple[Any, ...], dict[str, Any]]]


def _outermost_mask(around: Around) -> Tensor | None:
    masks = (by_name(*call).get("attention_mask") for call in around)
    return next((mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2), None)


def _width_of(around: Around, kind: str) -> int | None:
    """Columns of `input_ids` or `inputs_embeds`: the innermost."""
    tokens = (by_name(*call).get(kind) for call in reversed(around))
    return next((each.shape[1] for each in tokens if isinstance(each, Tensor) and each.ndim >= 2), None)


class _ThreadCalls(threading.local):
    def __init__(self) -> None:
        self.runs: list[GenerateCall] = []
        self.around: Around = []


class Streams:
    """The streams of one steering."""

    def __init__(self) -> None:
        self._by_cache: weakref.WeakKeyDictionary[Any, Stream] = weakref.WeakKeyDictionary()
        self._all: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._thread = _ThreadCalls()
        self._set_stream: Stream | None = None

    def set(self, columns: int | Sequence[int] | None) -> None:
        """See `Steering.set_prompt`."""
        begin = None if columns is None else _checked_columns(columns)
        self._by_cache.clear()
        self._set_stream = None if begin is None else self._keep(None, Stream(begin))

    def given(self) -> Stream:
        """One for rows whose positions are given."""
        return self._keep(None, Stream(0))

    def close(self) -> None:
        """Forget all: later passes are not seen."""
        self._by_cache.clear()
        self._thread = _ThreadCalls()

    @property
    def run(self) -> GenerateCall | None:
        """The `generate` that runs in this thread."""
        return self._thread.runs[-1] if self._thread.runs else None

    # What `generate` and the modules around the layers are called with

    def run_of(self, module: nn.Module) -> GenerateCall:
        """The run that a module's `generate` belongs to: one of a wrapper goes on in that of what it wraps."""
        run = self.run
        return GenerateCall() if run is None or module in run.modules else run

    def generate(self, run: GenerateCall, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """A module's `generate` begins."""
        run.modules.append(module)
        run.read(module, arguments)
        if run not in self._thread.runs:
            self._thread.runs, self._thread.around = [*self._thread.runs, run], []

    def end(self, run: GenerateCall, module: nn.Module) -> None:
        """A module's `generate` has ended."""
        if run.modules[:1] == [module]:
            self._thread.runs = [each for each in self._thread.runs if each is not run]

    @property
    def around(self) -> Around:
        """The calls of modules around the layers that are under way in this thread."""
        return self._thread.around

    # Passes

    def past(self, inputs: Inputs) -> int | Tensor | None:
        """Tokens that the cache of a pass holds; None: nobody has counted them."""
        if (past := inputs.past()) is not None:
            return past
        stream, run = self._behind(inputs.cache), self.run
        if stream is None and run is not None and run.cache is inputs.cache:
            stream = run.stream
        return None if stream is None else stream.columns

    def of(self, inputs: Inputs, past: int | Tensor) -> Stream:
        """The stream of a pass that reaches the layers."""
        run = self.run
        if inputs.packed:
            return Stream(None, PACKED)
        if inputs.traced:
            own = None if run is None else run.stream
            return own or self._set_stream or _fresh(inputs, past, None)
        around = self._thread.around
        of_cache = None if inputs.cache is None else self._behind(inputs.cache)
        if run is None and self._set_stream is not None:
            return self._of_set(self._set_stream, inputs, past, of_cache)
        if run is not None and (stream := self._of_run(run, inputs, past, around)) is not None:
            return stream
        if isinstance(past, Tensor) and of_cache is not None:
            of_cache.restart(past, _fresh(inputs, past, _outermost_mask(around)))
            return of_cache
        if isinstance(past, Tensor) or past == 0:
            return self._keep(inputs.cache, _fresh(inputs, past, _outermost_mask(around)))
        if of_cache is None:
            return Stream(None, UNSEEN)
        begin = of_cache.begin
        return Stream(None, CROPPED) if isinstance(begin, int) and isinstance(past, int) and past < begin else of_cache

    def is_told_in_graph(self, cache: Any) -> bool:
        """Whether a compiler may trace what `of` does for a pass with this cache. Later passes of the graph may belong
        to other streams, except those of a generation with a static cache."""
        run = self.run
        if run is None:
            return self._set_stream is not None or cache is None
        return run.stream is not None and getattr(cache, "is_compileable", False)

    def only_read(self, cache: Any) -> bool:
        """Whether a pass with this cache, as the pass before had it, only goes on with what is cached: no prompt is
        set, no `generate` begins."""
        run = self.run
        if self._set_stream is not None or (run is not None and run.stream is None):
            return False
        past = length_of(cache)
        return isinstance(past, int) and past > 0

    @torch.compiler.disable
    def cached(self, stream: Stream, cache: Any) -> None:
        """The pass of a stream has made this cache."""
        run = self.run
        if run is not None and run.stream is stream and run.cache is None:
            run.cache = cache
        self._keep(cache, stream)

    def _behind(self, cache: Any) -> Stream | None:
        try:
            return self._by_cache.get(cache)
        except TypeError:  # a tuple, say: never kept
            return None

    def _keep(self, cache: Any, stream: Stream) -> Stream:
        self._all.add(stream)
        if cache is not None:
            with suppress(TypeError):
                self._by_cache[cache] = stream
        return stream

    def _of_set(self, set_stream: Stream, inputs: Inputs, past: int | Tensor, of_cache: Stream | None) -> Stream:
        if inputs.cache is None:
            return set_stream
        if of_cache is None or of_cache.begin is not set_stream.begin:
            gates = None if of_cache is None else of_cache.gates
            unseen = of_cache is None and bool(torch.as_tensor(past >= set_stream.begin).any())  # type: ignore[operator]
            of_cache = self._keep(inputs.cache, Stream(set_stream.begin, UNDECIDED if unseen else ""))
            of_cache.gates = gates
        return of_cache

    def _of_run(self, run: GenerateCall, inputs: Inputs, past: int | Tensor, around: Around) -> Stream | None:
        """The run's own stream, if the pass is one of it; None: it has another cache."""
        if run.stream is None:
            run.stream, run.cache, run.width = _first(run, inputs, int(past), around), inputs.cache, inputs.length
            return self._keep(inputs.cache, run.stream)
        if inputs.cache is not None or run.cache is not None:
            return run.stream if inputs.cache is run.cache else None
        if inputs.length <= run.width:
            return Stream(None, TURNS)
        run.width = inputs.length
        return run.stream

    # Gates

    def forget(self, same_plan: Sequence[bool] | None) -> None:
        """Latched gates are undecided again, but for rows that keep their plan (each as many as it has become)."""
        for stream in list(self._all):
            gates = stream.gates
            if gates is None:
                continue
            if same_plan is None or gates.shape[1] % len(same_plan):
                gates.zero_()
            else:
                rows = torch.tensor(same_plan, device=gates.device)
                gates &= rows.repeat_interleave(gates.shape[1] // len(same_plan))


def _checked_columns(columns: Any) -> int | Tensor:
    """A number of columns, or `[rows]` int32, as `set_prompt` was given it."""
    one = whole_number(columns)
    several = one is None and isinstance(columns, Iterable) and getattr(columns, "ndim", 1) == 1
    numbers = [whole_number(each) for each in columns] if several else [one]
    if not numbers or any(number is None or number < 0 for number in numbers):
        raise ValueError(
            f"set_prompt was given {columns!r}: expected a whole number of columns from 0 on, or one per row"
        )
    return torch.tensor(numbers, dtype=torch.int32) if several else numbers[0]  # type: ignore[return-value]


def _fresh(inputs: Inputs, past: int | Tensor, mask: Tensor | None) -> Stream:
    """A stream whose prompt ends with this pass."""
    ids = inputs.position_ids
    readable = not inputs.traced and inputs.mask is None and isinstance(ids, Tensor) and ids.ndim == 2
    if readable and bool((ids.diff(dim=1) < 0).any()):
        return Stream(None, PACKED)
    return _stream(past + inputs.length, _of_one_sequence(inputs, mask_of(inputs, past, mask)))


def _of_one_sequence(inputs: Inputs, mask: Mask | str | None) -> Mask | str | None:
    """The mask; PACKED for one of four dimensions, which may keep sequences apart, where position ids begin anew
    between two real tokens. Beside one of two dimensions transformers takes a row for one sequence all the same."""
    ids = inputs.position_ids
    if inputs.traced or not isinstance(mask, Mask) or mask.edge is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return mask
    real = mask.real != 0
    return PACKED if bool(((ids.diff(dim=1) < 0) & real[:, 1:] & real[:, :-1]).any()) else mask


def _stream(begin: int | Tensor, mask: Mask | str | None) -> Stream:
    return Stream(None, mask) if isinstance(mask, str) else Stream(begin, mask=mask)


def _first(run: GenerateCall, inputs: Inputs, past: int, around: Around) -> Stream:
    """The first pass of a `generate`: it reads its prompt, or a piece of it, or that and guesses behind it."""
    width = _width_of(around, run.kind)
    if width is None and inputs.ids and run.kind == "input_ids":
        width = inputs.length
    rest = 0  # columns of the prompt behind this pass
    if run.total is not None and width is not None:
        rest = run.total - (past if run.continues else 0) - width
    elif run.piecewise:
        return Stream(None, AHEAD)
    begin, mask = past + inputs.length + rest, mask_of(inputs, past, _outermost_mask(around))
    if run.mask is not None:
        mask = Mask(run.mask, None)
    elif rest > 0 and mask is not None:
        return Stream(None, PIECES)
    if not getattr(inputs.cache, "is_compileable", False):
        return _stream(begin, mask)
    # For compiled passes to come, whose graph serves prompts of any length.
    stream = _stream(torch.tensor([begin], dtype=torch.int32, device=inputs.device), mask)
    stream.ends()
    return stream


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that go into a var-keyword included."""
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
    except TypeError:  # the function itself says what is wrong
        return dict(kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
