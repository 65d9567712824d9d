"""What was found out about a model, kept for as long as its modules are the same ones."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from faststeer.hf.changes import own_attribute

T = TypeVar("T")

_by_model: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()


@dataclass
class Known:
    """What was found out about a model, by name; none of it may hold the model.

    Attributes:
        structure: of the model, while this is true of it.
    """

    structure: Any
    findings: dict[str, Any] = field(default_factory=dict)

    def get(self, what: str, find: Callable[[], T]) -> T:
        """A finding, by `find()` the first time."""
        if what not in self.findings:
            self.findings[what] = find()
        return self.findings[what]


def known_of(model: nn.Module) -> Known:
    """What is known of a model: nothing, once a module was added, removed, replaced or given another `forward`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: expected a torch.nn.Module, such as fs.load gives")
    now, known = structure(model), _by_model.get(model)
    if known is None or known.structure != now:
        known = _by_model[model] = Known(now)
    return known


@functools.lru_cache(maxsize=256)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a class's `forward`'s parameters, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; `names` are those that may be given by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def structure(model: nn.Module) -> Any:
    """A value that is equal as long as a model's modules are the same, each with the same code, and norms with the same
    eps, which fused layers take for constant."""
    found, rest = [], [model]
    while rest:  # `named_modules` takes three times as long, and this is done whenever a model is steered
        module = rest.pop()
        kind, children, own = type(module), module._modules, vars(module)
        eps = own.get("variance_epsilon", own.get("eps"))
        eps = eps if isinstance(eps, float) else None
        forwards = id(own_attribute(module, "forward")), id(kind.forward)
        found.append((weakref.ref(module), kind, *forwards, eps, *children))
        rest += [child for child in children.values() if child is not None]
    return found
