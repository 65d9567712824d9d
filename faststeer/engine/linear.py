"""Linear layers by `ops.linear` while the Engine runs, where that is the faster product on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faststeer.hf.changes import Changes, Context
from faststeer.ops import backend_for, linear

# Rows below which weights pass by so fast that PyTorch's product is as good or better, and rows above which it is, on
# the processors that MKL is made for. Those with AMX are such; older ones are taken for others.
FEW, MANY = 4, 64 if torch.cpu._is_amx_tile_supported() else math.inf


class FastLinears(Context[None]):
    """What makes a model's linear layers compute so, while it is entered. Weights and adapters are looked at anew each
    time, and a layer that is more than x W^T + b (quantised, adapted, or with a forward of its own) is left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def enter(self, changes: Changes) -> None:
        for module in self._model.modules():
            if type(module) is not nn.Linear or "forward" in module.__dict__:
                continue
            # A weight of another class, such as torchao's, has a product of its own.
            if type(module.weight) is nn.Parameter and is_faster(module.weight):
                changes.replace(module, "forward", _forward(module))


def is_faster(weight: Tensor) -> bool:
    """Whether `ops.linear` is the faster product of a weight: on a CPU with AVX2 or AVX-512, in fp32 (PyTorch's MKL
    keeps to AVX2 on processors of another maker), and in 16 bits where PyTorch has no fast product of them."""
    if not weight.is_cpu or backend_for("cpu") != "cpu":
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if weight.dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if x.dtype != module.weight.dtype or not FEW <= rows <= MANY:  # the former: PyTorch's own complaint
            return F.linear(x, module.weight, module.bias)
        return linear(x.reshape(rows, -1), module.weight, module.bias).view(*x.shape[:-1], -1)

    return forward
