"""Mends Triton's interpreter (TRITON_INTERPRET=1) where it differs from hardware, fails or dawdles. For tests only, in
processes where it is on.

- It truncates where it makes bf16 of fp32; hardware rounds to nearest, ties to even (seen in Triton 3.6 and 3.9).
- Its scalars are arrays of one element, which NumPy 2.4 no longer takes for a number: loops with a bound that was
  computed in the kernel fail (Triton 3.6).
- It replaces the functions of `triton.language` again at every call of a `@triton.jit` function from another, which is
  most of its time (Triton 3.6 and 3.9). Once in a launch is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    """Put the repaired functions into the interpreter."""
    interpreter._convert_float = _convert_float_rounding
    interpreter._patch_lang = _patch_lang_once
    interpreter._patch_lang_tensor = _patch_lang_tensor_indexing


def _convert_float_rounding(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _convert_float(data, source, target, rounding_mode)


def _patch_lang_tensor_indexing(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class _Launch:
    """What a launch has replaced, and in which modules; given back when it is over."""

    current: _Launch | None = None

    def __init__(self) -> None:
        self.modules: set[ModuleType] = set()
        self.scopes: list[Any] = []

    def restore(self) -> None:
        _Launch.current = None
        for scope in reversed(self.scopes):
            scope.restore()


def _patch_lang_once(function: Callable[..., Any]) -> _Launch:
    """The launch calls this first, and restores what it gets; then every call inside it does, which keeps nothing."""
    launch = _Launch.current = _Launch.current or _Launch()
    modules = _modules_of(function)
    if not modules <= launch.modules:
        launch.scopes.append(_patch_lang(function))
        launch.modules |= modules
    return launch


@functools.cache
def _modules_of(function: Callable[..., Any]) -> frozenset[ModuleType]:
    """Those that the function calls and the interpreter replaces functions of."""
    return frozenset(module for module in function.__globals__.values() if module is tl or module is tl.core)
