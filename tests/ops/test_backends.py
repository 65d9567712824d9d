"""Contract 3: every back end that works here agrees with the reference; bad arguments are refused by all alike."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch._dynamo.testing
from backend_cases import KINDS, bits, check_ops, steered
from placing import moved, numbers_of, placed
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from faststeer import build, ops
from faststeer.ops import dispatch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HIDDEN = (64, 111, 896, 2048, 3584, 4096, 8192, 16384)
ROWS = (1, 2, 7, 33, 199)
MIXES = [["Add", "Ablate"], ["Ablate3", "Clamp", "Probe"], list(KINDS[:8]), ["Project", "Add"], []]


@pytest.fixture(params=["cpu"])
def backend(request) -> str:
    state = ops.states()[request.param]
    if not state.works:
        pytest.fail(f"the back end {request.param} must work where the tests run: {state.reason}")
    return request.param


@pytest.fixture(params=["own", "reference"])
def both(request, backend) -> str:
    return backend if request.param == "own" else "reference"


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestContract3:
    @pytest.mark.parametrize("rows", ROWS)
    def test_mixed_plans_per_row(self, backend, dtype, rows, hidden):
        check_ops(steered(MIXES, rows, hidden, DTYPES[dtype], "cpu", seed=rows), backend)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_intervention_alone(self, backend, dtype, kind, hidden):
        check_ops(steered([[kind]], 7, hidden, DTYPES[dtype], "cpu", seed=1), backend)


class TestALibraryThatIsNotUsed:
    """`auto` says so where a library was built and another back end takes its place."""

    @pytest.fixture(autouse=True)
    def forgotten(self):
        dispatch._warn_if_unfit.cache_clear()

    def obstructed(self, monkeypatch, reason):
        state = ops.BackendState(False, reason)
        monkeypatch.setattr(dispatch, "states", lambda: {name: state for name in ("cpu", "cuda", "triton")})

    def test_of_other_sources_is_told_once_with_the_command_that_mends_it(self, monkeypatch):
        monkeypatch.setattr(build, "digest", lambda name: "other")
        self.obstructed(monkeypatch, build.obstacle("cpu"))
        with pytest.warns(UserWarning, match=r"'cpu' is not used, 'reference' .*: python -m faststeer.build cpu$"):
            assert dispatch._resolve("auto", "cpu") == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch._resolve("auto", "cpu") == "reference"

    def test_that_cannot_be_loaded_is_told(self, monkeypatch):
        self.obstructed(monkeypatch, f"{build.UNFIT[1]}: no such symbol")
        with pytest.warns(UserWarning, match="'cuda' is not used, 'reference' runs in its place: .*no such symbol"):
            dispatch._resolve("auto", "cuda")

    @pytest.mark.parametrize(("chosen", "reason"), [("auto", "not built: x"), ("reference", build.UNFIT[0])])
    def test_nothing_is_told_where_none_was_built_or_the_reference_is_chosen(self, monkeypatch, chosen, reason):
        self.obstructed(monkeypatch, reason)
        monkeypatch.setattr(dispatch, "_checked", lambda name, source: name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch._resolve(chosen, "cpu") == "reference"

    def test_the_module_beside_it_is_told_too(self, monkeypatch, backend):
        monkeypatch.setattr(build, "digest", lambda name: "other")
        with pytest.warns(UserWarning, match=r"'native' is not used, .* host more: .*python -m faststeer.build cpu$"):
            assert dispatch._run_of.__wrapped__("cpu", "cpu") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_a_batch_is_that_row_alone_bit_for_bit(backend, dtype):
    case = steered(MIXES, 33, 896, DTYPES[dtype], "cpu", seed=3)
    whole = ops.steer(case.x, case.tables, case.rows, case.gate_state, backend=backend)
    for i in range(33):
        alone = ops.steer(case.x[i : i + 1], case.tables, case.rows[:, i : i + 1], case.gate_state, backend=backend)
        assert torch.equal(bits(alone), bits(whole[i : i + 1]))


@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_rounded_to_nearest_even(backend, dtype, plans):
    """Every 16-bit number, or as many fp32 ones, plus powers of two (which makes ties), the largest and the smallest
    number, infinity and NaN of any payload: as PyTorch adds in fp32 and rounds. Rows share a plan, or take turns."""
    hidden, rows = 1000, 65
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(2**16, generator=generator)[: rows * hidden].view(rows, hidden)
    if dtype == "fp32":
        x = (shuffled * 65537 - 2**31).int().view(torch.float32)
    else:
        x = (shuffled - 2**15).short().view(DTYPES[dtype])
    powers = torch.ldexp(torch.ones(2, 277), torch.arange(-149, 128)) * torch.tensor([[1.0], [-1.0]])
    some = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7FFF8000, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x7FFFFF, -(2**31)])
    vector = torch.cat([powers.flatten(), some.int().view(torch.float32), torch.randn(437, generator=generator)])
    vector = vector[torch.randperm(hidden, generator=generator)]
    case = steered([["Add"]] * plans, rows, hidden, DTYPES[dtype], "cpu", seed=0)
    entries = case.tables.entries.clone()
    numbers_of(entries)[:, ops.Field.A] = 1.0
    tables = case.tables._replace(bank=vector.expand_as(case.tables.bank).contiguous(), entries=entries)
    where = moved(case.rows, slot=torch.arange(rows) % plans)
    expected = (x.float() + vector).to(DTYPES[dtype])
    found, number = ops.steer(x, tables, where, backend=backend), ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(bits(found)[number], bits(expected)[number])


@pytest.mark.parametrize("hidden", [7, 47, 96, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_runs_of_one_addition(backend, dtype, hidden):
    case = steered([["Add"], ["Add"], ["Ablate"]], 13, hidden, DTYPES[dtype], "cpu", seed=11)
    slot = torch.tensor([0, 0, 0, 1, 1, -1, 1, 0, 2, 0, 0, 1, 1], dtype=torch.int32)
    where = moved(case.rows, slot=slot)
    first = case.tables.ranges[:2, 0].long()
    coefficients = numbers_of(case.tables.entries)[first, ops.Field.A].unsqueeze(1)
    sums = coefficients * case.tables.bank[case.tables.entries[first, ops.Field.VECTOR].long()]
    expected = (case.x.float() + sums[slot.clamp(0, 1).long()]).to(DTYPES[dtype])
    expected[5] = case.x[5]
    found = ops.steer(case.x, case.tables, where, backend=backend)
    added = slot != 2
    assert torch.equal(bits(found)[added], bits(expected)[added])
    assert not torch.equal(found[8], case.x[8])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_rows(backend, dtype):
    case = steered(MIXES, 13, 111, DTYPES[dtype], "cpu", seed=4)
    expected = ops.steer(case.x, case.tables, case.rows, case.gate_state, backend=backend)
    wide = torch.zeros(13, 400, dtype=case.x.dtype)
    for start in (1, 3, 200):
        view = wide[:, start : start + 111]
        view.copy_(case.x)
        found = ops.steer(view, case.tables, case.rows, case.gate_state, backend=backend)
        assert torch.equal(bits(found), bits(expected))
        assert torch.equal(bits(view), bits(case.x))
        wide[:, start : start + 111] = 0
        assert not wide.any(), "written outside the rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_pairs(backend, dtype):
    case = steered(MIXES, 13, 111, DTYPES[dtype], "cpu", seed=4)
    arguments = case.tables, case.rows, case.gate_state
    expected = case.x.clone(), case.residual.clone()
    ops.steer_pair_(*expected, *arguments, backend=backend)
    for starts in ((1, 0), (3, 200), (200, 1)):
        wide = [torch.zeros(13, 400 + start, dtype=case.x.dtype) for start in starts]
        views = [w[:, start : start + 111] for w, start in zip(wide, starts, strict=True)]
        for view, rows in zip(views, (case.x, case.residual), strict=True):
            view.copy_(rows)
        ops.steer_pair_(*views, *arguments, backend=backend)
        for view, rows, whole in zip(views, expected, wide, strict=True):
            assert torch.equal(bits(view), bits(rows))
            view.zero_()
            assert not whole.any(), "written outside the rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_that_nothing_acts_on_keeps_its_bits(both, dtype):
    """Of NaN too, and of -0; and coefficient 0 does not act."""
    case = steered([["Add"]], 9, 111, DTYPES[dtype], "cpu", seed=8)
    width = case.x.element_size()
    for rows, nan, zero in ((case.x, 5, 7), (case.residual, 7, 6)):
        bits(rows)[:, nan], bits(rows)[:, zero] = {4: 0x7FA12345, 2: 0x7FA1}[width], -(2 ** (8 * width - 1))
    before = case.x.clone(), case.residual.clone()
    nowhere, entries = moved(case.rows, slot=-1), case.tables.entries.clone()
    numbers_of(entries)[:, ops.Field.A] = 0.0
    idle = case.tables._replace(entries=entries)
    for tables, rows in ((case.tables, nowhere), (idle, case.rows)):
        ops.steer_pair_(case.x, case.residual, tables, rows, case.gate_state, backend=both)
        for pair, was in zip((case.x, case.residual), before, strict=True):
            assert torch.equal(bits(pair), bits(was))
    ops.steer_pair_(case.x, case.residual, case.tables, case.rows, case.gate_state, backend=both)
    assert torch.equal(case.x.any(1), case.rows[0] < 0), "a NaN does not keep a row from being steered"


def test_the_probe_of_a_pair_is_written_where_its_slot_has_entries(both):
    """And only there, whether or not one acts; not at all by tables without entries."""
    case = steered([["Probe"], []], 6, 64, torch.float32, "cpu", seed=8)
    rows, probe = placed([0, 1, -1, 9, 0, 0]), torch.full((4, case.columns), 7.0)
    before = case.x.clone(), case.residual.clone()
    pair = case.x[:3], case.residual[:3]
    ops.steer_pair_(*pair, case.tables, rows, case.gate_state, probe, backend=both)
    assert (probe[0] != 7).all() and (probe[1:] == 7).all()
    silent = case.tables.entries.clone()
    silent[:, ops.Field.PROBE] = -1
    ops.steer_pair_(*pair, case.tables._replace(entries=silent), rows, case.gate_state, probe, backend=both)
    assert (probe[0] == 0).all() and (probe[1:] == 7).all()
    empty = ops.Tables(*(t[:0] for t in case.tables[:3]), depth=0, width=1)
    ops.steer_pair_(*pair, empty, rows, case.gate_state, probe, backend=both)
    assert (probe[0] == 0).all() and (probe[1:] == 7).all()
    assert torch.equal(case.x, before[0]) and torch.equal(case.residual, before[1])


def test_places_of_rows_come_from_a_longer_buffer(both):
    """As a slice, or whole, of which the first columns count."""
    case = steered(MIXES, 13, 96, torch.bfloat16, "cpu", seed=12)
    arguments = case.x, case.residual, case.weight, 1e-6, 0.0, False, case.tables
    expected = ops.add_steer_rmsnorm(*arguments, case.rows, case.gate_state, backend=both)
    buffer = torch.full((3, 40), 77, dtype=torch.int32)
    for start in (0, 5):
        buffer[:, start : start + 13] = case.rows
        for rows in (buffer[:, start:], buffer[:, start : start + 13]):
            found = ops.add_steer_rmsnorm(*arguments, rows, case.gate_state, backend=both)
            assert all(map(torch.equal, found, expected))
            gates = case.gate_state.clone(), case.gate_state.clone()
            for given, state in zip((rows, case.rows), gates, strict=True):
                ops.latch_(case.x, case.tables, given, state, backend=both)
            assert torch.equal(*gates)
    same = torch.zeros(13, dtype=torch.int32).expand(3, -1)
    assert torch.equal(
        ops.steer(case.x, case.tables, same, backend=both), ops.steer(case.x, case.tables, placed([0] * 13))
    )


def test_no_rows(both):
    case = steered(MIXES, 0, 64, torch.float32, "cpu", seed=5)
    assert ops.steer(case.x, case.tables, case.rows, case.gate_state, backend=both).shape == (0, 64)
    probe = torch.full((4, case.columns), 7.0)
    for rows in (case.rows, torch.zeros(3, 4, dtype=torch.int32)):
        ops.steer_pair_(case.x, case.residual, case.tables, rows, case.gate_state, probe, backend=both)
    assert (probe == 7).all()


def test_latched_gates(backend):
    hidden, rows = 96, 40
    case = steered([["Add"]], rows, hidden, torch.float32, "cpu", seed=6)
    entries = case.tables.entries.clone()
    entries[:, ops.Field.KIND] = int(ops.EntryKind.LATCH)
    entries[:, ops.Field.GATE_MODE] = int(ops.GateMode.COSINE)
    entries[:, ops.Field.GATE_STATE] = 2
    numbers_of(entries)[:, ops.Field.THRESHOLD] = 0.05
    tables = case.tables._replace(entries=entries)
    expected, found = case.gate_state.clone(), case.gate_state.clone()
    ops.latch_(case.x, tables, case.rows, expected, backend="reference")
    ops.latch_(case.x, tables, case.rows, found, backend=backend)
    assert torch.equal(found, expected)
    assert not torch.equal(found, case.gate_state)
    ops.latch_(case.x, tables, case.rows, expected, residual=case.residual, backend="reference")
    ops.latch_(case.x, tables, case.rows, found, residual=case.residual, backend=backend)
    assert torch.equal(found, expected)


HOSTILE = [-(2**31), -7, -1, 0, 1, 2, 6, 9, 1000, 2**31 - 1]


@pytest.mark.parametrize("seed", range(30))
def test_wrong_indices_in_tables_stay_inside_and_agree_with_the_reference(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    case = steered(MIXES, 20, 70, torch.float32, "cpu", seed)
    values = torch.tensor(HOSTILE, dtype=torch.int64)
    entries, ranges, rows = (t.clone() for t in (case.tables.entries, case.tables.ranges, case.rows))
    for table, share in ((entries[:, : ops.Field.A], 0.05), (ranges, 0.05), (rows[0], 0.2), (rows[2], 0.2)):
        pick = torch.rand(table.shape, generator=generator) < share
        table[pick] = values[torch.randint(len(values), (int(pick.sum()),), generator=generator)].int()
    # The reference's loops are bounded by host numbers; these tables reach further than any program's.
    tables = ops.schema.host_tables(case.tables.bank, entries, ranges)
    tables = tables._replace(depth=min(tables.depth, len(entries)), width=min(tables.width, len(case.tables.bank)))
    expected_probe, probe = torch.zeros(20, case.columns), torch.zeros(20, case.columns)
    expected = ops.reference.steer(case.x, tables, rows, case.gate_state, expected_probe)
    found = ops.steer(case.x, tables, rows, case.gate_state, probe, backend=backend)
    touched = (expected != case.x).any(1)
    assert torch.equal((found != case.x).any(1), touched)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probe, expected_probe, rtol=1e-4, atol=1e-4)
    pairs = [(case.x.clone(), case.residual.clone(), torch.full((20, case.columns), 7.0)) for _ in range(2)]
    for (x, residual, seen), name in zip(pairs, (backend, "reference"), strict=True):
        ops.steer_pair_(x, residual, tables, rows, case.gate_state, seen, backend=name)
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


BAD = {
    "x dtype": (lambda c: {"x": c.x.double()}, TypeError, "x has dtype torch.float64"),
    "x dimensions": (lambda c: {"x": c.x[None]}, ValueError, "x has 3 dimensions"),
    "x stride": (lambda c: {"x": c.x.T.contiguous().T}, ValueError, "x has stride"),
    "bank hidden": (lambda c: {"bank": c.tables.bank[:, :-1].contiguous()}, ValueError, "bank has shape"),
    "bank dtype": (lambda c: {"bank": c.tables.bank.half()}, TypeError, "bank has dtype"),
    "entries columns": (lambda c: {"entries": c.tables.entries[:, :12].contiguous()}, ValueError, "entries has shape"),
    "entries dtype": (lambda c: {"entries": c.tables.entries.long()}, TypeError, "entries has dtype"),
    "entries start": (lambda c: {"entries": shifted(c.tables.entries)}, ValueError, "entries does not start at a mult"),
    "ranges strided": (lambda c: {"ranges": c.tables.ranges[::2]}, ValueError, "ranges is not contiguous"),
    "rows fewer": (lambda c: {"rows": c.rows[:, 1:]}, ValueError, r"rows has shape \[3, 4\]: expected \[3, 5\]"),
    "rows places": (lambda c: {"rows": c.rows[:2]}, ValueError, r"rows has shape \[2, 5\]: expected \[3, 5\]"),
    "rows dimensions": (lambda c: {"rows": c.rows[0]}, ValueError, r"rows has shape \[5\]"),
    "rows dtype": (lambda c: {"rows": c.rows.long()}, TypeError, "rows has dtype"),
    "rows strided": (lambda c: {"rows": c.rows.T.contiguous().T}, ValueError, "rows has stride 3 in its last dim"),
    "gate_state dtype": (lambda c: {"gate_state": c.gate_state.int()}, TypeError, "gate_state has dtype"),
}


def shifted(table):
    """The same numbers, 4 bytes after a multiple of 16."""
    return torch.nn.functional.pad(table.flatten(), (1, 0))[1:].view(table.shape)


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(backend, what):
    case = steered(MIXES, 5, 64, torch.float32, "cpu", seed=7)
    change, error, message = BAD[what]
    t = case.tables
    arguments = {"x": case.x, "bank": t.bank, "entries": t.entries, "ranges": t.ranges, "rows": case.rows}
    arguments |= {"gate_state": case.gate_state}
    arguments |= change(case)
    before = case.x.clone()
    overload = "triton" if backend == "triton" else "cpp"
    for op, last in (("steer", (None, 0)), ("steer_pair_", (None,))):
        given = [*arguments.values(), *last]
        if op == "steer_pair_":
            given.insert(1, torch.ones_like(arguments["x"]))
        with pytest.raises((error, RuntimeError), match=rf"^(steer: )?{what.split()[0]} "):
            getattr(getattr(torch.ops.faststeer, op), overload)(*given)
    assert torch.equal(case.x, before)
    tables = ops.Tables(*(arguments[name] for name in ("bank", "entries", "ranges")), t.depth, t.width)
    rows = arguments["rows"]
    for name in (backend, "reference"):
        if name == "reference" and what == "x dtype":
            continue  # fp64 is what it is for
        with pytest.raises(error, match=message):
            ops.steer(arguments["x"], tables, rows, arguments["gate_state"], backend=name)
        with pytest.raises(error, match=message):
            residual = torch.ones_like(arguments["x"])
            ops.steer_pair_(arguments["x"], residual, tables, rows, arguments["gate_state"], backend=name)
    assert torch.equal(case.x, before)


BAD_PAIR = {
    "residual shape": (lambda c: {"residual": c.residual[1:]}, ValueError, "residual is .4, 64."),
    "residual dtype": (lambda c: {"residual": c.residual.half()}, ValueError, "residual is .* torch.float16"),
    "residual stride": (lambda c: {"residual": c.residual.T.contiguous().T}, ValueError, "residual has stride"),
    "rows fewer": (lambda c: {"rows": c.rows[:, :4]}, ValueError, "rows has shape .3, 4.: expected .3, 5."),
    "rows empty": (lambda c: {"rows": c.rows[:, :0]}, ValueError, "rows has shape .3, 0."),
    "rows dimensions": (lambda c: {"rows": c.rows[0]}, ValueError, "rows has shape .5."),
    "rows strided": (lambda c: {"rows": torch.zeros(3, 20).int()[:, ::2]}, ValueError, "rows has stride 2"),
    "probe rows": (lambda c: {"probe": torch.zeros(4, 3)}, ValueError, "probe has shape .4, 3.: expected .5, any."),
    "probe dimensions": (lambda c: {"probe": torch.zeros(5)}, ValueError, "probe has shape .5.: expected .5, any."),
    "probe dtype": (lambda c: {"probe": torch.zeros(5, 3).half()}, TypeError, "probe has dtype torch.float16"),
    "probe strided": (lambda c: {"probe": torch.zeros(9, 6)[:, :3]}, ValueError, "probe is not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PAIR)
def test_bad_arguments_of_a_pair_are_named(both, what):
    case = steered(MIXES, 5, 64, torch.float32, "cpu", seed=7)
    change, error, message = BAD_PAIR[what]
    given = {"residual": case.residual, "probe": None, "rows": case.rows, **change(case)}
    before = case.x.clone(), case.residual.clone()
    with pytest.raises(error, match=message):
        ops.steer_pair_(
            case.x, given["residual"], case.tables, given["rows"], case.gate_state, given["probe"], backend=both
        )
    assert torch.equal(case.x, before[0]) and torch.equal(case.residual, before[1])


def test_the_in_place_form_refuses_a_gradient(both):
    case = steered(MIXES, 5, 64, torch.float32, "cpu", seed=8)
    tables = case.tables._replace(bank=case.tables.bank.clone().requires_grad_())
    residual = case.residual.clone().requires_grad_()
    for pair, given in (((case.x, case.residual), tables), ((case.x, residual), case.tables)):
        with pytest.raises(RuntimeError, match=r"steer_pair_ has no gradient: use add_steer, or torch\.no_grad"):
            ops.steer_pair_(*pair, given, case.rows, case.gate_state, backend=both)
    with torch.no_grad():
        ops.steer_pair_(case.x, residual, tables, case.rows, case.gate_state, backend=both)


@pytest.mark.parametrize("op", ["steer", "add_steer", "add_steer_rmsnorm"])
def test_gradients_are_the_references(backend, op):
    case = steered(MIXES, 9, 48, torch.float32, "cpu", seed=9)
    scalars = numbers_of(case.tables.entries)[:, ops.Field.A : ops.Field.B + 1]
    leaves = [case.x, case.residual, case.weight, case.tables.bank, scalars.contiguous()]
    grads = {}
    for name in (backend, "reference"):
        x, residual, weight, bank, scalars = (leaf.clone().requires_grad_() for leaf in leaves)
        tables = case.tables._replace(bank=bank, scalars=scalars)
        arguments = tables, case.rows, case.gate_state
        if op == "steer":
            out = ops.steer(x, *arguments, backend=name)
        elif op == "add_steer":
            out = ops.add_steer(x, residual, *arguments, backend=name)
        else:
            normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, 1e-6, 1.0, True, *arguments, backend=name)
            out = normed + 3 * hidden
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads[name] = [leaf.grad for leaf in (x, residual, weight, bank, scalars) if leaf.grad is not None]
    assert len(grads[backend]) == {"steer": 3, "add_steer": 4, "add_steer_rmsnorm": 5}[op]
    for ours, theirs in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["steer", "add_steer", "steer_pair_", "add_steer_rmsnorm", "latch_"])
def test_opcheck(backend, op):
    case = steered(MIXES, 5, 48, torch.float32, "cpu", seed=10)
    tables = [*case.tables[:3], case.rows, case.gate_state]
    scalars = numbers_of(case.tables.entries)[:, ops.Field.A : ops.Field.B + 1].clone().requires_grad_()
    arguments = {
        "steer": (case.x.requires_grad_(), *tables, None, case.columns),
        "add_steer": (case.x, case.residual, *tables, None, 0),
        "steer_pair_": (case.x.detach(), case.residual, *tables, torch.zeros(8, case.columns)),
        "add_steer_rmsnorm": (case.x, case.residual, case.weight, 1e-6, 0.0, False, *tables, scalars, case.columns),
        "latch_": (case.x.detach(), None, *tables),
    }[op]
    overload = "triton" if backend == "triton" else "cpp"
    torch.library.opcheck(getattr(getattr(torch.ops.faststeer, op), overload), arguments)


def test_compiles_into_one_graph_for_any_number_of_rows(backend):
    def run(x, residual, weight, tables, rows):
        normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, 1e-6, 0.0, False, tables, rows, backend=backend)
        return ops.steer(hidden, tables, rows, backend=backend) + normed

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for n in (13, 29, 41):  # no table has such a size: torch.compile takes equal sizes for one and the same
        case = steered(MIXES, n, 64, torch.bfloat16, "cpu", seed=n)
        arguments = case.x, case.residual, case.weight, case.tables, case.rows
        assert torch.equal(compiled(*arguments), run(*arguments))
    assert counter.frame_count == 1


def test_compiled_code_copies_nothing(backend):
    """Inductor's code calls the ops on the tensors themselves; the in-place form is functionalised on the way there."""

    def run(x, residual, tables, rows):
        hidden = ops.add_steer(x, residual, tables, rows, backend=backend)
        ops.steer_pair_(hidden, residual, tables, rows, backend=backend)
        ops.steer_pair_(x, residual, tables, rows, backend=backend)
        return hidden

    torch._dynamo.reset()
    case = steered(MIXES, 13, 96, torch.float32, "cpu", seed=1)
    pair = case.x.clone(), case.residual.clone()
    with torch.no_grad():
        expected = run(*pair, case.tables, case.rows)
        found, codes = run_and_get_code(
            torch.compile(run, fullgraph=True), case.x, case.residual, case.tables, case.rows
        )
    for ours, theirs in zip((found, case.x, case.residual), (expected, *pair), strict=True):
        assert torch.equal(ours, theirs)
    (code,) = codes
    body = code[code.index("def call(") : code.index("return (buf")]
    assert len(re.findall(r"torch\.ops\.faststeer\.\w+\.\w+\(", body)) == 3
    assert not re.search(r"empty_strided|clone|copy_\(|fused", body), "a hidden copy"


