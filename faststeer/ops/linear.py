"""x W^T + b on a CPU, faster than PyTorch's own for fp32 and the few rows of a decode step (csrc/cpu/linear.h). For
inference; the formula in PyTorch is what other back ends run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.ops.dispatch import Backend, backend_of, refuse_gradient
from faststeer.ops.schema import DTYPES, library


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """x W^T + b, `[rows, outputs]`: summed in fp32, rounded once. On a CPU a row's result does not depend on the rows
    beside it.

    Args:
        x: `[rows, inputs]`.
        weight: `[outputs, inputs]`, bias: `[outputs]`, of x's dtype.

    Raises:
        RuntimeError: a gradient would be needed.
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    refuse_gradient("linear", x, weight, bias)
    if backend_of(x, backend) != "cpu":
        if x.dtype != torch.float64:
            _check(x, weight, bias)
        return F.linear(x, weight, bias)
    try:
        return _OP(x, weight, bias)
    except RuntimeError:
        _check(x, weight, bias)  # bad arguments get the same error from every back end
        raise


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes that fit (None: any size), and one dtype and device."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: expected float32, float16 or bfloat16")
    shapes = {
        "x": (x, (None, None)),
        "weight": (weight, (None, x.shape[-1] if x.dim() else None)),
        "bias": (bias, (weight.shape[0],)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.shape[-1] < 1:
            expected = ["any" if n is None else n for n in shape]
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {expected}".replace("'", ""))
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}: expected the same"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension: expected 1")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


library.define("linear.cpp(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("faststeer::linear.cpp", _fake, lib=library)
_OP = torch.ops.faststeer.linear.cpp
