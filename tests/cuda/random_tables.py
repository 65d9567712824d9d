"""Random tables with every kind of entry, gate, window and count, further than plans go, and what a back end must make
of them. tests/cuda (emulated kernels) and tests/gpu (real ones) share it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from placing import entries_of, placed
from torch import Tensor

from faststeer.ops import reference
from faststeer.ops.tables import VECTORS as VECTORS_OF
from faststeer.ops.tables import EntryKind, Field, GateMode, Tables

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HIDDEN = (64, 111, 896, 2048, 3584, 4096, 8192, 16384)
COLUMNS, VECTORS, GATES = 5, 44, 3
ACTING = [
    EntryKind.ADD,
    EntryKind.ABLATE,
    EntryKind.PROJECT,
    EntryKind.CLAMP,
    EntryKind.ROTATE,
    EntryKind.ROTATE_RELATIVE,
]
COUNTS = (1, 1, 2, 3, 5, 16, 17, 35)  # around the 16 vectors whose dots the CUDA kernels sum together


class Operators(Protocol):
    """The row operators of docs/kernels.md on one case's tables."""

    def steer(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]: ...

    def add_steer(self, x: Tensor, residual: Tensor, columns: int) -> tuple[Tensor, Tensor]: ...

    def steer_pair_(self, x: Tensor, residual: Tensor, probe: Tensor | None) -> None: ...

    def add_steer_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, norm: tuple[float, float, bool], columns: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


