"""The CUDA kernels' logic without a GPU: the sources of csrc/cuda, run on the host by an emulator (emulation.py),
against the reference."""

from __future__ import annotations

import ctypes
import mmap

import emulation
import pytest
import torch
from emulation import Emulated
from torch import Tensor

from faststeer.ops import reference
from faststeer.ops.tables import Field, GateMode, Kind, Rows, Scalar, Tables

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no g++ that knows _Float16 (12 or later)")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HIDDEN = (64, 111, 896, 2048, 3584, 4096, 8192, 16384)
FEW, MANY = 132, 1  # multiprocessors: with 132 a handful of rows is few, with 1 it is many
COLUMNS, VECTORS, GATES = 5, 44, 3
ACTING = [Kind.ADD, Kind.ABLATE, Kind.PROJECT, Kind.CLAMP, Kind.ROTATE, Kind.ROTATE_RELATIVE]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


class Case:
    """Random rows and tables. The bank is of unit vectors, the entries of every kind, gate, window and count."""

    def __init__(self, hidden: int, dtype: torch.dtype, rows: int, seed: int, *, unaligned: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.residual = (self._rows(rows, hidden, dtype, unaligned) for _ in range(2))
        self.weight = self.randn(hidden).to(dtype)
        bank = torch.nn.functional.normalize(self.randn(VECTORS, hidden), dim=1)
        slots, entries = 4, 14
        fields, scalars = zip(*(self._entry(i) for i in range(entries)), strict=True)
        first = [0, 3, 4, 8]
        ranges = [[at, n] for at, n in zip(first, (3, 1, 4, 6), strict=True)]
        depth, width = 6, max(f[Field.COUNT] for f in fields)
        self.tables = Tables(
            bank, torch.tensor(fields, dtype=torch.int32), torch.tensor(scalars),
            torch.tensor(ranges, dtype=torch.int32), depth, width,
        )  # fmt: skip
        number = torch.arange(rows)
        slot = torch.where(number % 6 == 5, -1, number % slots).int()
        self.rows = Rows(slot, (number % 5 - 3).int(), (rows - 1 - number).int())
        self.gate_state = torch.rand(GATES, rows, generator=self.generator) < 0.5

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def pick(self, *choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def copy(self) -> Tensor:
        """x in memory of its own, laid out like it."""
        x = self.x
        flat = torch.empty(x.untyped_storage().size() // x.element_size(), dtype=x.dtype)
        return flat.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)

    def _rows(self, rows: int, hidden: int, dtype: torch.dtype, unaligned: bool) -> Tensor:
        """Rows at a distance; unaligned ones start one element after a 16-byte boundary."""
        stride = hidden + (3 if unaligned else 16)
        return self.randn(rows * stride + 1).to(dtype).as_strided((rows, hidden), (stride, 1), int(unaligned))

    def _entry(self, i: int) -> tuple[list[int], list[float]]:
        kind = ACTING[i % len(ACTING)] if i < 10 else self.pick(*Kind)
        count = {Kind.ADD: 1, Kind.CLAMP: 1, Kind.ROTATE: 2, Kind.ROTATE_RELATIVE: 2}.get(kind)
        if count is None:
            count = self.pick(1, 1, 2, 3, 5, 16, 17, 35)
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
            Kind.ADD: (self.pick(1.5, -2.0, 0.0), 0.0),
            Kind.ABLATE: (self.pick(1.0, 2.0, 0.3), 0.0),
            Kind.CLAMP: (-0.25, self.pick(0.5, float("inf"))),
            Kind.ROTATE: (0.6, -0.8),
            Kind.ROTATE_RELATIVE: (0.6, 0.8),
        }.get(kind, (0.0, 0.0))
        return row, [a, b, float(self.randn(())) * 0.1, 0.0]


def check_close(found: Tensor, exact: Tensor, plain: Tensor, size: Tensor, what: str) -> None:
    """|found - fp64| <= 2 |plain PyTorch - fp64| + one rounding of the row's largest element + what fp32 sums of a row
    of this size may lose."""
    ours, theirs = ((t.double() - exact).abs().amax(1) for t in (found, plain))
    floor = torch.finfo(found.dtype).eps * exact.abs().amax(1) + 8 * torch.finfo(torch.float32).eps * size
    assert not found.isnan().any(), f"{what}: NaN"
    assert (ours <= 2 * theirs + floor).all(), (
        f"{what}: {ours.tolist()}, PyTorch {theirs.tolist()}, floor {floor.tolist()}"
    )


def check_all(case: Case, sm_count: int) -> None:
    """Every row operator against the reference in fp64 and in the rows' dtype, and against each other."""
    op = Emulated(case.tables, case.rows, case.gate_state, sm_count)
    x, residual, n = case.x, case.residual, case.x.shape[0]
    arguments = case.tables, case.rows, case.gate_state

    def expected(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact_probe = torch.zeros(n, COLUMNS, dtype=torch.float64)
        exact = reference.steer(s.double(), *arguments, exact_probe)
        return exact, reference.steer(s, *arguments), exact_probe

    def check(found: Tensor, probe: Tensor, s: Tensor, what: str) -> None:
        exact, plain, exact_probe = expected(s)
        size = s.double().norm(dim=1)
        check_close(found, exact, plain, size, what)
        assert ((probe - exact_probe).abs() <= 1e-5 * size.unsqueeze(1)).all(), f"{what}: probe"
        same = (plain == s).all(1)
        assert torch.equal(bits(found[same]), bits(s[same])), f"{what}: a row that nothing acts on changed"

    found, probe = op.steer(x, COLUMNS)
    check(found, probe, x, "steer")
    written = (
        x.clone() if x.is_contiguous() else x.as_strided(x.shape, x.stride()).clone(memory_format=torch.preserve_format)
    )
    seen = torch.zeros(n, COLUMNS)
    op.steer_(written, seen)
    assert torch.equal(bits(written), bits(found)) and torch.equal(seen, probe), "steer_ differs from steer"

    added, probe = op.add_steer(x, residual, COLUMNS)
    check(added, probe, x + residual, "add_steer")
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


def test_every_launch_configuration_covers_its_row():
    """And what the heuristic may choose is what launch.cuh has kernels for."""
    for rows in (1, 132, 133, 16384):
        for itemsize in (2, 4):
            for hidden in range(1, 16385):
                for aligned in (True, False):
                    threads, per_block, elements, vectors = emulation.choose(rows, hidden, itemsize, aligned, 132)
                    assert threads % 32 == 0 and 32 <= threads <= 512
                    assert threads * elements * vectors >= hidden > (threads - 32) * elements * vectors
                    assert per_block == 1 or threads == 32
                    assert elements in (1, 16 // itemsize) and hidden % elements == 0
                    assert elements * vectors in ((8, 32) if elements == 1 else (8, 16, 32))


# What the heuristic chooses is covered by these; `full` takes every combination.
NORMAL = {
    (64, "bf16", FEW, False), (64, "fp16", MANY, True), (111, "fp32", MANY, False), (111, "bf16", FEW, True),
    (896, "bf16", MANY, False), (896, "fp32", MANY, False), (896, "fp16", MANY, True), (2048, "bf16", MANY, False),
    (2048, "fp32", FEW, False), (3584, "fp16", FEW, False), (3584, "fp32", MANY, False), (3584, "bf16", MANY, True),
    (4096, "bf16", FEW, False), (4096, "bf16", FEW, True), (8192, "fp32", FEW, False), (8192, "bf16", FEW, False),
}  # fmt: skip


def _grid():
    for hidden in (*HIDDEN, 1, 7, 256, 512, 1000, 1032):
        for dtype in DTYPES:
            for sm_count in (FEW, MANY):
                for unaligned in (False, True):
                    normal = (hidden, dtype, sm_count, unaligned) in NORMAL
                    name = f"{hidden}-{dtype}-{'few' if sm_count == FEW else 'many'}-{'un' if unaligned else ''}aligned"
                    marks = [] if normal else [pytest.mark.full]
                    yield pytest.param(hidden, dtype, sm_count, unaligned, id=name, marks=marks)


@pytest.mark.parametrize(("hidden", "dtype", "sm_count", "unaligned"), list(_grid()))
def test_agrees_with_the_reference(hidden, dtype, sm_count, unaligned):
    case = Case(hidden, DTYPES[dtype], rows=9, seed=hidden, unaligned=unaligned)
    check_all(case, sm_count)


@pytest.mark.parametrize("seed", range(6))
def test_random_entries(seed):
    """Other entries than the grid's, on small rows, which are quick."""
    for dtype in DTYPES.values():
        for hidden, sm_count in ((40, FEW), (300, MANY), (333, FEW), (1000, FEW)):
            check_all(Case(hidden, dtype, rows=13, seed=seed, unaligned=seed % 3 == 2), sm_count)


def test_no_order_of_the_warps_changes_a_bit():
    case = Case(2048, torch.bfloat16, rows=7, seed=1)
    op = Emulated(case.tables, case.rows, case.gate_state, MANY)
    results = []
    for number in range(5):
        emulation.seed(number)
        results.append(op.add_steer_rmsnorm(case.x, case.residual, case.weight, (1e-6, 0.0, False), COLUMNS))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("sm_count", [FEW, MANY])
def test_a_row_in_a_batch_is_that_row_alone(sm_count):
    case = Case(896, torch.bfloat16, rows=10, seed=2)
    together, _ = Emulated(case.tables, case.rows, case.gate_state, sm_count).steer(case.x, COLUMNS)
    for i in range(10):
        twice = [i, i]  # two rows are many for one multiprocessor, one is not
        rows = Rows(*(t[twice].contiguous() for t in case.rows))
        alone, _ = Emulated(case.tables, rows, case.gate_state, sm_count).steer(case.x[twice], COLUMNS)
        assert torch.equal(bits(alone), bits(together[twice]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_is_the_hand_written_hook_bit_for_bit(dtype):
    case = Case(896, DTYPES[dtype], rows=4, seed=3)
    fields = torch.zeros(1, 12, dtype=torch.int32)
    fields[0, Field.COUNT], fields[0, Field.POSITION_LOW], fields[0, Field.POSITION_HIGH] = 1, -100, 100
    fields[0, Field.PROBE] = -1
    scalars = torch.tensor([[1.7, 0.0, 0.0, 0.0]])
    tables = Tables(case.tables.bank, fields, scalars, torch.tensor([[0, 1]], dtype=torch.int32), 1, 1)
    rows = Rows(torch.zeros(4, dtype=torch.int32), case.rows.position, case.rows.sequence)
    found, _ = Emulated(tables, rows, None).steer(case.x, 0)
    by_hand = (case.x.float() + scalars[0, Scalar.A] * case.tables.bank[0]).to(case.x.dtype)
    assert torch.equal(bits(found), bits(by_hand))


def test_a_row_that_nothing_acts_on_keeps_the_bits_of_a_nan():
    case = Case(64, torch.bfloat16, rows=8, seed=4)
    x = case.x.contiguous()
    bits(x)[:, 5] = 0x7FA1
    fields = case.tables.fields.clone()
    fields[:, Field.POSITION_LOW] = fields[:, Field.POSITION_HIGH] = 50
    fields[:, Field.PROBE] = -1
    op = Emulated(case.tables._replace(fields=fields), case.rows, case.gate_state)
    found, probe = op.steer(x, COLUMNS)
    assert torch.equal(bits(found), bits(x)) and not probe.any()


def test_in_place_writes_only_the_rows_and_the_probed_columns():
    case = Case(111, torch.float16, rows=9, seed=5, unaligned=True)
    flat = case.x.as_strided((case.x.untyped_storage().size() // 2,), (1,), 0)
    before = flat.clone()
    op = Emulated(case.tables, case.rows, case.gate_state)
    probe = torch.full((9, COLUMNS), float("nan"))
    op.steer_(case.x, probe)
    outside = torch.ones_like(flat, dtype=torch.bool)
    outside.as_strided(case.x.shape, case.x.stride(), 1).fill_(False)
    assert torch.equal(bits(flat[outside]), bits(before[outside]))
    expected = torch.full((9, COLUMNS), float("nan"), dtype=torch.float64)
    rows = before.as_strided(case.x.shape, case.x.stride(), 1)
    reference.steer(rows.double(), case.tables, case.rows, case.gate_state, expected)
    assert torch.equal(probe.isnan(), expected.isnan())
    op.steer_(case.x, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_latch(dtype, seed):
    case = Case(200, DTYPES[dtype], rows=75, seed=seed)
    fields = case.tables.fields.clone()
    fields[::2, Field.KIND] = int(Kind.LATCH)
    fields[::2, Field.GATE_MODE] = torch.tensor([1, -1, 2, -2, 0, 3, 1], dtype=torch.int32)
    tables = case.tables._replace(fields=fields)
    position = torch.where(torch.arange(75) % 3 == 0, -1, 0).int()
    position[32:64] = 4  # a whole block of rows without one
    rows = case.rows._replace(position=position)
    for residual in (None, case.residual):
        expected, found = case.gate_state.clone(), case.gate_state.clone()
        reference.latch(case.x if residual is None else case.x + residual, tables, rows, expected)
        Emulated(tables, rows, None).latch_(case.x, residual, found)
        # Two entries of a slot may share a gate; the reference opens it if either does, a later one overrules here.
        gates = fields[:, Field.GATE_STATE]
        shared = torch.zeros_like(expected)
        for slot, (first, n) in enumerate(tables.ranges.tolist()):
            own = [int(gates[i]) for i in range(first, first + n) if fields[i, Field.KIND] == int(Kind.LATCH)]
            for gate in {g for g in own if own.count(g) > 1}:
                shared[gate, rows.sequence[rows.slot == slot].long()] = True
        assert torch.equal(found[~shared], expected[~shared])
        assert not torch.equal(found, case.gate_state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_add(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 503, generator=generator).to(DTYPES[dtype])[:, :500]
    offsets = torch.tensor([0, 3, 3, 300], dtype=torch.int32)
    indices = torch.cat([torch.randperm(500, generator=generator)[:n] for n in (3, 297)]).int()
    indices[-2:] = torch.tensor([4000, -1])  # outside the row
    values = torch.randn(300, generator=generator)
    vector = torch.tensor([0, 1, 2, -1, 2, 0, 7, 2, -(2**31)], dtype=torch.int32)
    coefficient = torch.randn(9, generator=generator)
    coefficient[7] = 0
    expected = reference.sparse_add(x, indices, values, offsets, vector, coefficient)
    found = x.clone()
    emulation.sparse_add_(found, indices, values, offsets, vector, coefficient)
    assert torch.equal(bits(found), bits(expected)) and not torch.equal(found, x)
    offsets = torch.tensor([-5, 2**31 - 1, -9, 300], dtype=torch.int32)
    emulation.sparse_add_(found, *(fenced(t) for t in (indices, values, offsets, vector, coefficient)))


def fenced(tensor: Tensor) -> Tensor:
    """A copy between memory that must not be touched: reading beyond its end is a crash, reading before its start soon
    is."""
    size = tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + mmap.PAGESIZE + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), mmap.PAGESIZE, mmap.PROT_NONE) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=mmap.PAGESIZE + room - size)
    return copy.view(tensor.shape).copy_(tensor)


HOSTILE = [-(2**31), -7, -1, 0, 1, 2, 3, 6, 9, 1000, 2**31 - 1]


@pytest.mark.parametrize("sm_count", [FEW, MANY])
@pytest.mark.parametrize("seed", range(8))
def test_wrong_indices_stay_inside_and_agree_with_the_reference(seed, sm_count):
    hidden = (64, 70)[seed % 2]
    case = Case(hidden, torch.float32, rows=20, seed=100 + seed)
    generator = torch.Generator().manual_seed(seed)
    fields, ranges, slot, sequence = (t.clone() for t in (case.tables.fields, case.tables.ranges, *case.rows[::2]))
    fields[:, Field.KEEP_NORM] = 0  # a row of zeros but for rounding would be blown up
    for table, share in ((fields, 0.08), (ranges, 0.1), (slot, 0.2), (sequence, 0.2)):
        pick = torch.rand(table.shape, generator=generator) < share
        table[pick] = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (int(pick.sum()),), generator=generator)].int()
    x, gate_state = fenced(case.x), fenced(case.gate_state)
    tables = Tables(*(fenced(t) for t in (case.tables.bank, fields, case.tables.scalars, ranges)), len(fields), VECTORS)
    rows = Rows(*(fenced(t) for t in (slot, case.rows.position, sequence)))
    op = Emulated(tables, rows, gate_state, sm_count)
    exact_probe = torch.zeros(20, COLUMNS, dtype=torch.float64)
    exact = reference.steer(x.double(), tables, rows, gate_state, exact_probe)
    found, probe = op.steer(x, COLUMNS)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probe.double(), exact_probe, rtol=1e-4, atol=1e-4)
    Emulated(tables, rows, None, sm_count).steer(x, COLUMNS)
    op.latch_(x, None, gate_state)
