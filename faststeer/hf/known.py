"""What was found out about a model, kept for as long as its modules are the same ones."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

from faststeer.hf.changes import own_attribute

T = TypeVar("T")


class Known(Generic[T]):
    """One finding per model. It is made anew when a module was added, removed, replaced or given another `forward`."""

    def __init__(self) -> None:
        self._by_model: weakref.WeakKeyDictionary[nn.Module, tuple[Any, T]] = weakref.WeakKeyDictionary()

    def get(self, model: nn.Module, find: Callable[[], T]) -> T:
        """The finding, by `find()` if there is none or the model has changed since."""
        now, known = structure(model), self._by_model.get(model)
        return self.put(model, find()) if known is None or known[0] != now else known[1]

    def put(self, model: nn.Module, finding: T) -> T:
        """Keep a finding."""
        self._by_model[model] = structure(model), finding
        return finding

    def forget(self, model: nn.Module) -> None:
        """Find anew the next time."""
        self._by_model.pop(model, None)


@functools.lru_cache(maxsize=256)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a class's `forward`'s parameters, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def structure(model: nn.Module) -> Any:
    """A value that is equal as long as a model's modules are the same, each with the same code."""
    found, rest = [], [model]
    while rest:  # `named_modules` takes three times as long, and this is done whenever a model is steered
        module = rest.pop()
        kind, children = type(module), module._modules
        found.append((weakref.ref(module), id(own_attribute(module, "forward")), kind, id(kind.forward), *children))
        rest += [child for child in children.values() if child is not None]
    return found
