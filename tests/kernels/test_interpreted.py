"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the reference and its fp64 evaluation. What a
case does is in interpreted_cases.py.

The interpreter takes some 6 ms for an entry of a row, so that not everything meets everything. The normal run covers

- contract 3 (`test_contract_3`): every dtype x hidden {64, 111, 896, 2048, 3584, 4096, 8192, 16384} x rows {1, 2, 7,
  33, 199}. Every cell runs a mix of 8 interventions that has each kind; cells of 33 and 199 rows run each kind alone as
  well, and mixes of 2 and 3; cells of 7 rows the mix and six kinds. The five steering operators take turns, two in each
  cell up to 7 rows and one in the others: each meets every dtype, hidden size and number of rows.
- every operator, with every norm, at hidden {1, 2, 64, 111} x dtype; layouts of x in memory, hostile tables, bits that
  must not change.

`-m full` runs all six row operators, with every norm, in every cell of that grid, and every layout at more hidden
sizes.
"""

import pytest
import torch

from faststeer.ops.tables import EntryKind

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW_OPERATORS = ["steer", "add_steer", "steer_pair_", "add_steer_rmsnorm", "latch_"]
STEERING = ["steer", "add_steer", "add_steer_rmsnorm, one norm", "steer_pair_"]
HIDDEN = [64, 111, 896, 2048, 3584, 4096, 8192, 16384]
ROWS = [1, 2, 7, 33, 199]
LAYOUTS = ["contiguous", "strided", "odd stride", "offset"]


def name(value):
    return value.name if isinstance(value, EntryKind) else str(value).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name)


@every_dtype
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("n_rows", ROWS)
def test_contract_3(interpreted, dtype, hidden, n_rows):
    turn = DTYPES.index(dtype) + HIDDEN.index(hidden) + ROWS.index(n_rows)
    operators = [STEERING[i % len(STEERING)] for i in ((turn, turn + 2) if n_rows <= 7 else (turn,))]
    interpreted("grid_cell", dtype, hidden, n_rows, operators)


@pytest.mark.full
@every_dtype
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("n_rows", ROWS)
def test_contract_3_of_every_operator(interpreted, dtype, hidden, n_rows):
    interpreted("grid_cell", dtype, hidden, n_rows, ROW_OPERATORS)


@every_dtype
@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("hidden", [1, 2, 64, 111])
def test_operators(interpreted, dtype, operator, hidden):
    interpreted("random_case", dtype, hidden, 7, [operator])


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [64, 111])
def test_layouts(interpreted, dtype, layout, hidden):
    interpreted("random_case", dtype, hidden, 5, ["steer", "add_steer", "steer_pair_", "latch_"], layout)


@pytest.mark.parametrize("seed", range(4))
def test_eight_entries_on_a_row(interpreted, seed):
    interpreted("random_case", DTYPES[seed % 3], 96, 8, ["steer", "add_steer"], most=8, seed=seed)


@pytest.mark.full
@every_dtype
@pytest.mark.parametrize("hidden", [1, 3, 64, 111, 500, 896, 2048, 2560, 3584, 5120, 8192, 16384])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_size(interpreted, dtype, hidden, layout):
    interpreted("random_case", dtype, hidden, 7, ROW_OPERATORS, layout, most=8, seed=1)


@every_dtype
@pytest.mark.parametrize("kind", [kind for kind in EntryKind if kind != EntryKind.LATCH], ids=name)
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
@pytest.mark.parametrize("hidden", [64, 111])
def test_infinities_and_nans(interpreted, dtype, hidden):
    interpreted("not_finite", dtype, hidden)


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
def test_warmup(interpreted, dtype):
    interpreted("warm", dtype)
