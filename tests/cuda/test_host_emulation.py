"""The CUDA kernels' logic without a GPU: the sources of csrc/cuda, run on the host by an emulator (emulation.py),
against the reference."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import emulation
import pytest
import torch
from emulation import Emulated
from placing import entries_of, moved
from random_tables import COLUMNS, DTYPES, HIDDEN, VECTORS, Case, bits, check_all, check_close
from torch import Tensor

from faststeer import ops
from faststeer.ops import reference
from faststeer.ops.tables import EntryKind, Field, Tables

sys.path.append(str(Path(__file__).parents[1] / "ops"))
import backend_cases

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no g++ that knows _Float16 (12 or later)")

FEW, MANY = 132, 1  # multiprocessors: with 132 a handful of rows is few, with 1 it is many


def emulated(case: Case, sm_count: int) -> Emulated:
    return Emulated(case.tables, case.rows, case.gate_state, sm_count)


def test_every_launch_configuration_covers_its_row():
    """And what the heuristic may choose is what launch.cu has kernels for."""
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


@pytest.mark.parametrize("asked", [8, 16, 32])
def test_columns_that_are_asked_for(asked):
    """They take the place of the rule's; a row is covered, or would need more threads than a block has."""
    assert emulation.columns_of(str(asked)) == asked
    for rows, itemsize, hidden in ((1, 2, 4096), (16384, 2, 4096), (1, 4, 64), (16384, 4, 111), (16384, 2, 16384)):
        for aligned in (True, False):
            threads, per_block, elements, vectors = emulation.choose(rows, hidden, itemsize, aligned, 132, asked)
            columns = elements * vectors
            assert columns == (32 if asked == 16 and elements == 1 else asked)
            assert threads * columns >= hidden > (threads - 32) * columns
            assert per_block == 1 or threads == 32
            assert threads <= 512 or hidden > 512 * asked


@pytest.mark.parametrize("asked", [8, 16, 32])
@pytest.mark.parametrize(("hidden", "dtype"), [(2048, "bf16"), (896, "fp32")])
def test_columns_that_are_asked_for_agree_with_the_reference(hidden, dtype, asked):
    case = Case(hidden, DTYPES[dtype], rows=5, seed=asked)
    check_all(case, Emulated(case.tables, case.rows, case.gate_state, MANY, asked))


def test_no_other_columns_are_taken():
    assert emulation.columns_of(None) == emulation.columns_of("") == 0
    for text in ("0", "4", "12", "64", "-8", "8 ", "8x", "eight", "99999999999", " "):
        assert emulation.columns_of(text) == -1, text


