"""What a steering puts on a model while it is entered: wrappers around its passes and `generate`, and who may
have entered or may run the model."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from threading import get_ident
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from faststeer.hf.cache import cache_in
from faststeer.hf.changes import Changes, changing
from faststeer.hf.continuous_batching import COPIED, LEFT
from faststeer.hf.hook_points import HookPoints
from faststeer.hf.known import by_name, parameters
from faststeer.hf.passes import CHANGED, Passes
from faststeer.hf.streams import Streams, bind

INSTEAD = (
    "give one batch a plan per row, steer(model, [plan, other]), or give the requests to one faststeer.Engine; or let "
    "the threads take turns"
)

ENDED = (
    "steer(...) was left while this generate ran, in another thread, say, so that the end of its answer is not "
    "steered: wait for it inside of the with block (thread.join())"
)

_entered: weakref.WeakKeyDictionary[nn.Module, list[EnteredContext]] = (
    weakref.WeakKeyDictionary()
)  # by owner of the layers
_here: contextvars.ContextVar[tuple[EnteredContext, ...]] = contextvars.ContextVar("faststeer", default=())


class EnteredContext:
    """A steering that is entered: by whom, and who was there before.

    Attributes:
        others: the threads that were there before, by their identifiers; they may not run the model.
        alone: what to say of another steering beside it; "" if there may be one.
    """

    def __init__(self, alone: str) -> None:
        self.alone = alone
        thread = threading.current_thread()
        self.thread, self._ident = thread.name, thread.ident
        # A thread that is started inside may get the identifier of one that has ended: its object tells them apart.
        self._before = weakref.WeakSet(threading.enumerate()) - {thread}
        self.others = {each.ident for each in self._before}
        self._tasks: Collection[asyncio.Task[Any]] = _other_tasks() or ()

    def may_be_other(self) -> bool:
        """Whether `check` may raise: what a pass asks first."""
        return get_ident() in self.others or bool(self._tasks)

    def check(self) -> None:
        """Raise RuntimeError in a thread or task that was there before, and did not enter the steering."""
        if self._tasks and get_ident() == self._ident and _task() in self._tasks:
            raise RuntimeError(
                "the model is steered by another task of this thread, and this one was there before: a plan acts for "
                f"the task that enters steer(...) and for those that are created inside; {INSTEAD}"
            )
        if get_ident() in self.others and threading.current_thread() in self._before:
            here = threading.current_thread().name
            raise RuntimeError(
                f"the model is steered by the thread {self.thread!r}, and the thread {here!r} runs it, which was there "
                "before: a plan acts for the thread that enters steer(...) and for those that "
                f"it starts inside; enter steer(...) in the thread that runs the model, or {INSTEAD}"
            )


def _task() -> asyncio.Task[Any] | None:
    """The asyncio task that runs; None outside of one."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _other_tasks() -> weakref.WeakSet[asyncio.Task[Any]]:
    """The tasks of this thread's loop but the one that runs."""
    task = _task()
    return weakref.WeakSet() if task is None else weakref.WeakSet(asyncio.all_tasks()) - {task}


def is_steered(model: nn.Module) -> bool:
    """Whether the model is inside `with steer(...)`."""
    return any(_entered.get(module) for module in model.modules())


def register(changes: Changes, owner: nn.Module, alone: str) -> EnteredContext:
    """Note that a steering is entered.

    Raises:
        RuntimeError: another thread, or another task, has entered one and not left it; one of several must be alone.
    """
    entry = EnteredContext(alone)
    changes.on_undo(_leave, owner, entry)
    entries = _entered.setdefault(owner, [])
    entries.append(entry)
    earlier = entries[: entries.index(entry)]
    if not set(earlier) <= set(_here.get()):
        raise RuntimeError(
            f"the model is steered already, by the thread {earlier[0].thread!r} or another task: two contexts at once "
            f"would both act on both; {INSTEAD}"
        )
    if refusals := [each.alone for each in (*earlier, entry) if earlier and each.alone]:
        raise RuntimeError(refusals[0])
    _here.set((*earlier, entry))
    return entry


def _leave(owner: nn.Module, entry: EnteredContext) -> None:
    entries = _entered.get(owner, [])
    if entry in entries:
        entries.remove(entry)


