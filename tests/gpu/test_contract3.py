"""Contract 3 on the GPU: every back end is at least as close to fp64 as twice the error of plain PyTorch in the same
dtype, for every dtype, hidden size and number of rows, every intervention alone and mixed plans, and for tables that
go further than plans do."""

from __future__ import annotations

import pytest
import torch
from backend_cases import KINDS, check_ops, steered
from device import CUDA, DEVICE, DTYPES, HIDDEN, MARKS, OTHER_HIDDEN, ROWS
from operators import Called
from random_tables import COUNTS, Case, check_all

pytestmark = MARKS

# Up to eight interventions on a row.
MIXES = [
    ["Add", "Ablate"],
    ["Ablate3", "Clamp", "Probe"],
    list(KINDS[:8]),
    ["Project", "Add"],
    ["Add"] * 4 + ["Clamp"] * 4,
    [],
]
INTERVENTIONS = KINDS if CUDA else ("Add", "Ablate3", "RotateRelative", "KeepNorm")


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
class TestPlans:
    @pytest.mark.parametrize("rows", ROWS)
    def test_mixed_per_row(self, backend, dtype, rows, hidden):
        check_ops(steered(MIXES, rows, hidden, DTYPES[dtype], DEVICE, seed=rows), backend)

    @pytest.mark.parametrize("kind", INTERVENTIONS)
    def test_one_intervention(self, backend, dtype, kind, hidden):
        check_ops(steered([[kind]], 7, hidden, DTYPES[dtype], DEVICE, seed=1), backend)


@pytest.mark.parametrize("seed", range(40 if CUDA else 2))
def test_random_plans(backend, seed):
    """Plans of one to eight random interventions, as many plans as rows or fewer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    plans = [[KINDS[draw(len(KINDS))] for _ in range(1 + draw(8))] for _ in range(1 + draw(12))]
    hidden = (*HIDDEN, *OTHER_HIDDEN)[draw(len(HIDDEN) + len(OTHER_HIDDEN))]
    rows, dtype = 1 + draw(300 if CUDA else 6), list(DTYPES.values())[draw(3)]
    check_ops(steered(plans, rows, hidden, dtype, DEVICE, seed), backend)


@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("rows", [9, 150] if CUDA else [9])
@pytest.mark.parametrize("hidden", [*HIDDEN, *OTHER_HIDDEN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_tables(backend, dtype, hidden, rows, unaligned):
    """Strided rows, every kind of gate and window, up to 35 vectors in one entry."""
    counts = COUNTS if CUDA else (1, 2, 3)
    case = Case(hidden, DTYPES[dtype], rows, hidden, unaligned=unaligned, device=DEVICE, counts=counts)
    check_all(case, Called(case, backend))
