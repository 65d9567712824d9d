"""Linear layers of 16-bit weights on a CPU without instructions for them: `ops.linear` in place of PyTorch's product,
which is slow there. Only while a pass of the Engine runs.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faststeer.ops import backend_for, linear


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != self.weight.dtype:
        return F.linear(x, self.weight, self.bias)  # and PyTorch's own complaint
    return linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


def slow_here(dtype: torch.dtype) -> bool:
    """Whether PyTorch has no fast product of this dtype on this machine's CPU (oneDNN's, which needs AVX-512), and we
    have one."""
    known: dict[torch.dtype, Any] = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and backend_for("cpu") == "cpu" and not known[dtype]()


class Linears:
    """What makes a model's linear layers compute with the operator, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        # Of exactly this class: a quantised layer, or one with an adapter, computes something else.
        self._layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.is_cpu and slow_here(module.weight.dtype)
        ]

    def __enter__(self) -> None:
        self._replaced = [layer for layer in self._layers if "forward" not in layer.__dict__]
        for layer in self._replaced:
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]

    def __exit__(self, *exception: object) -> None:
        for layer in self._replaced:
            layer.__dict__.pop("forward", None)