def watch_passes(
    changes: Changes,
    model: nn.Module,
    points: HookPoints,
    passes: Passes,
    entry: EnteredContext,
    ours: Callable[..., Any],
) -> None:
    """Begin and end passes as the owner of the layers is called. `ours` marks a function as the context's."""
    owner, (_, _, name) = points.owner(model), points.layers.rpartition(".")
    names, run = parameters(type(owner).forward), owner.forward

    before = list(owner._modules[name]._modules.values())  # type: ignore[union-attr]
    passes.overridden = changes.overridden

    # In every step of decoding, so that it calls as little as it can.
    def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not changes.live:  # leaving was interrupted more than once: this would have been the last to go
            if passes.managers.of(cache_in(kwargs)) is not None:
                raise RuntimeError(LEFT)
            changes.undo()
            return
        if not passes.signature:
            # Read, so that a compiled graph is made anew when it changes: torch.compile does not look whether a module
            # that had no hooks has some now.
            return
        if not (traced := is_compiling()):
            stack = owner._modules[name]
            swapped = passes.inside and any(parts.get(part) is not module for parts, part, module in passes.inside)
            if swapped or stack is None or list(stack._modules.values()) != before:
                raise RuntimeError(CHANGED)
            if entry.may_be_other() and passes.derived:
                entry.check()
        passes.begin(by_name(names, args, kwargs), traced)

    # No hooks: each costs the host some microseconds in a step, whatever it does.
    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        begin(args, kwargs)
        output = run(*args, **kwargs)
        passes.end(output)
        return output

    changes.replace(owner, "forward", ours(forward))
    changes.replace(owner, "_replicate_for_data_parallel", _refuse_replicas)
    path = points.layers.split(".")[:-1]
    for depth, part in enumerate(path):
        module = model.get_submodule(".".join(path[:depth]))
        noted = _noted(module, part, owner, depth, passes.streams)
        changes.replace(module, "forward", ours(noted))


def _refuse_replicas() -> None:
    raise RuntimeError(
        "the model is steered, and replicas (DataParallel) cannot be: run it on one device, or load it with a "
        "device_map"
    )


def _noted(module: nn.Module, part: str, owner: nn.Module, depth: int, streams: Streams) -> Callable[..., Any]:
    """The `forward` of a module around the layers, which says what it is called with. `part`: the next one inwards."""
    names, run, inner = parameters(type(module).forward), module.forward, module._modules[part]

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return run(*args, **kwargs)
        if module._modules.get(part) is not inner and owner not in module.modules():
            raise RuntimeError(CHANGED)
        around = streams.around
        try:
            around[depth:] = [(names, args, kwargs)]
            return run(*args, **kwargs)
        finally:
            del around[depth:]

    return forward


def watch_generate(
    changes: Changes,
    model: nn.Module,
    passes: Passes,
    entry: EnteredContext,
    check: Callable[[Any, Mapping[str, Any]], None],
) -> None:
    """Wrap what every module has of `generate`, `generate_batch` and `init_continuous_batching`.
    `check(module, arguments)` may refuse a `generate`."""

    def generate(module: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        entry.check()
        arguments, streams = bind(type(module).generate, (module, *args), kwargs), passes.streams
        check(module, arguments)
        with changing() as generation:
            run = streams.run_of(module)
            generation.on_undo(streams.end, run, module)
            streams.generate(run, module, arguments)
            if run.batch is not None:
                passes.plans.check_batch(run.batch)
            answer = own(*args, **kwargs)
        if not changes.live:
            raise RuntimeError(ENDED)
        return answer

    def generate_batch(_module: Any, own: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        entry.check()
        passes.plans.check_batch(len(inputs))
        return own(inputs, *args, **kwargs)

    def init_continuous_batching(module: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if passes.copies > 1:
            raise ValueError(COPIED)
        arguments = bind(type(module).init_continuous_batching, (module, *args), kwargs)
        return passes.managers.manage(module, own, arguments, passes.plans)

    for module in list(model.modules()):
        for within in (generate, generate_batch, init_continuous_batching):
            if hasattr(type(module), within.__name__):
                changes.replace(module, within.__name__, _while_live(changes, module, within))


def _while_live(changes: Changes, module: nn.Module, within: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module by `within(module, own method, ...)`, until the changes are undone."""
    own = getattr(module, within.__name__)

    @functools.wraps(own)
    def method(*args: Any, **kwargs: Any) -> Any:
        return within(module, own, *args, **kwargs) if changes.live else own(*args, **kwargs)

    return method