def test_a_whole_buffer_of_places_serves_any_number_of_rows(backend):
    """As vLLM's layers are compiled, first with as many rows as the buffer has room for."""
    case = steered(MIXES, 64, 96, torch.float32, "cpu", seed=3)
    tables = case.tables[:3]

    def run(x, rows, gate_state):
        torch.ops.faststeer.latch_.cpp(x, None, *tables, rows, gate_state)
        return torch.ops.faststeer.steer.cpp(x, *tables, rows, gate_state, None, 0)[0]

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for n in (64, 13, 29):
        x = case.x[:n].clone()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            found = compiled(x, case.rows, case.gate_state)
        assert torch.equal(found, ops.steer(x, case.tables, case.rows[:, :n], case.gate_state, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pair_is_steered_in_whole_buffers_without_a_copy(backend, dtype):
    """In compiled code too, of one graph for any number of rows: as vLLM's layers are compiled."""
    room, hidden = 64, 96
    case = steered(MIXES, room, hidden, dtype, "cpu", seed=1)
    tables, columns = case.tables, case.columns
    generator = torch.Generator().manual_seed(2)
    weights = [(torch.randn(hidden, hidden, generator=generator) / 8).to(dtype) for _ in range(2)]

    def run(x, before, rows, probe):
        hidden, residual = x @ weights[0], (before + x) @ weights[1]
        torch.ops.faststeer.steer_pair_.cpp(hidden, residual, *tables[:3], rows, case.gate_state, probe)
        s = (hidden + residual).float()
        return (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * case.weight

    inputs = [(case.x[:n].clone(), case.residual[:n].clone()) for n in (13, 29, 41, 50)]
    for x, before in inputs:
        for rows in (x, before):
            torch._dynamo.mark_dynamic(rows, 0)
    probes = [[torch.full((room, columns), 7.0) for _ in inputs] for _ in range(2)]

    def run_all(function, probes):
        return [function(*given, case.rows, probe) for given, probe in zip(inputs, probes, strict=True)]

    with torch.no_grad():
        expected = run_all(run, probes[0])
        found, codes = run_and_get_code(run_all, torch.compile(run, fullgraph=True), probes[1])
    for ours, theirs in zip((*found, *probes[1]), (*expected, *probes[0]), strict=True):
        torch.testing.assert_close(ours, theirs)
    for seen, (x, _) in zip(probes[1], inputs, strict=True):
        assert (seen[len(x) :] == 7).all() and not (seen[: len(x)] == 7).all()
    (code,) = codes
    body = code[code.index("def call(") : code.index("return (buf")]
    # On the products themselves, and on the buffers that came in: tables, rows, gates and probe.
    assert len(re.findall(r"faststeer\.steer_pair_\.cpp\(buf\d+, buf\d+(, arg\d+_1){6}\)", body)) == 1
    assert not re.search(r"clone|copy_\(", body), "a hidden copy"
    assert body.count("empty_strided") == 4, "more than two products, the sum in one of them and the norm"


def prepared_case(seed: int, dtype: torch.dtype):
    """A mixed case as the ops take it, its rows a slice of a longer buffer, and its tables as the second of three
    sites."""
    case = steered(MIXES, 6, 96, dtype, "cpu", seed=seed)
    bank, entries, ranges = case.tables[:3]
    sites = torch.stack((torch.zeros_like(ranges), ranges, torch.zeros_like(ranges)))
    rows = torch.cat((case.rows, case.rows), 1)[:, :6]
    return case, rows, (bank, entries, sites, rows, case.gate_state, [True, True, True])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_tables_give_the_bits_of_tables(backend, dtype):
    case, rows, tables = prepared_case(5, DTYPES[dtype])
    prepared, shape = ops.prepare(*tables), (2, 3, 96)
    residual, weight = torch.randn_like(case.x), torch.randn(96).to(case.x)
    with torch.no_grad():
        assert ops.takes_prepared(case.x)
        expected = ops.steer(case.x, case.tables, rows, case.gate_state, backend=backend)
        steered_x = prepared.steer(case.x.view(shape), 1)
        assert steered_x.shape == shape and torch.equal(bits(steered_x.view(6, 96)), bits(expected))
        assert not torch.equal(bits(expected), bits(case.x))
        assert torch.equal(bits(prepared.steer(case.x, 2)), bits(case.x))
        norm = weight, 1e-6, 1.0, True
        pair = ops.add_steer_rmsnorm(case.x, residual, *norm, case.tables, rows, case.gate_state, backend=backend)
        quick = prepared.add_steer_rmsnorm(case.x.view(shape), residual.view(shape), *norm, 1)
        for one, other in zip(quick, pair, strict=True):
            assert torch.equal(bits(one.view(6, 96)), bits(other))


def test_prepared_tables_refuse_what_does_not_fit_them(backend):
    case, rows, tables = prepared_case(6, torch.float32)
    prepared, x = ops.prepare(*tables), case.x
    wide = torch.cat((x, x), 1)
    for wrong in (
        (wide[:, :96], 1),  # not contiguous
        (wide, 1),
        (x[:5], 1),
        (torch.cat((x, x)), 1),
        (x.double(), 1),
        (x, 3),
        (x, -1),
    ):
        with torch.no_grad():
            assert prepared.steer(*wrong) is None
    with torch.no_grad():  # tensors that stand for others have no memory
        results = []
        torch.func.functionalize(lambda inside: results.append(prepared.steer(inside, 1)))(x)
        torch.func.vmap(lambda inside: results.append(prepared.steer(inside, 1)) or inside)(x.expand(2, *x.shape))
        assert results == [None, None]
    assert prepared.steer(x, 1) is None, "gradients are on"
    with torch.no_grad():
        assert prepared.steer(x, 1) is not None
        assert ops.prepare(*tables[:-1], [True, False, True]).steer(x, 1) is None, "probes"
    with pytest.raises(TypeError, match="expected 2 arguments"):
        prepared.steer(x)
    for name, number, other in (("bank", 0, tables[0].half()), ("rows", 3, rows.long()), ("rows", 3, rows[:2])):
        with pytest.raises(RuntimeError, match=f"{name} does not fit"):
            ops.prepare(*tables[:number], other, *tables[number + 1 :])


def test_prepared_tables_are_not_taken_by_what_they_cannot_serve(backend):
    x = torch.zeros(2, 64)
    assert not ops.takes_prepared(x), "gradients are on"
    with torch.no_grad():
        assert ops.takes_prepared(x)
        assert not ops.takes_prepared(torch.nn.Parameter(x)), "a subclass"
        assert not ops.takes_prepared(x.double())
        with ops.backend("reference"):
            assert not ops.takes_prepared(x)
        with FakeTensorMode() as mode:
            assert not ops.takes_prepared(mode.from_tensor(x)) and not ops.takes_prepared(x)
