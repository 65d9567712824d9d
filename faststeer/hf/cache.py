"""What a model calls its cache of keys and values: `cache` from transformers 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, under either name; None without one."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def cache_argument(model: Any) -> str:
    """The name under which the model's forward pass takes a cache."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in known), NAMES[-1])


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward pass takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