# What the heuristic chooses is covered by these; `full` takes every combination.
NORMAL = {
    (64, "bf16", FEW, False), (64, "fp16", MANY, True), (111, "fp32", MANY, False),
    (111, "bf16", FEW, True), (896, "bf16", MANY, False), (896, "fp32", MANY, False),
    (896, "fp16", MANY, True), (2048, "bf16", MANY, False), (2048, "fp32", FEW, False),
    (3584, "fp16", FEW, False), (3584, "fp32", MANY, False), (3584, "bf16", MANY, True),
    (4096, "bf16", FEW, False), (4096, "bf16", FEW, True), (4096, "bf16", MANY, False),
    (8192, "fp16", MANY, False), (8192, "fp32", FEW, False), (8192, "bf16", FEW, False),
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
    check_all(case, emulated(case, sm_count))


@pytest.mark.parametrize("seed", range(6))
def test_random_entries(seed):
    """Other entries than the grid's, on small rows, which are quick."""
    for dtype in DTYPES.values():
        for hidden, sm_count in ((40, FEW), (300, MANY), (333, FEW), (1000, FEW)):
            case = Case(hidden, dtype, rows=13, seed=seed, unaligned=seed % 3 == 2)
            check_all(case, emulated(case, sm_count))


class Backend:
    """The functions of faststeer.ops that backend_cases.py calls, run by the emulator."""

    def __init__(self, sm_count: int) -> None:
        self.sm_count = sm_count

    def _op(self, tables: Tables, rows: Tensor, gate_state: Tensor | None) -> Emulated:
        return Emulated(tables, rows, gate_state, self.sm_count)

    def steer(self, x, tables, rows, gate_state, probe=None, *, backend):
        hidden, seen = self._op(tables, rows, gate_state).steer(x, 0 if probe is None else probe.shape[1])
        if probe is not None:
            probe.copy_(seen)
        return hidden

    def add_steer(self, x, residual, tables, rows, gate_state, probe=None, *, backend):
        hidden, seen = self._op(tables, rows, gate_state).add_steer(x, residual, 0 if probe is None else probe.shape[1])
        if probe is not None:
            probe.copy_(seen)
        return hidden

    def steer_pair_(self, x, residual, tables, rows, gate_state, probe=None, *, backend):
        self._op(tables, rows, gate_state).steer_pair_(x, residual, probe)

    def add_steer_rmsnorm(self, x, residual, weight, eps, offset, fp32_weight, tables, rows, gate_state, *, backend):
        op, norm = self._op(tables, rows, gate_state), (eps, offset, fp32_weight)
        return op.add_steer_rmsnorm(x, residual, weight, norm, 0)[:2]


MIXES = [["Add", "Ablate"], ["Ablate3", "Clamp", "Probe"], list(backend_cases.KINDS[:8]), ["Project", "Add"], []]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "sm_count"), [(64, MANY), (111, FEW), (896, MANY), (2048, FEW)])
def test_plans_as_for_every_back_end(monkeypatch, hidden, sm_count, dtype):
    """The cases and the bound that hold the other back ends to the reference (tests/ops/test_backends.py)."""
    backend = Backend(sm_count)
    for name in ("steer", "add_steer", "steer_pair_", "add_steer_rmsnorm"):
        monkeypatch.setattr(ops, name, getattr(backend, name))
    for kinds, rows in ((MIXES, 7), *(([[kind]], 3) for kind in backend_cases.KINDS)):
        case = backend_cases.steered(kinds, rows, hidden, DTYPES[dtype], "cpu", seed=rows)
        backend_cases.check_ops(case, "cuda")


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
        alone, _ = Emulated(case.tables, case.rows[:, twice], case.gate_state, sm_count).steer(case.x[twice], COLUMNS)
        assert torch.equal(bits(alone), bits(together[twice]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_is_the_hand_written_hook_bit_for_bit(dtype):
    case = Case(896, DTYPES[dtype], rows=4, seed=3)
    entries = entries_of([[0] * 12], [(1.7, 0.0, 0.0)])
    entries[0, Field.COUNT], entries[0, Field.POSITION_LOW], entries[0, Field.POSITION_HIGH] = 1, -100, 100
    entries[0, Field.PROBE] = -1
    tables = Tables(case.tables.bank, entries, torch.tensor([[0, 1]], dtype=torch.int32), 1, 1)
    found, _ = Emulated(tables, moved(case.rows, slot=0), None).steer(case.x, 0)
    by_hand = (case.x.float() + torch.tensor(1.7) * case.tables.bank[0]).to(case.x.dtype)
    assert torch.equal(bits(found), bits(by_hand))


def test_a_row_that_nothing_acts_on_keeps_the_bits_of_a_nan():
    case = Case(64, torch.bfloat16, rows=8, seed=4)
    x = case.x.contiguous()
    bits(x)[:, 5] = 0x7FA1
    entries = case.tables.entries.clone()
    entries[:, Field.POSITION_LOW] = entries[:, Field.POSITION_HIGH] = 50
    entries[:, Field.PROBE] = -1
    op = Emulated(case.tables._replace(entries=entries), case.rows, case.gate_state)
    found, probe = op.steer(x, COLUMNS)
    assert torch.equal(bits(found), bits(x)) and not probe.any()
    pair = x.clone(), x.clone()
    op.steer_pair_(*pair, None)
    assert all(torch.equal(bits(rows), bits(x)) for rows in pair)


def test_a_pair_writes_only_its_rows_and_their_probes():
    """Of strides that differ, and of buffers that have room for more than x's rows."""
    case = Case(111, torch.float16, rows=9, seed=5, unaligned=True)
    hidden, wide = 111, [torch.full((9, width), 3.0, dtype=torch.float16) for width in (160, 200)]
    pair = wide[0][:, 3 : 3 + hidden].copy_(case.x), wide[1][:, 8 : 8 + hidden].copy_(case.residual)
    expected, found = (torch.full((12, COLUMNS), 7.0) for _ in range(2))
    rows = torch.cat([case.rows, case.rows[:, :3]], 1)
    same = case.x.clone(), case.residual.clone()
    reference.steer_pair_(*same, case.tables, rows, case.gate_state, expected)
    Emulated(case.tables, rows, case.gate_state).steer_pair_(*pair, found)
    for ours, theirs in zip(pair, same, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        assert torch.equal((bits(ours) == 0).all(1), (bits(theirs) == 0).all(1))
        ours.fill_(3.0)
    assert all((w == 3).all() for w in wide), "written outside the rows"
    assert torch.equal(found == 7, expected == 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_latch(dtype, seed):
    case = Case(200, DTYPES[dtype], rows=75, seed=seed)
    entries = case.tables.entries.clone()
    entries[::2, Field.KIND] = int(EntryKind.LATCH)
    entries[::2, Field.GATE_MODE] = torch.tensor([1, -1, 2, -2, 0, 3, 1], dtype=torch.int32)
    tables = case.tables._replace(entries=entries)
    position = torch.where(torch.arange(75) % 3 == 0, -1, 0).int()
    position[32:64] = 4  # a whole block of rows without one
    rows = moved(case.rows, position=position)
    for residual in (None, case.residual):
        expected, found = case.gate_state.clone(), case.gate_state.clone()
        reference.latch_(case.x, residual, tables, rows, expected)
        Emulated(tables, rows, None).latch_(case.x, residual, found)
        assert torch.equal(found, expected)
        assert not torch.equal(found, case.gate_state)


PROT_NONE = 0  # of mprotect, which mmap has from Python 3.13 on


def fenced(tensor: Tensor) -> Tensor:
    """A copy between memory that must not be touched: reading beyond its end is a crash, reading before its start soon
    is."""
    size = tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + mmap.PAGESIZE + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), mmap.PAGESIZE, PROT_NONE) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=mmap.PAGESIZE + room - size)
    return copy.view(tensor.shape).copy_(tensor)


HOSTILE = [-(2**31), -7, -1, 0, 1, 2, 3, 6, 9, 1000, 2**31 - 1]


@pytest.mark.parametrize("sm_count", [FEW, MANY])
@pytest.mark.parametrize("seed", range(8))
def test_wrong_indices_stay_inside_and_agree_with_the_reference(seed, sm_count):
    hidden = (64, 70)[seed % 2]
    case = Case(hidden, torch.float32, rows=20, seed=100 + seed)
    generator = torch.Generator().manual_seed(seed)
    entries, ranges, rows = (t.clone() for t in (case.tables.entries, case.tables.ranges, case.rows))
    entries[:, Field.KEEP_NORM] = 0  # a row of zeros but for rounding would be blown up
    for table, share in ((entries[:, : Field.A], 0.08), (ranges, 0.1), (rows[0], 0.2), (rows[2], 0.2)):
        pick = torch.rand(table.shape, generator=generator) < share
        table[pick] = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (int(pick.sum()),), generator=generator)].int()
    x, gate_state = fenced(case.x), fenced(case.gate_state)
    tables = Tables(*(fenced(t) for t in (case.tables.bank, entries, ranges)), len(entries), VECTORS)
    rows = fenced(rows)
    op = Emulated(tables, rows, gate_state, sm_count)
    exact_probe = torch.zeros(20, COLUMNS, dtype=torch.float64)
    exact = reference.steer(x.double(), tables, rows, gate_state, exact_probe)
    found, probe = op.steer(x, COLUMNS)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probe.double(), exact_probe, rtol=1e-4, atol=1e-4)
    Emulated(tables, rows, None, sm_count).steer(x, COLUMNS)
    pair, seen = (fenced(case.x), fenced(case.residual)), fenced(torch.full((20, COLUMNS), 7.0))
    same, expected = (case.x.clone(), case.residual.clone()), torch.full((20, COLUMNS), 7.0)
    reference.steer_pair_(*same, tables, rows, gate_state, expected)
    op.steer_pair_(*pair, seen)
    for ours, theirs in zip((*pair, seen), (*same, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    op.latch_(x, None, gate_state)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_range_leads_outside(dtype):
    """Every pair of hostile numbers, among them those whose sum is no int32."""
    pairs = [(first, count) for first in HOSTILE for count in (*HOSTILE, -(2**31) + 5, -(2**31) + 1000)]
    case = Case(64, DTYPES[dtype], rows=len(pairs), seed=9)
    ranges = torch.tensor(pairs, dtype=torch.int32)
    entries = fenced(case.tables.entries)
    tables = case.tables._replace(ranges=fenced(ranges), entries=entries, depth=len(entries))
    rows = moved(case.rows, slot=torch.arange(len(pairs)))
    op = Emulated(tables, rows, case.gate_state)
    exact = reference.steer(case.x.double(), tables, rows, case.gate_state)
    plain = reference.steer(case.x, tables, rows, case.gate_state)
    check_close(op.steer(case.x, 0)[0], exact, plain, case.x.double().norm(dim=1), "steer")
    idle = [i for i, (first, count) in enumerate(pairs) if min(first + count, 14) <= max(first, 0)]
    assert torch.equal(bits(op.add_steer(case.x, case.residual, 0)[0][idle]), bits((case.x + case.residual)[idle]))
    op.latch_(case.x, None, case.gate_state)
