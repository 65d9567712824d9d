"""The fastest product that this machine has for a model's linear layers, while the Engine runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faststeer.ops import backend_for, linear

# x `[rows, inputs]`, weight `[outputs, inputs]`, bias `[outputs]` -> `[rows, outputs]`.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

FEW = 4  # rows, below which weights pass by so fast that PyTorch's product is as good or better


def product_for(weight: Tensor) -> Product:
    """x W^T + b: PyTorch's own, or `ops.linear` where that is faster: for fp32 on a CPU with AVX2 or AVX-512, and for
    16-bit weights where PyTorch has no fast product of them (oneDNN's, which needs AVX-512)."""
    if not ours_is_faster(weight):
        return F.linear
    return _ours


def ours_is_faster(weight: Tensor) -> bool:
    if not weight.is_cpu or backend_for("cpu") != "cpu":
        return False
    if weight.dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    known: dict[torch.dtype, Any] = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return weight.dtype in known and not known[weight.dtype]()


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias) if x.shape[0] >= FEW else F.linear(x, weight, bias)


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
