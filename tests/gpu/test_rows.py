"""Which rows an op touches and which bits they get: alone and in a batch, strided and unaligned, untouched, more than
2^31 elements, and under tables that point anywhere."""

from __future__ import annotations

import pytest
import torch
from backend_cases import bits, check_close, steered
from device import CUDA, DEVICE, DTYPES, MARKS, needs_device
from placing import entries_of, moved, numbers_of
from torch import Tensor

from faststeer import ops
from faststeer.ops.tables import EntryKind, Field, GateMode, Tables

pytestmark = MARKS

MIXES = [["Add", "Ablate"], ["Ablate3", "Clamp", "Probe"], ["Rotate", "KeepNorm"], ["Project", "Add"], []]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@EVERY_DTYPE
@pytest.mark.parametrize("hidden", [111, 896, 4096] if CUDA else [111])
def test_a_row_in_a_batch_is_that_row_alone_bit_for_bit(kernels, dtype, hidden):
    case = steered(MIXES, 33 if CUDA else 7, hidden, DTYPES[dtype], DEVICE, seed=3)
    arguments = case.weight, 1e-6, 0.0, False
    whole = ops.add_steer_rmsnorm(
        case.x, case.residual, *arguments, case.tables, case.rows, case.gate_state, backend=kernels
    )
    for i in range(len(case.x)):
        alone = ops.add_steer_rmsnorm(
            case.x[i : i + 1], case.residual[i : i + 1], *arguments, case.tables, case.rows[:, i : i + 1],
            case.gate_state, backend=kernels,
        )  # fmt: skip
        for ours, all_rows in zip(alone, whole, strict=True):
            assert torch.equal(bits(ours), bits(all_rows[i : i + 1]))


@EVERY_DTYPE
@pytest.mark.parametrize("rows", [33, 600] if CUDA else [7])
def test_no_other_row_and_no_order_matters(kernels, dtype, rows):
    case = steered(MIXES, rows, 896, DTYPES[dtype], DEVICE, seed=4)
    found = ops.steer(case.x, case.tables, case.rows, case.gate_state, backend=kernels)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = ops.steer(case.x[order], case.tables, case.rows[:, order], case.gate_state, backend=kernels)
    assert torch.equal(bits(shuffled), bits(found[order]))


@EVERY_DTYPE
@pytest.mark.parametrize("hidden", [111, 4096] if CUDA else [111])
@pytest.mark.parametrize("rows", [1, 600] if CUDA else [7])
def test_prepared_tables_give_the_bits_of_tables(dtype, hidden, rows):
    case, backend = steered(MIXES, rows, hidden, DTYPES[dtype], DEVICE, seed=6), "cuda" if CUDA else "cpu"
    bank, entries, ranges = case.tables[:3]
    norm, tables = (case.weight, 1e-6, 0.0, False), (case.tables, case.rows, case.gate_state)
    with torch.no_grad(), ops.backend(backend):
        assert ops.takes_prepared(case.x)
        prepared = ops.prepare(bank, entries, torch.stack((ranges, ranges)), case.rows, case.gate_state, [True, True])
        assert torch.equal(bits(prepared.steer(case.x, 1)), bits(ops.steer(case.x, *tables)))
        pair = prepared.add_steer_rmsnorm(case.x, case.residual, *norm, 1)
        for one, other in zip(pair, ops.add_steer_rmsnorm(case.x, case.residual, *norm, *tables), strict=True):
            assert torch.equal(bits(one), bits(other))


