"""Rows that steering makes infinite or NaN, and what every back end must say of them; shared by the tests of all back
ends. The flags are compared with what the op itself has written, and with nothing that computes them likewise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from backend_cases import KINDS, Steered, bits, steered
from torch import Tensor

from faststeer import ops

MIXES = [
    ["Add"],
    ["Ablate3", "Clamp", "Probe"],
    list(KINDS[:8]),
    ["Project", "Add"],
    ["Ablate", "KeepNorm"],
    ["Gated"],
    [],
]
# Coefficients that leave a row finite, take some of its elements over the dtype's largest number, or all of them.
LARGE = {torch.float32: (1e37, 2e38, 3.4e38), torch.bfloat16: (1e37, 2e38, 3.4e38), torch.float16: (1e3, 3e4, 1e38)}
NORMS = ((False, 0.0), (True, 1.0))


def overflowing(rows: int, hidden: int, dtype: torch.dtype, device: str, seed: int) -> Steered:
    """Plans of every kind, a third of whose additions are very large; and infinities and NaN in x and residual, among
    them infinities whose sum is NaN, in rows that are steered and in rows that are not."""
    case = steered(MIXES, rows, hidden, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int, count: int) -> list[int]:
        return torch.randint(n, (count,), generator=generator).tolist()

    scalars = case.tables.scalars.clone()
    adds = (case.tables.fields[:, ops.Field.KIND] == ops.Kind.ADD).nonzero().flatten().tolist()
    for entry, size in zip(adds, pick(4, len(adds)), strict=True):
        if size < 3:
            scalars[entry, ops.Scalar.A] = LARGE[dtype][size]
    for tensor, value in ((case.x, "inf"), (case.x, "-inf"), (case.x, "nan"), (case.residual, "inf")):
        for row, column in zip(pick(rows, rows // 8), pick(hidden, rows // 8), strict=True):
            tensor[row, column] = float(value)
    both = pick(rows, 1)[0]
    case.x[both, -1], case.residual[both, -1] = float("inf"), -float("inf")
    case.tables = case.tables._replace(scalars=scalars)
    return case


def check_nonfinite(case: Steered, backend: ops.Backend) -> int:
    """Every steering op with flags: it computes what it computes without, writes 1 for the rows that something acted on
    and that it left infinite or NaN, and nothing else. Returns how many such rows `add_steer` had."""
    arguments = case.tables, case.rows, case.gate_state
    n = len(case.x)

    def acted(x: Tensor, residual: Tensor) -> Tensor:
        """Of a pair, such rows have zeros in x, which no row of a case has before."""
        pair = x.clone(), residual.clone()
        ops.steer_pair_(*pair, *arguments, None, backend=backend)
        return ~pair[0].any(1)

    def check(what: str, acts: Tensor, run: Callable[[Tensor | None], tuple[Tensor, ...]]) -> int:
        """`run(flags)` returns what the op has written, the steered rows first."""
        before = torch.full((n + 3,), 0, dtype=torch.int32, device=case.x.device)
        before[::5] = 7  # a flag of an earlier site, or anything else: written with 1, or left
        flags = before.clone()
        plain, flagged = run(None), run(flags)
        for a, b in zip(plain, flagged, strict=True):
            assert torch.equal(bits(a), bits(b)), f"{what}: flags change the result"
        expected = before.clone()
        bad = acts & ~plain[0].isfinite().all(1)
        expected[:n][bad] = 1
        assert flags.tolist() == expected.tolist(), what
        return int(bad.sum())

    def in_place(flags: Tensor | None) -> tuple[Tensor, ...]:
        x = case.x.clone()
        ops.steer_(x, *arguments, None, flags, backend=backend)
        return (x,)

    def pair(flags: Tensor | None) -> tuple[Tensor, ...]:
        x, residual = case.x.clone(), case.residual.clone()
        ops.steer_pair_(x, residual, *arguments, None, flags, backend=backend)
        return residual, x

    def normed(fp32_weight: bool, offset: float) -> Callable[[Tensor | None], tuple[Tensor, ...]]:
        norm = case.weight, 1e-6, offset, fp32_weight
        return lambda flags: ops.add_steer_rmsnorm(
            case.x, case.residual, *norm, *arguments, None, flags, backend=backend
        )[::-1]

    alone, summed = acted(case.x, torch.zeros_like(case.x)), acted(case.x, case.residual)
    check("steer", alone, lambda flags: (ops.steer(case.x, *arguments, None, flags, backend=backend),))
    check("steer_", alone, in_place)
    two = case.x, case.residual
    bad = check("add_steer", summed, lambda flags: (ops.add_steer(*two, *arguments, None, flags, backend=backend),))
    check("steer_pair_", summed, pair)
    for norm in NORMS:
        check("add_steer_rmsnorm", summed, normed(*norm))
    return bad


def check_neighbours(case: Steered, backend: ops.Backend) -> None:
    """Rows that stay finite have the bits that they have where the others were never there."""
    arguments = case.tables, case.rows, case.gate_state
    norm = case.weight, 1e-6, 0.0, False
    normed, hidden = ops.add_steer_rmsnorm(case.x, case.residual, *norm, *arguments, backend=backend)
    fine = hidden.isfinite().all(1)
    assert fine.any() and not fine.all()
    x, residual = (torch.where(fine.unsqueeze(1), t, 0) for t in (case.x, case.residual))
    rows = case.rows._replace(slot=torch.where(fine, case.rows.slot, -1))
    again = ops.add_steer_rmsnorm(x, residual, *norm, case.tables, rows, case.gate_state, backend=backend)
    for ours, theirs in zip((normed, hidden), again, strict=True):
        assert torch.equal(bits(ours)[fine], bits(theirs)[fine])


def check_limits(hidden: int, dtype: torch.dtype, device: str, backend: ops.Backend) -> None:
    """Of one element at or beside the largest number that rounds to a finite one, wherever it stands in the row."""
    # A number half a unit above the largest rounds to infinity; of fp32 itself that is infinity already.
    largest, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    tie = torch.tensor(largest + largest / (2 - eps) * eps / 2, dtype=torch.float64).float()
    below = torch.nextafter(tie, torch.tensor(0.0)) if dtype != torch.float32 else torch.tensor(largest)
    values = [float(below), float(tie), -float(below), -float(tie), largest, float("inf"), float("nan")]
    columns = sorted({0, 1, hidden // 2, hidden - 2, hidden - 1, *range(0, hidden, 61)})
    case = steered([["Add"]], len(columns), hidden, dtype, device, seed=1)
    for value in values:
        x, flags = torch.zeros_like(case.x), torch.zeros(len(columns), dtype=torch.int32, device=device)
        tables = case.tables
        for number, column in enumerate(columns):  # a row each: a vector of its own would be a table each
            bank, scalars = torch.zeros_like(tables.bank), tables.scalars.clone()
            bank[:, column], scalars[:, ops.Scalar.A] = value, 1.0
            only = case.rows._replace(
                slot=torch.where(torch.arange(len(columns), device=device) == number, 0, -1).int()
            )
            arguments = tables._replace(bank=bank, scalars=scalars), only, case.gate_state
            ops.steer_(x, *arguments, None, flags, backend=backend)
        finite = torch.tensor(abs(value) < float(tie))
        assert torch.equal(x.isfinite().all(1), finite.expand(len(columns)).to(device))
        assert flags.tolist() == [int(not finite)] * len(columns), value
