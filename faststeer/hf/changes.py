"""Changes to a model, undone whatever interrupts them: an error, Ctrl-C, a signal handler that raises. A copy of the
model, and a pickle of it, has none of them.

Three rules hold at every bytecode. The undo of a change is registered before the change is made. Undos are idempotent,
and undoing what was not done does nothing. And leaving is one call into C, which closes a generator that has stood
inside its `try` since before the first change: a `__exit__` written in Python can be interrupted before its first line.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import io
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from torch import nn

T = TypeVar("T")

_ABSENT = object()
_half_undone: set[Changes] = set()
_unfinished: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


class Changes:
    """What a context has changed.

    Attributes:
        live: False from the first undo on.
    """

    def __init__(self) -> None:
        self.live = True
        self._undos: list[Callable[[], object]] = []
        self._forwards: list[nn.Module] = []

    def on_undo(self, undo: Callable[..., object], *args: Any) -> None:
        """Call `undo(*args)` when the context is left, the last registered first. It must be idempotent: it is called
        anew if it was interrupted."""
        self._undos.append(functools.partial(undo, *args))

    def replace(self, owner: object, name: str, value: object) -> None:
        """Set an attribute in an object's `__dict__`. Contexts that replaced the same one may end in any order."""
        replaced = _Replaced(name, value, vars(owner).get(name, _ABSENT))
        self.on_undo(_put_back, owner, replaced)
        if isinstance(owner, nn.Module):
            _note(owner, replaced)
            if name == "forward":
                self._forwards.append(owner)
        vars(owner)[name] = value

    def overridden(self) -> bool:
        """Whether a module whose `forward` was replaced has got yet another one, which is no context's and does not
        wrap one as `functools.wraps` does."""
        for module in self._forwards:
            ours = [change.value for change in _changed.get(module, []) if isinstance(change, _Replaced)]
            forward = vars(module).get("forward")
            while not any(forward is each for each in ours):
                if (forward := getattr(forward, "__wrapped__", None)) is None:
                    return True
        return False

    def hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: bool) -> None:
        """Register a forward hook: `register` is a module's `register_forward_hook` or `register_forward_pre_hook`."""
        module: nn.Module = register.__self__  # type: ignore[attr-defined]
        self.on_undo(_unhook, module, hook)
        _note(module, hook)
        register(hook, **options)

    def undo(self) -> None:
        """Undo everything. If this is interrupted, the next call or the next context that is entered does the rest."""
        self.live = False
        if self._undos:
            _half_undone.add(self)
        for undo in reversed(self._undos.copy()):
            undo()
        self._undos.clear()
        _half_undone.discard(self)


# What contexts have changed of a module -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Replaced:
    """An attribute, the value that a context gave it, and the one that it had."""

    name: str
    value: object
    before: object


