"""x W^T + b on a CPU, faster than PyTorch's own for fp32 and the few rows of a decode step (csrc/cpu/linear.h). For
inference; the formula in PyTorch is what other back ends run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.ops.dispatch import Backend, backend_of, derivable, refuse_gradient
from faststeer.ops.schema import check_float, check_table, library


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
    name = derivable("linear", backend_of(x, backend), backend, (x, weight, bias))
    if name == "cpu" and x.dtype == weight.dtype:
        try:
            return _OP(x.float(), weight, bias)
        except RuntimeError:
            _check(x, weight, bias)  # bad arguments get the same error from every back end
            raise
    if x.dtype != torch.float64:
        _check(x, weight, bias)
    return F.linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float(x, "x")
    check_table(x, "x", (None, None), x.dtype, x, contiguous=False)
    if x.shape[1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}: expected one input or more")
    check_table(weight, "weight", (None, x.shape[1]), x.dtype, x, contiguous=False)
    if bias is not None:
        check_table(bias, "bias", (weight.shape[0],), x.dtype, x)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x.to(weight.dtype), weight, bias)
    return weight.new_empty(x.shape[0], weight.shape[0])


# x is in fp32, whatever the weight's dtype, which is the result's.
library.define("linear.cpp(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("faststeer::linear.cpp", _fake, lib=library)
_OP = torch.ops.faststeer.linear.cpp
