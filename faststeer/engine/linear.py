"""The fastest product that this machine has for a model's linear layers, while the Engine runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faststeer.ops import backend_for, linear

# x `[rows, inputs]`, weight `[outputs, inputs]`, bias `[outputs]` -> `[rows, outputs]`.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Rows below which weights pass by so fast that PyTorch's product is as good or better.
FEW = 4
# Where PyTorch has instructions for 16-bit products and ours are of fp32, the smaller price of a call decides: up to so
# many rows and weights.
MANY, SMALL = 256, 1 << 16


def most_rows(weight: Tensor) -> int:
    """For how many rows at most `ops.linear` is the faster product of a weight; 0: for none.

    For fp32, on a CPU with AVX2 or AVX-512, for any number; for 16-bit weights too where PyTorch has no fast product of
    them (oneDNN's, which needs AVX-512)."""
    if not weight.is_cpu or backend_for("cpu") != "cpu":
        return 0
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return 0
    known: dict[torch.dtype, Any] = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if weight.dtype in known and known[weight.dtype]():
        return MANY if weight.numel() <= SMALL else 0
    return sys.maxsize if weight.dtype == torch.float32 or weight.dtype in known else 0


def product_for(weight: Tensor) -> Product:
    """x W^T + b, by the faster product for each number of rows."""
    most = most_rows(weight)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias) if FEW <= x.shape[0] <= most else F.linear(x, weight, bias)

    return product if most else F.linear


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer computes x W^T + b: exactly of this class (a quantised layer, or one with an adapter,
    computes something else), with its own forward."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def fast_forward(module: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """A linear layer's `forward` by a faster product; None where PyTorch's own is the one to take."""
    product = product_for(module.weight)
    if product is F.linear:
        return None

    def forward(x: Tensor) -> Tensor:
        if x.dtype != module.weight.dtype:
            return F.linear(x, module.weight, module.bias)  # and PyTorch's own complaint
        return product(x.reshape(-1, x.shape[-1]), module.weight, module.bias).view(*x.shape[:-1], -1)

    return forward
