"""What a model calls its cache: `cache` from transformers 5.24 on, `past_key_values` before, `state` in RWKV."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "state")


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass, under any of its names; None without one."""
    for name in NAMES:
        if (cache := inputs.get(name)) is not None:
            return cache
    return None


def length_of(cache: Any) -> Any:
    """Tokens in a cache, an int or a tensor; None where a recurrent state does not count them."""
    if cache is None:
        return 0
    try:
        count = cache.get_seq_length
    except AttributeError:
        return None
    try:
        return count()
    except ValueError:  # states of recurrent layers alone
        return None if cache.has_previous_state() else 0


def caches_in(output: Any) -> list[Any]:
    """The caches that a forward pass returned."""
    if isinstance(output, Mapping):
        return [value for name, value in output.items() if name in NAMES and value is not None]
    parts = output if isinstance(output, tuple) else ()
    return [part for part in parts if hasattr(part, "get_seq_length")]


def cache_argument(model: Any) -> str:
    """The name under which the model's forward pass takes a cache."""
    return next((name for name in NAMES if name in inspect.signature(model.forward).parameters), "past_key_values")


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward pass takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