@EVERY_DTYPE
@pytest.mark.parametrize("hidden", [111, 896] if CUDA else [111])
@pytest.mark.parametrize("start", [1, 3, 200])
def test_strided_and_unaligned_rows(backend, dtype, hidden, start):
    case = steered(MIXES, 13 if CUDA else 5, hidden, DTYPES[dtype], DEVICE, seed=5)
    arguments = case.tables, case.rows, case.gate_state
    expected = ops.reference.steer(case.x.double(), *arguments)
    same = ops.reference.steer(case.x, *arguments)
    wide = torch.zeros(len(case.x), hidden + 304, dtype=case.x.dtype, device=DEVICE)
    view = wide[:, start : start + hidden]
    view.copy_(case.x)
    found = ops.steer(view, *arguments, backend=backend)
    check_close(found, case, expected, same, "steer")
    wide[:, start : start + hidden] = 0
    assert not wide.any(), "written outside the rows"
    view.copy_(case.x)
    added = ops.add_steer(view, case.residual, *arguments, backend=backend)
    expected = ops.reference.steer((case.x + case.residual).double(), *arguments)
    check_close(added, case, expected, ops.reference.add_steer(case.x, case.residual, *arguments), "add_steer")
    wide[:, start : start + hidden] = 0
    view.copy_(case.x)
    written, same = case.residual.clone(), (case.x.clone(), case.residual.clone())
    ops.steer_pair_(view, written, *arguments, backend=backend)
    ops.reference.steer_pair_(*same, *arguments)
    acted = ~same[0].any(1)
    assert torch.equal(bits(view), bits(same[0])), "x of a pair"
    assert torch.equal(bits(written), bits(torch.where(acted.unsqueeze(1), added, case.residual))), "its residual"
    wide[:, start : start + hidden] = 0
    assert not wide.any(), "written outside the rows of a pair"


def test_no_rows(backend):
    case = steered(MIXES, 0, 64, torch.float32, DEVICE, seed=6)
    arguments = case.tables, case.rows, case.gate_state
    assert ops.steer(case.x, *arguments, backend=backend).shape == (0, 64)
    ops.steer_pair_(case.x, case.residual, *arguments, backend=backend)
    normed, _ = ops.add_steer_rmsnorm(case.x, case.residual, case.weight, 1e-6, 0.0, False, *arguments, backend=backend)
    assert normed.shape == (0, 64)


def one_entry(bank: Tensor, kind: EntryKind, a: float) -> Tables:
    """One slot with one entry that acts everywhere."""
    entries = entries_of([[0] * Field.A], [(a, 0.0, 0.0)])
    entries[0, Field.KIND], entries[0, Field.COUNT], entries[0, Field.PROBE] = int(kind), 1, -1
    entries[0, Field.POSITION_LOW], entries[0, Field.POSITION_HIGH] = -(2**31), 2**31 - 1
    ranges = torch.tensor([[0, 1]], dtype=torch.int32)
    return Tables(bank, entries.to(DEVICE), ranges.to(DEVICE), 1, 1)


def every_row(rows: int) -> Tensor:
    return torch.zeros(3, rows, dtype=torch.int32, device=DEVICE)


@EVERY_DTYPE
@pytest.mark.parametrize("hidden", [111, 4096] if CUDA else [111])
@pytest.mark.parametrize("rows", [4, 300] if CUDA else [4])
def test_add_is_the_hand_written_hook_bit_for_bit(backend, dtype, hidden, rows):
    """Neither compiler makes a fused multiply-add of it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, hidden, generator=generator).to(DEVICE, DTYPES[dtype])
    bank = torch.randn(1, hidden, generator=generator).to(DEVICE)
    found = ops.steer(x, one_entry(bank, EntryKind.ADD, 1.7), every_row(rows), backend=backend)
    # The product by itself, so that nothing can fuse it with the sum.
    by_hand = (x.float() + torch.tensor(1.7, device=DEVICE) * bank[0]).to(x.dtype)
    assert torch.equal(bits(found), bits(by_hand))


@EVERY_DTYPE
@pytest.mark.parametrize("hidden", [64, 111])
def test_a_row_that_nothing_acts_on_keeps_its_bits(backend, dtype, hidden):
    """Of NaN too, and of -0; and coefficient 0 does not act."""
    case = steered([["Add", "Ablate"]], 9, hidden, DTYPES[dtype], DEVICE, seed=8)
    width = case.x.element_size()
    bits(case.x)[:, 5], bits(case.x)[:, 7] = {4: 0x7FA12345, 2: 0x7FA1}[width], -(2 ** (8 * width - 1))
    nowhere = moved(case.rows, slot=-1)
    zero = one_entry(case.tables.bank[:1].contiguous(), EntryKind.ADD, 0.0)
    for tables, rows in ((case.tables, nowhere), (zero, every_row(9))):
        assert torch.equal(bits(ops.steer(case.x, tables, rows, backend=backend)), bits(case.x))
        pair = case.x.clone(), case.x.clone()
        ops.steer_pair_(*pair, tables, rows, backend=backend)
        assert all(torch.equal(bits(t), bits(case.x)) for t in pair)


@needs_device
def test_more_than_2_to_the_31_elements(kernels):
    hidden, dtype = 8192, torch.bfloat16
    rows = 2**31 // hidden + 5
    if torch.cuda.mem_get_info()[0] < 5 * rows * hidden * dtype.itemsize:
        pytest.skip("too little memory")
    x = torch.zeros(rows, hidden, dtype=dtype, device=DEVICE)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    x[some] = torch.randn(5, hidden, device=DEVICE).to(dtype)
    bank = torch.nn.functional.normalize(torch.randn(1, hidden, device=DEVICE), dim=1)
    tables = one_entry(bank, EntryKind.ABLATE, 1.0)
    expected = ops.reference.steer(x[some].double(), tables, every_row(5))
    found = ops.steer(x, tables, every_row(rows), backend=kernels)
    other = torch.zeros_like(x)
    ops.steer_pair_(x, other, tables, every_row(rows), backend=kernels)
    assert not x.any()
    for result in (other, found):
        torch.testing.assert_close(result[some].double(), expected, rtol=8e-3, atol=1e-2)
        assert int(result.count_nonzero()) <= 5 * hidden


ROOM = 4096  # elements around what must not be left
HOSTILE = [-(2**31), -7, -1, 0, 1, 2, 6, 9, 1000, 2**31 - 1]


def among_others(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy in the middle of memory of hostile numbers, and the whole of it."""
    size = tensor.numel() + 2 * ROOM
    if tensor.dtype == torch.int32:
        whole = torch.tensor(HOSTILE).repeat(size)[:size].to(tensor)
    else:
        whole = torch.full((size,), 1.0 if tensor.dtype == torch.bool else float("nan")).to(tensor)
    middle = whole[ROOM:-ROOM].view(tensor.shape)
    return middle.copy_(tensor), whole


