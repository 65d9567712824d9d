"""CPU kernels against the hook that people write, and the host cost of a call. Run: make bench-cpu."""

from __future__ import annotations

import pytest
import torch
from cases import case, eager_hook

from faststeer import ops
from faststeer.ops.dispatch import _op, _tensors

HIDDEN = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("steering", ["add", "ablate"])
@pytest.mark.parametrize("how", ["eager hook", "steer", "steer_"])
def test_steer(benchmark, how, steering, rows, dtype):
    made = case(steering, rows, HIDDEN, dtype, "cpu")
    benchmark.extra_info |= {"op": how, "steering": steering, "rows": rows, "hidden": HIDDEN, "dtype": str(dtype)}
    hook = eager_hook(steering, HIDDEN, dtype, "cpu")
    x = made.x
    with torch.no_grad():
        if how == "eager hook":
            benchmark(hook, x)
        elif how == "steer":
            benchmark(ops.steer, x, made.tables, made.rows, backend="cpu")
        else:
            # Repeated in place, an addition grows the rows; growth does not change the work.
            benchmark(ops.steer_, x, made.tables, made.rows, backend="cpu")


def test_host_cost_of_one_call(benchmark):
    made = case("add", 1, 64, torch.float32, "cpu")
    arguments = (made.x, *_tensors(made.tables, made.rows, None), None)
    benchmark.extra_info |= {"op": "torch.ops.faststeer.steer_.cpp", "steering": "add", "rows": 1, "hidden": 64}
    benchmark.extra_info |= {"dtype": "torch.float32"}
    op = _op("steer_", "cpu")
    with torch.no_grad():
        benchmark(op, *arguments)