class Case:
    """Random rows and tables. The bank is of unit vectors, the entries of every kind, gate, window and count."""

    def __init__(
        self,
        hidden: int,
        dtype: torch.dtype,
        rows: int,
        seed: int,
        *,
        unaligned: bool = False,
        device: str = "cpu",
        counts: tuple[int, ...] = COUNTS,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.counts, self.device = counts, device
        self.x, self.residual = (self._rows(rows, hidden, dtype, unaligned) for _ in range(2))
        self.weight = self.randn(hidden).to(device, dtype)
        bank = torch.nn.functional.normalize(self.randn(VECTORS, hidden), dim=1)
        slots, entries = 4, 14
        fields, numbers = zip(*(self._entry(i) for i in range(entries)), strict=True)
        ranges = [[0, 3], [3, 1], [4, 4], [8, 6]]
        depth, width = 6, max(f[Field.COUNT] for f in fields)
        self.tables = Tables(
            bank.to(device), entries_of(fields, numbers).to(device), self.integers(ranges), depth, width,
        )  # fmt: skip
        number = torch.arange(rows)
        slot = torch.where(number % 6 == 5, -1, number % slots)
        self.rows = placed(slot, number % 5 - 3, rows - 1 - number).to(device)
        self.gate_state = torch.rand(GATES, rows, generator=self.generator).lt(0.5).to(device)

    def integers(self, numbers: Any) -> Tensor:
        return torch.as_tensor(numbers).to(self.device, torch.int32)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def pick(self, *choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def copy(self, rows: Tensor | None = None) -> Tensor:
        """Rows, x if none are given, in memory of their own, laid out as they are."""
        rows = self.x if rows is None else rows
        flat = torch.empty(rows.untyped_storage().size() // rows.element_size()).to(rows)
        return flat.as_strided(rows.shape, rows.stride(), rows.storage_offset()).copy_(rows)

    def _rows(self, rows: int, hidden: int, dtype: torch.dtype, unaligned: bool) -> Tensor:
        """Rows at a distance; unaligned ones start one element after a 16-byte boundary."""
        stride = hidden + (3 if unaligned else 16)
        flat = self.randn(rows * stride + 1).to(self.device, dtype)
        return flat.as_strided((rows, hidden), (stride, 1), int(unaligned))

    def _entry(self, i: int) -> tuple[list[int], list[float]]:
        kind = ACTING[i % len(ACTING)] if i < 10 else self.pick(*EntryKind)
        count = VECTORS_OF.get(kind)
        if count is None:
            count = self.pick(*self.counts)
        row = [0] * 12
        row[Field.KIND], row[Field.COUNT] = int(kind), count
        row[Field.VECTOR] = int(torch.randint(VECTORS - count + 1, (), generator=self.generator))
        row[Field.POSITION_LOW], row[Field.POSITION_HIGH] = self.pick((-(2**31), 2**31 - 1), (-2, 2), (0, 1))
        row[Field.GATE_MODE] = self.pick(*(int(GateMode.NONE),) * 4, 1, -1, 2, -2, int(GateMode.LATCHED))
        row[Field.GATE_VECTOR] = int(torch.randint(VECTORS, (), generator=self.generator))
        row[Field.GATE_STATE] = self.pick(*range(GATES))
        row[Field.KEEP_NORM] = self.pick(0, 0, 1)
        row[Field.PROBE] = self.pick(-1, -1, *range(COLUMNS))
        a, b = {
            EntryKind.ADD: (self.pick(1.5, -2.0, 0.0), 0.0),
            EntryKind.ABLATE: (self.pick(1.0, 2.0, 0.3), 0.0),
            EntryKind.CLAMP: (-0.25, self.pick(0.5, float("inf"))),
            EntryKind.ROTATE: (0.6, -0.8),
            EntryKind.ROTATE_RELATIVE: (0.6, 0.8),
        }.get(kind, (0.0, 0.0))
        return row, [a, b, float(self.randn(())) * 0.1]


def check_close(found: Tensor, exact: Tensor, plain: Tensor, size: Tensor, what: str) -> None:
    """|found - fp64| <= 2 |plain PyTorch - fp64| + one rounding of the row's largest element + what fp32 sums of a row
    of this size may lose."""
    ours, theirs = ((t.double() - exact).abs().amax(1) for t in (found, plain))
    floor = torch.finfo(found.dtype).eps * exact.abs().amax(1) + 8 * torch.finfo(torch.float32).eps * size
    assert not found.isnan().any(), f"{what}: NaN"
    assert (ours <= 2 * theirs + floor).all(), (
        f"{what}: {ours.tolist()}, PyTorch {theirs.tolist()}, floor {floor.tolist()}"
    )


def check_all(case: Case, op: Operators) -> None:
    """Every row operator against the reference in fp64 and in the rows' dtype, and against each other."""
    x, residual, n = case.x, case.residual, case.x.shape[0]
    arguments = case.tables, case.rows, case.gate_state

    def check(found: Tensor, probe: Tensor, s: Tensor, what: str) -> None:
        exact_probe = torch.zeros(n, COLUMNS, dtype=torch.float64, device=s.device)
        exact, plain = reference.steer(s.double(), *arguments, exact_probe), reference.steer(s, *arguments)
        size = s.double().norm(dim=1)
        check_close(found, exact, plain, size, what)
        # Entries of many vectors, which are not orthogonal here, can make a row much larger before it is probed.
        largest = torch.maximum(size, exact_probe.abs().amax(1)).unsqueeze(1)
        assert ((probe - exact_probe).abs() <= 1e-5 * largest).all(), f"{what}: probe"
        same = (exact == s.double()).all(1)
        assert torch.equal(bits(found[same]), bits(s[same])), f"{what}: a row that nothing acts on changed"

    found, probe = op.steer(x, COLUMNS)
    check(found, probe, x, "steer")
    added, probe = op.add_steer(x, residual, COLUMNS)
    check(added, probe, x + residual, "add_steer")
    pair, same = (case.copy(x), case.copy(residual)), (x.clone(), residual.clone())
    pair_probe, same_probe = (torch.full_like(probe, 7.0) for _ in range(2))
    op.steer_pair_(*pair, pair_probe)
    reference.steer_pair_(*same, *arguments, same_probe)
    acted, probed = ~same[0].any(1), (same_probe != 7).all(1, keepdim=True)
    for ours, steered, before in zip(pair, (torch.zeros_like(added), added), (x, residual), strict=True):
        assert torch.equal(bits(ours), torch.where(acted.unsqueeze(1), bits(steered), bits(before))), "steer_pair_"
    assert torch.equal(pair_probe, torch.where(probed, probe, 7.0)), "steer_pair_: probe"
    other = torch.float32 if x.dtype != torch.float32 else torch.bfloat16
    for weight, norm in (
        (case.weight, (1e-6, 0.0, False)),
        (case.weight, (1e-6, 1.0, True)),
        (case.weight.to(other), (1e-5, 0.0, False)),
    ):
        normed, hidden, again = op.add_steer_rmsnorm(x, residual, weight, norm, COLUMNS)
        assert torch.equal(bits(hidden), bits(added)) and torch.equal(again, probe), "not what add_steer gives"
        exact = reference.rmsnorm(hidden.double(), weight.double(), *norm)
        plain = reference.rmsnorm(hidden, weight, *norm)
        check_close(normed, exact, plain, exact.abs().amax(1), f"rmsnorm {norm}")
