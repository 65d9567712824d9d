"""Mends Triton's interpreter (TRITON_INTERPRET=1) where it differs from hardware or fails. Imported only where it is
on.

- It truncates where it makes bf16 of fp32; hardware rounds to nearest, ties to even (seen in Triton 3.6 and 3.9).
- Its scalars are arrays of one element, which NumPy 2.4 no longer takes for a number: loops with a bound that was
  computed in the kernel fail (Triton 3.6).
"""

from __future__ import annotations

from typing import Any

import numpy as np

import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    """Put the repaired functions into the interpreter."""
    interpreter._convert_float = _convert_float_rounding
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