@pytest.mark.parametrize("rows", [20, 200] if CUDA else [8])
@pytest.mark.parametrize("hidden", [64, 70])
@pytest.mark.parametrize("seed", range(12 if CUDA else 3))
def test_wrong_indices_in_tables_stay_inside_and_agree_with_the_reference(kernels, seed, hidden, rows):
    generator = torch.Generator().manual_seed(seed)
    case = steered(MIXES, rows, hidden, torch.float32, DEVICE, seed)
    values = torch.tensor(HOSTILE, dtype=torch.int64)

    def spoiled(table: Tensor, share: float) -> Tensor:
        table = table.cpu().clone()
        pick = torch.rand(table.shape, generator=generator) < share
        table[pick] = values[torch.randint(len(values), (int(pick.sum()),), generator=generator)].int()
        return among_others(table.to(DEVICE))[0]

    numbers, integers = case.tables.entries, spoiled(case.tables.entries, 0.05)
    entries = among_others(torch.cat([integers[:, : Field.A], numbers[:, Field.A :]], 1))[0]
    entries[:, Field.KEEP_NORM] = 0  # a row that is zero but for rounding would be blown up
    ranges = spoiled(case.tables.ranges, 0.1)
    tables = Tables(among_others(case.tables.bank)[0], entries, ranges, len(entries), len(case.tables.bank))
    slot, sequence = spoiled(case.rows[0], 0.2), spoiled(case.rows[2], 0.2)
    where = among_others(torch.stack((slot, case.rows[1], sequence)))[0]
    gate_state, gates = among_others(case.gate_state)
    (x, around), (probe, probes) = among_others(case.x), among_others(torch.zeros(rows, case.columns, device=DEVICE))
    expected_probe = torch.zeros_like(probe)
    expected = ops.reference.steer(x, tables, where, gate_state, expected_probe)
    before = x.clone()
    found = ops.steer(x, tables, where, gate_state, probe, backend=kernels)
    assert torch.equal(x, before)
    assert torch.equal((found != x).any(1), (expected != x).any(1)), "other rows were touched"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probe, expected_probe, rtol=1e-4, atol=1e-4)
    ops.steer(x, tables, where, None, backend=kernels)
    pair = [among_others(t) for t in (before, case.residual)]
    same = before.clone(), case.residual.clone()
    ops.steer_pair_(*(t for t, _ in pair), tables, where, gate_state, probe, backend=kernels)
    ops.reference.steer_pair_(*same, tables, where, gate_state, expected_probe)
    for (ours, whole), theirs in zip((*pair, (probe, probes)), (*same, expected_probe), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert whole[:ROOM].isnan().all() and whole[-ROOM:].isnan().all(), "a pair is written outside"
    ops.latch_(x, tables, where, gate_state, backend=kernels)
    for whole in (around, probes):
        assert whole[:ROOM].isnan().all() and whole[-ROOM:].isnan().all(), "written outside"
    assert gates[:ROOM].all() and gates[-ROOM:].all(), "written outside"


def test_no_range_leads_outside(kernels):
    """Every pair of hostile numbers, among them those whose sum is no int32."""
    counts = (*HOSTILE, -(2**31) + 5, -(2**31) + 1000)
    pairs = torch.tensor([(first, count) for first in HOSTILE for count in counts], dtype=torch.int32)
    pairs = pairs if CUDA else pairs[::7]
    case = steered(MIXES, len(pairs), 64, torch.float32, DEVICE, seed=11)
    tables = case.tables._replace(ranges=among_others(pairs.to(DEVICE))[0], depth=len(case.tables.entries))
    rows = moved(case.rows, slot=torch.arange(len(pairs)))
    exact, plain = (ops.reference.steer(x, tables, rows, case.gate_state) for x in (case.x.double(), case.x))
    check_close(ops.steer(case.x, tables, rows, case.gate_state, backend=kernels), case, exact, plain, "steer")
    ops.latch_(case.x, tables, rows, case.gate_state, backend=kernels)


@EVERY_DTYPE
@pytest.mark.parametrize("with_residual", [False, True], ids=["x", "x + residual"])
@pytest.mark.parametrize("hidden", [111, 4096] if CUDA else [111])
def test_latch(backend, dtype, with_residual, hidden):
    rows = 150 if CUDA else 12
    case = steered([["Add", "Ablate"], ["Clamp", "Add", "Ablate"]], rows, hidden, DTYPES[dtype], DEVICE, seed=9)
    fields = case.tables.entries.clone()
    number = torch.arange(len(fields), device=DEVICE)
    fields[:, Field.KIND] = torch.where(number % 3 == 2, int(EntryKind.ADD), int(EntryKind.LATCH)).int()
    modes = torch.tensor([1, 2, -2, -1, int(GateMode.NONE), int(GateMode.LATCHED)], dtype=torch.int32, device=DEVICE)
    fields[:, Field.GATE_MODE] = modes[number % len(modes)]
    fields[:, Field.GATE_VECTOR] = fields[:, Field.VECTOR]
    fields[:, Field.GATE_STATE] = (number % 5).int()  # 4 is outside
    numbers_of(fields)[:, Field.THRESHOLD] = 0.01
    tables = case.tables._replace(entries=fields)
    position = torch.where(torch.arange(rows) % 3 == 0, -1, 0).int()
    position[32:64] = 4  # a whole block of rows that decide nothing
    where = moved(case.rows, position=position)
    residual = case.residual if with_residual else None
    expected, found = case.gate_state.clone(), case.gate_state.clone()
    ops.latch_(case.x, tables, where, expected, residual=residual, backend="reference")
    ops.latch_(case.x, tables, where, found, residual=residual, backend=backend)
    assert torch.equal(found, expected)
    assert not torch.equal(found, case.gate_state)


BAD = {
    "x": lambda c: {"x": c.x.double()},
    "bank": lambda c: {"tables": c.tables._replace(bank=c.tables.bank[:, :-1].contiguous())},
    "entries": lambda c: {"tables": c.tables._replace(entries=c.tables.entries.long())},
    "ranges": lambda c: {"tables": c.tables._replace(ranges=c.tables.ranges[:, :1])},
    "rows": lambda c: {"rows": c.rows[:, 1:]},
    "rows, elsewhere": lambda c: {"rows": c.rows.cpu()},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(kernels, what):
    case = steered([["Add"]], 5, 64, torch.float32, DEVICE, seed=10)
    if what == "rows, elsewhere" and not CUDA:
        pytest.skip("dry run: there is no other device")
    before = case.x.clone()
    arguments = {"x": case.x, "tables": case.tables, "rows": case.rows} | BAD[what](case)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"\b{what.split(',')[0]}\b"):
        ops.steer(arguments["x"], arguments["tables"], arguments["rows"], backend=kernels)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"\b{what.split(',')[0]}\b"):
        residual = torch.ones_like(arguments["x"])
        ops.steer_pair_(arguments["x"], residual, arguments["tables"], arguments["rows"], backend=kernels)
    assert torch.equal(case.x, before)
