"""How functions of vLLM are put behind ours. Imports nothing heavy (see `switch`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, within: Callable[..., Any]) -> None:
    """Replace the function `name` of a class, an instance or a module by one that calls `within(function, *arguments)`.
    A function that was replaced so before is left alone.

    Raises:
        AttributeError: the owner has no such function.
    """
    function = getattr(owner, name)
    if hasattr(function, "faststeer"):
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return within(function, *args, **kwargs)

    wrapped.faststeer = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def wrap_imported(module: str, path: str, within: Callable[..., Any]) -> None:
    """Wrap a module's "function" or "Class.function", if this process has imported the module, and this version of vLLM
    has the function."""
    owner: Any = sys.modules.get(module)
    *classes, name = path.split(".")
    for kind in classes:
        owner = getattr(owner, kind, None)
    if hasattr(owner, name):
        wrap(owner, name, within)
