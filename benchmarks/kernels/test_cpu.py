"""The C++ on CPU tensors against the hooks that people write, and what one call costs the host. Run: make bench-cpu.

Each call finds its rows as a layer leaves them, just written. The ways take turns, in several passes: a machine's speed
drifts by more than what is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import COEFFICIENT, Case, case, directions, eager_hook
from torch import Tensor

from faststeer import ops

HIDDEN = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("eager hook", "in-place hook", "steer", "sum, hook and norm", "add_steer_rmsnorm")
PASSES = range(7)
EPS = 1e-6


def in_place_hook(steering: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same, by somebody who minds the memory."""
    d = directions(HIDDEN, seed=0)[0].to(dtype)
    if steering == "add":
        return lambda x: x.add_(d, alpha=COEFFICIENT)
    unit = d / d.norm()
    return lambda x: x.addr_(x @ unit, unit, alpha=-1)


def sum_hook_and_norm(hook: Callable[[Tensor], Tensor], operands: Case) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What a hook on a layer's output stands between: the residual sum, and the norm as transformers computes it."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hook(operands.residual + x)
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return operands.weight * normed.to(x.dtype), hidden

    return run


def run_of(how: str, steering: str, made: Case) -> Callable[[Tensor], object]:
    dtype = made.x.dtype
    if how == "in-place hook":
        return in_place_hook(steering, dtype)
    if how == "steer":
        return lambda x: ops.steer(x, made.tables, made.rows, backend="cpu")
    if how == "add_steer_rmsnorm":
        norm = made.weight, EPS, 0.0, False
        return lambda x: ops.add_steer_rmsnorm(x, made.residual, *norm, made.tables, made.rows, backend="cpu")
    hook = eager_hook(steering, HIDDEN, dtype, "cpu")
    return hook if how == "eager hook" else sum_hook_and_norm(hook, made)


# The last of these varies slowest, the first fastest.
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("steering", ["add", "ablate"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("number", PASSES)
def test_steer(benchmark, how, steering, dtype, rows, number):
    made = case(steering, rows, HIDDEN, DTYPES[dtype], "cpu")
    benchmark.extra_info |= {"how": how, "steering": steering, "rows": rows, "hidden": HIDDEN, "dtype": dtype}
    run, written = run_of(how, steering, made), made.x.clone()

    def layer() -> tuple[tuple[Tensor], dict[str, object]]:
        return (made.x.copy_(written),), {}

    with torch.inference_mode():
        benchmark.pedantic(run, setup=layer, rounds=100 if rows > 100 else 1000, warmup_rounds=10)


@pytest.mark.parametrize("how", ["ops.steer", "torch.ops.faststeer.steer.cpp"])
@pytest.mark.parametrize("number", PASSES)
def test_host_cost_of_one_call(benchmark, how, number):
    """A row so short that the work on it is nothing."""
    made = case("add", 1, 64, torch.float32, "cpu")
    benchmark.extra_info |= {"how": how, "steering": "add", "rows": 1, "hidden": 64, "dtype": "fp32"}
    t = made.tables
    arguments = made.x, *t[:3], made.rows, None, None, 0
    with torch.inference_mode():
        if how == "ops.steer":
            benchmark.pedantic(ops.steer, (made.x, t, made.rows), rounds=50, iterations=1000, warmup_rounds=1)
        else:
            op = torch.ops.faststeer.steer.cpp
            benchmark.pedantic(op, arguments, rounds=50, iterations=1000, warmup_rounds=1)
