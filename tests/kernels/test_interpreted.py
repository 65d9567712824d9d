"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the reference and its fp64 evaluation. What a case does is in
interpreted_cases.py."""

import pytest
import torch

from faststeer.ops.tables import Kind

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW_OPERATORS = ["steer", "steer_", "add_steer", "add_steer_rmsnorm", "latch_"]
LAYOUTS = ["contiguous", "strided", "odd stride", "offset"]


def name(value):
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)


# The interpreter takes milliseconds per entry and row. The normal grid has every hidden size, dtype, operator, layout and number of rows, but
# not all of them with each other.


@every_dtype
@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("hidden", [1, 2, 64, 111])
def test_operators(interpreted, dtype, operator, hidden):
    interpreted("random_case", dtype, hidden, 7, [operator])


@pytest.mark.parametrize("operator", ["steer_", "add_steer_rmsnorm"])
@pytest.mark.parametrize("hidden", [896, 2048, 3584, 4096, 5120, 16384])
def test_model_sizes(interpreted, hidden, operator):
    interpreted("random_case", torch.bfloat16, hidden, 3, [operator])


@pytest.mark.parametrize("n_rows", [1, 2, 33])
def test_numbers_of_rows(interpreted, n_rows):
    interpreted("random_case", torch.float16, 64, n_rows, ["add_steer"], most=3)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [64, 111])
def test_layouts(interpreted, dtype, layout, hidden):
    interpreted("random_case", dtype, hidden, 5, ["steer_", "add_steer", "latch_"], layout)


@pytest.mark.parametrize("seed", range(4))
def test_eight_entries_on_a_row(interpreted, seed):
    interpreted("random_case", DTYPES[seed % 3], 96, 8, ["steer", "add_steer"], most=8, seed=seed)


@pytest.mark.full
@every_dtype
@pytest.mark.parametrize("n_rows", [1, 2, 7, 33])
@pytest.mark.parametrize("hidden", [1, 3, 64, 111, 500, 896, 2048, 3584, 4096, 8192, 16384])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_together(interpreted, dtype, n_rows, hidden, layout):
    interpreted("random_case", dtype, hidden, n_rows, ROW_OPERATORS, layout, most=8, seed=1)


@every_dtype
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.LATCH], ids=name)
@pytest.mark.parametrize("hidden", [64, 111])
def test_every_kind(interpreted, dtype, kind, hidden):
    interpreted("one_kind", dtype, hidden, int(kind))


@every_dtype
@pytest.mark.parametrize("hidden", [64, 1000])
def test_add_is_the_hand_written_hook(interpreted, dtype, hidden):
    interpreted("add_is_the_hook", dtype, hidden)


@every_dtype
@pytest.mark.parametrize("hidden", [64, 111])
def test_nothing_acts(interpreted, dtype, hidden):
    interpreted("untouched", dtype, hidden)


@every_dtype
def test_a_row_alone_and_among_others(interpreted, dtype):
    interpreted("alone_and_among_others", dtype, 111)


@every_dtype
def test_no_rows(interpreted, dtype):
    interpreted("no_rows", dtype)


@every_dtype
def test_hostile_entries(interpreted, dtype):
    interpreted("hostile_entries", dtype)


@every_dtype
def test_hostile_rows(interpreted, dtype):
    interpreted("hostile_rows", dtype)


@every_dtype
@pytest.mark.parametrize("hidden", [5, 111, 1024])
@pytest.mark.parametrize("layout", ["contiguous", "odd stride"])
def test_sparse_add(interpreted, dtype, hidden, layout):
    interpreted("sparse_add", dtype, hidden, layout)


@every_dtype
def test_warmup(interpreted, dtype):
    interpreted("warm", dtype)
