"""How decode steps are launched: one by one, or as captured CUDA graphs, which cost the host a single call.

A graph replays kernels on addresses. So it is made anew when anything has changed that it holds fixed, and it is not
made at all where a step does what a graph cannot: then steps run eagerly, and `why` says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from faststeer.engine.batch import EngineBatch, windows
from faststeer.engine.sampling import Mode
from faststeer.hf.changes import own_attribute
from faststeer.ops import backend_for

aten = torch.ops.aten

LEAST_WIDTH = 128  # columns that a graph reads at least


class Steps(Protocol):
    """What a run decodes with."""

    @property
    def path(self) -> str:
        """ "graphs" or "eager"."""

    @property
    def why(self) -> str:
        """Why eagerly; "" where graphs are used."""

    def decode(self, n: int, width: int, mode: Mode) -> Tensor:
        """See `EngineBatch.decode`."""

    def look_again(self) -> None:
        """The caller's code has run: weights, hooks and adapters may be others at the next step."""

    def warm_up(self, mode: Mode) -> None:
        """Capture every graph that steps of this mode can need. No row may be live."""


class EagerSteps:
    """Steps one by one."""

    path = "eager"

    def __init__(self, batch: EngineBatch) -> None:
        self.why = f"the model is on {batch.device.type}: CUDA graphs are for NVIDIA GPUs"
        self.decode = batch.decode

    def look_again(self) -> None:
        pass

    def warm_up(self, mode: Mode) -> None:
        pass