# Attributes that were replaced, and hooks.
_changed: weakref.WeakKeyDictionary[nn.Module, list[_Replaced | Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _note(module: nn.Module, change: _Replaced | Callable[..., Any]) -> None:
    """Note a change of a module, which is copied and pickled without it from now on."""
    _changed.setdefault(module, []).append(change)
    # Copying and pickling look for this on the instance, too.
    vars(module)["__getstate__"] = functools.partial(_state, module)


def is_changed(module: nn.Module) -> bool:
    """Whether any context has a hook on the module or has replaced an attribute of it."""
    return module in _changed


def own_attribute(module: nn.Module, name: str) -> Any:
    """An attribute in a module's `__dict__` as it is without our contexts; None if there is none."""
    return unchanged(module).get(name) if is_changed(module) else vars(module).get(name)


def _state(module: nn.Module) -> Any:
    """What a copy or a pickle of a module is made of."""
    kind, state = type(module), unchanged(module)
    own = getattr(kind, "__getstate__", None)
    if own is None or own is getattr(object, "__getstate__", None):
        return state
    clean = kind.__new__(kind)  # a class that says itself what is copied
    vars(clean).update(state)
    return own(clean)


def unchanged(module: nn.Module) -> dict[str, Any]:
    """A copy of a module's `__dict__` without what our contexts have put there."""
    state, record = dict(vars(module)), _changed.get(module, [])
    state.pop("__getstate__", None)
    for change in reversed(record):
        if isinstance(change, _Replaced) and state.get(change.name) is change.value:
            state[change.name] = change.before
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        ours = {key for key, hook in state[name].items() if any(hook is each for each in record)}
        for options in (key for key in state if key == name or key.startswith(f"{name}_")):
            kept = [(key, value) for key, value in state[options].items() if key not in ours]
            state[options] = type(state[options])(kept)
    return {name: value for name, value in state.items() if value is not _ABSENT}


def _forget(module: nn.Module, change: _Replaced | Callable[..., Any]) -> None:
    """Drop a change from a module's record, and the record of a module that is as it was."""
    record = _changed.get(module, [])
    record[:] = [each for each in record if each is not change]
    if not record:
        vars(module).pop("__getstate__", None)
        _changed.pop(module, None)


class _Exit(io.IOBase):
    """A file's `__exit__` is written in C, ignores its arguments and calls `close()`: here a generator's, in C too."""

    generator: Generator[Any, None, None] | None = None


class _ExitOfContext:
    """`Context.__exit__`, as a `with` statement and (from the class) an ExitStack look it up."""

    def __get__(self, context: Context[Any] | None, owner: type) -> Callable[..., None]:
        return _leave if context is None else context._exit.__exit__


def _leave(context: Context[Any], *exception: object) -> None:
    context._exit.__exit__(*exception)  # type: ignore[arg-type]


class Context(Generic[T]):
    """Context manager over `enter(changes)`: what that changes is undone when the block is left, however that happens.

    It can be entered again once it was left.
    """

    def __init__(self, enter: Callable[[Changes], T]) -> None:
        self._make = enter

    def enter(self, changes: Changes) -> T:
        """What entering does; a class of its own says it here."""
        return self._make(changes)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled: copy the model, and make another {name} of it")

    @functools.cached_property
    def _exit(self) -> _Exit:
        return _Exit()

    @property
    def entered(self) -> bool:
        """Whether the block is running."""
        generator = self._exit.generator
        return generator is not None and inspect.getgeneratorstate(generator) != inspect.GEN_CLOSED

    def __enter__(self) -> T:
        if self.entered:
            raise RuntimeError("this context is active already: make another one to nest it")
        finish_undoing()
        generator = self._run()
        try:
            self._exit.generator, self._exit.close = generator, generator.close  # type: ignore[method-assign]
            return next(close_at_exit(generator))
        except BaseException:  # also an interrupt behind `next`
            generator.close()
            raise

    __exit__ = _ExitOfContext()

    def _run(self) -> Generator[T, None, None]:
        changes = Changes()
        try:
            try:
                yield self.enter(changes)
            finally:
                changes.undo()
        finally:  # nothing is left to do, unless that was interrupted
            changes.undo()


def finish_undoing() -> None:
    """Do the rest of what was interrupted more than once while it was undone."""
    for changes in list(_half_undone):
        changes.undo()


def changing() -> Context[Changes]:
    """`with changing() as changes`: a block whose changes are undone behind it."""
    return Context(lambda changes: changes)


def close_at_exit(generator: Generator[T, Any, Any]) -> Generator[T, Any, Any]:
    """Close a generator when the interpreter exits, if it is suspended then. Later, while modules are taken apart, what
    its `finally` calls is gone."""
    _unfinished.add(generator)
    return generator


@atexit.register
def _close_unfinished() -> None:
    for generator in list(_unfinished):
        with contextlib.suppress(ValueError):  # it is running, in a thread that does not end
            generator.close()


def _put_back(owner: object, ours: _Replaced) -> None:
    """Undo `replace`, unless somebody else has replaced the value since: a context of ours that has gets the value
    before to put back."""
    record = _changed.get(owner, []) if isinstance(owner, nn.Module) else []
    later = [each for each in record if isinstance(each, _Replaced) and each is not ours and each.before is ours.value]
    if later:
        later[0].before = ours.before
    elif vars(owner).get(ours.name, _ABSENT) is ours.value:
        if ours.before is _ABSENT:
            vars(owner).pop(ours.name, None)
        else:
            vars(owner)[ours.name] = ours.before
    if isinstance(owner, nn.Module):
        _forget(owner, ours)


def _unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    # Not by the handle, which the caller does not have yet when an interrupt comes right behind the registration.
    for hooks, *options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key in [key for key, other in hooks.items() if other is hook]:
            for option in options:
                option.pop(key, None)
            hooks.pop(key, None)
    _forget(module, hook)
