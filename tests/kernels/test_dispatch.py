"""The Triton kernels behind faststeer.ops, interpreted: chosen, checked, differentiated, compiled. What a case does is
in dispatch_cases.py."""

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAD = ["x dtype", "x dimensions", "x stride", "x overlap", "residual shape", "residual dtype", "weight shape"]
BAD += ["weight dtype", "bank shape", "bank dtype", "bank device", "bank strided", "entries dtype"]
BAD += ["ranges strided", "rows shape", "rows dtype", "rows device", "gate_state dtype"]
BAD_PAIR = ["rows", "probe", "probe dtype"]
OPERATORS = ["steer", "add_steer", "steer_pair_", "add_steer_rmsnorm", "latch_"]


def name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_operators_are_the_kernels(dispatched, dtype):
    dispatched("same_results", dtype)


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(dispatched, what):
    dispatched("refused", what)


@pytest.mark.parametrize("what", BAD_PAIR)
def test_bad_arguments_of_a_pair_are_named(dispatched, what):
    dispatched("pair_refused", what)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(dispatched, operator):
    dispatched("opcheck", operator)


def test_gradients_are_the_references(dispatched):
    dispatched("gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_compiles_into_one_graph(dispatched, dtype):
    dispatched("one_graph", dtype)