class Captures(Protocol):
    """What makes graphs of steps. All graphs share one pool of memory, until `clear`."""

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """Run a step as it will be captured, so that whatever is made at the first call is there."""

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that replays the step, and the tensor in which it leaves the step's result. When it raises, all
        is as it was before."""

    def clear(self) -> None:
        """Let go of the pool: no graph of it is used any more."""


class NotCapturable(RuntimeError):
    """A step does what a graph cannot do."""


class Graphs:
    """Decode steps as graphs, one per (rows, width, mode), captured when first needed.

    Rows and widths are rounded up to powers of two, so that there are few. A graph reads the tables of the batch and of
    the steering's program, so that plans change between replays. Everything else is fixed in the graph: `_constants`
    lists it. The list is compared before the first step of a run and after each time the caller's code has run; a
    difference drops the graphs.

    Before a capture the step runs twice for real, on rows that are put back: once to warm up, once to see that it
    neither reads the device from the host nor changes the model's attributes, which a replay would not. No GPU has run
    this class yet.

    Attributes:
        why: why steps run eagerly, after a capture that failed; until something changes, none is tried again.
    """

    def __init__(self, batch: EngineBatch, captures: Captures | None = None) -> None:
        self.why = ""
        self._batch = batch
        self._captures: Captures = captures or CudaCaptures(batch.device)
        self._graphs: dict[tuple[int, int, Mode], tuple[Callable[[], None], Tensor]] = {}
        self._held: dict[str, Any] = {}
        self._look = True

    @property
    def path(self) -> str:
        return "eager" if self.why else "graphs"

    def look_again(self) -> None:
        self._look = True

    def warm_up(self, mode: Mode) -> None:
        """The largest first: the others fit into the memory that it took."""
        rows, widths = _sizes(1, self._batch.rows), _sizes(LEAST_WIDTH, self._batch.length)
        for n, width in itertools.product(reversed(rows), reversed(widths)):
            self.decode(n, width, mode)
            if self.why:
                break

    def decode(self, n: int, width: int, mode: Mode) -> Tensor:
        batch = self._batch
        if self._look:
            self._renew(self._constants())
            self._look = False
        if not self.why:
            columns = min(max(_power_of_two(width), LEAST_WIDTH), batch.length)
            shape = min(_power_of_two(n), batch.rows), columns, mode
            if shape not in self._graphs:
                self._capture(shape)
        if self.why:
            return batch.decode(n, width, mode)
        replay, chosen = self._graphs[shape]
        replay()
        return chosen[:n]

    def _renew(self, constants: dict[str, Any]) -> None:
        if constants != self._held:
            self._drop()
            self._held, self.why = constants, ""

    def _drop(self) -> None:
        self._graphs.clear()
        self._captures.clear()

    def _capture(self, shape: tuple[int, int, Mode]) -> None:
        """Capture a step, or say in `why` that it cannot be. Nothing has moved on then."""
        batch = self._batch
        tables = (batch.long, batch.int)
        before = [table.clone() for table in tables]

        def step() -> Tensor:
            return batch.decode(*shape)

        def put_back() -> None:
            with torch.inference_mode():
                for table, old in zip(tables, before, strict=True):
                    table.copy_(old)

        try:
            # What goes wrong here goes wrong in an eager step as well: it is not caught.
            self._captures.warm_up(step)
            put_back()
            # The first pass may have made what it keeps: a lazily built table, say.
            self._renew(warm := self._constants())
            try:
                with _NoHostReads(batch.device):
                    step()
                put_back()
                if changed := _differences(warm, self._constants()):
                    raise NotCapturable(f"it changes {changed} of the model, which a replay would not")
                self._graphs[shape] = self._captures.capture(step)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.why = f"a decode step cannot be captured as a CUDA graph: {error}".split("\n")[0]
        except BaseException:
            self._drop()
            raise
        finally:
            put_back()
            if self.why:
                self._drop()
                if batch.steering is not None:
                    batch.steering.clear_projections()

    def _constants(self) -> dict[str, Any]:
        """What a graph holds fixed, by name. Equal ones give equal graphs; objects are held, so that none can be
        taken for another that has its address later."""
        batch, steering = self._batch, self._batch.steering
        return {
            "the steering": None if steering is None else (steering, steering.fingerprint),
            "the probes": (batch.projections.data_ptr(), tuple(batch.probes)),
            "the back end": backend_for(batch.device),
            "the windows": windows(batch.model.config),
            **model_constants(batch.model),
        }


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _sizes(least: int, most: int) -> list[int]:
    """What numbers up to `most` are rounded up to."""
    powers = [1 << i for i in range(most.bit_length()) if least <= 1 << i < most]
    return [*powers, most]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# What of a model is fixed in a graph ----------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What is no part of a step, and made anew each time steering is entered.
_WRAPPED = {
    "generate", "generate_batch", "init_continuous_batching", "__getstate__", "_replicate_for_data_parallel"
}  # fmt: skip
_OTHERS = {*nn.Module().__dict__, *_WRAPPED} - {"training", "_parameters", "_buffers", *_HOOKS}


def model_constants(model: Any) -> dict[str, Any]:
    """Per module: itself; the addresses of its weights; hooks, and a `forward` of its own that is not steering's; every
    other attribute that is a number, a string, a function, a tensor or a collection of such: there adapters keep
    what they are doing."""
    constants: dict[str, Any] = {
        "the attention": getattr(model.config.get_text_config(), "_attn_implementation", None),
        "global hooks": (
            tuple(torch.nn.modules.module._global_forward_hooks.values()),
            tuple(torch.nn.modules.module._global_forward_pre_hooks.values()),
        ),
    }
    for path, module in model.named_modules():
        constants[path or type(module).__name__] = module
        attributes = module.__dict__
        for name in attributes.keys() - _OTHERS:
            value = attributes[name]
            if type(value) is dict and not value:  # most modules have no buffers, and many no weights of their own
                continue
            if name in _HOOKS:
                # Steering's are others each time it is entered, and its fingerprint says what they do: counted alone.
                value = tuple(hasattr(hook, "faststeer_order") or hook for hook in value.values())
            elif name == "forward":
                value = own_attribute(module, name)
                value = None if getattr(value, "__func__", value) is type(module).forward else value
            elif type(value) not in _ATOMS:
                value = _plain(value)
            if value is not None and value != ():
                constants[f"{path}.{name}"] = value
    return constants


_ATOMS = {bool, int, float, str, torch.dtype, torch.device}


def _plain(value: Any) -> Any:
    """A value that can be compared; None for what is neither plain nor made of plain things."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if issubclass(kind, Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    if issubclass(kind, dict):
        return tuple([(key if isinstance(key, str) else repr(key), _plain(item)) for key, item in value.items()])
    if issubclass(kind, (list, tuple)):
        return tuple(map(_plain, value))
    if issubclass(kind, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if issubclass(kind, (bool, int, float, str)) or callable(value):
        return value
    return None


# Capturing ------------------------------------------------------------------------------------------------------------

_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _NoHostReads(TorchDispatchMode):
    """Raises NotCapturable where the host would wait for the device: it asks for a number, for a size that depends on
    numbers, or copies between host and device, as `torch.tensor` and an index by a list do. Of this thread alone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reason := self._reason(func, args, kwargs):
            raise NotCapturable(f"it {reason} ({func})")
        # In inference mode an operator made of others comes whole: `bool` as is_nonzero, of which nothing is said.
        with self:
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _reason(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> str:
        if torch.Tag.data_dependent_output in func.tags:
            return "reads a number of the device on the host"
        if func in _INDEXING:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    return "indexes by a mask"
                if index is not None and index.device.type != args[0].device.type:
                    return f"indexes by a tensor on {index.device.type}"
        elif torch.Tag.dynamic_output_shape in func.tags:
            return "makes a tensor whose size depends on numbers of the device"
        if func is aten.lift_fresh.default and args[0].device.type == self._type:
            return "copies numbers from the host"
        source = target = None
        if func is aten.copy_.default:
            source, target = args[1].device, args[0].device
        elif func is aten._to_copy.default and kwargs.get("device") is not None:
            source, target = args[0].device, torch.device(kwargs["device"])
        if source is not None and target is not None and source.type != target.type:
            return f"copies from {source.type} to {target.type}"
        return ""


class CudaCaptures:
    """`Captures` by torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._pool: Any = None

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """On a stream of its own, as captures have."""
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            step()
        stream.wait_stream(side)

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # A capture marks the generator's state until it ends well: it gets one that can be thrown away. Steps draw
        # their numbers from seeds of their own.
        generator = torch.cuda.default_generators[self._index]
        state = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        graph = torch.cuda.CUDAGraph()
        cause: BaseException | None = None
        try:
            # `graph` leaves its stream current when the end of the capture raises.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                try:
                    chosen = step()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            self._abandon()
            # The end of a capture in which something went wrong raises an error of its own, which says less.
            raise cause or error from None
        finally:
            generator.graphsafe_set_state(state)
        return graph.replay, chosen

    def _abandon(self) -> None:
        """A capture that ends badly goes on sending the allocator to its pool. Refused where it does not."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._index, self._pool)
            torch._C._cuda_releasePool(self._index, self._pool)
        self._pool = None
        torch.cuda.synchronize()

    def clear(self) -> None:
        self._pool = None
