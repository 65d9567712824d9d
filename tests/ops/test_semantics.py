"""What steering means: random plans against the fp64 oracle, and the identities and edge cases that every back end on
the CPU must keep. (tests/kernels and tests/gpu hold the others to the reference.)"""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from oracle import Oracle, Row, TooClose
from placing import moved, numbers_of, placed
from strategies import plans, randn, seeds
from torch import Tensor

import faststeer as fs
from faststeer.compile import compile_plan
from faststeer.ops import Field, Tables, backend_for, latch_, steer
from faststeer.ops.tables import EntryKind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FULL = hypothesis.settings.get_current_profile_name() == "full"


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request):
    """Every test runs on each of them; fp64, which the C++ does not have, on the reference alone."""
    if request.param == "reference":
        with fs.backend("reference"):
            yield
    else:
        assert backend_for("cpu") == "cpu"
        yield


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sequences of equal padded length: (columns, for each sequence the column where its prompt ends)."""
    length = draw(st.integers(1, 5))
    ends = draw(st.lists(st.integers(0, length), min_size=1, max_size=3))
    return length, ends


def check(dtype: torch.dtype, hidden: int, n_layers: int, loaded: list[fs.Plan], data: st.DataObject) -> None:
    """Load the plans into a used program, run rows through every site in order, and compare all that comes out with
    the oracle."""
    length, ends = data.draw(batches(), "columns, prompt ends")
    free = data.draw(st.permutations(range(4)), "slots")
    slots = free[: len(loaded)]
    program = fs.Program(n_layers, hidden, fs.Capacity(slots=4, vectors=400, entries=100))
    for slot in slots[:1]:  # what an earlier plan left behind must not matter
        program.load(slot, fs.Plan([fs.Ablate(randn(slot, hidden), layers="all", keep_norm=True, probe=True)]))
    for slot, plan in zip(slots, loaded, strict=True):
        program.load(slot, plan)

    choice = data.draw(
        st.lists(st.integers(-1, len(loaded) - 1), min_size=len(ends), max_size=len(ends)), "plan of each sequence"
    )
    sequence = torch.arange(len(ends), dtype=torch.int32).repeat_interleave(length)
    position = torch.cat([torch.arange(length, dtype=torch.int32) - end for end in ends])
    slot = torch.tensor([-1 if i < 0 else slots[i] for i in choice], dtype=torch.int32).repeat_interleave(length)
    rows = placed(slot, position, sequence)
    gate_state = torch.zeros(max(1, program.latching), len(ends) + 1, dtype=torch.bool)

    oracle = Oracle(n_layers, roundoff=2.0 ** (-53 if dtype == torch.float64 else -24))
    seed = data.draw(seeds, "rows")
    for site in range(4 * n_layers + 1):
        x = rows_of(seed + site, len(sequence), hidden, dtype)
        given = [
            Row(x[i].double().numpy(), None if choice[s] < 0 else loaded[choice[s]], int(position[i]), s)
            for i, s in enumerate(sequence.tolist())
        ]
        try:
            expected = oracle.visit(site, given)
        except TooClose:
            hypothesis.reject()
        tables = program.tables(site)
        latch_(x, tables, rows, gate_state)
        probe = torch.full((len(x), program.columns[site]), float("nan"))
        before = x.clone()
        result = steer(x, tables, rows, gate_state, probe)
        assert torch.equal(bits(x), bits(before)), "the input was written to"
        assert result.dtype == dtype and result.shape == x.shape
        for i, row in enumerate(expected):
            where = f"site {site}, row {i}"
            if not row.touched:
                assert torch.equal(bits(result[i]), bits(x[i])), f"{where}: nothing acts on it, yet its bits changed"
            within(result[i], row.h, row.bound, where)
            probes = probe[i].double().numpy()
            assert (probes[len(row.probes) :] == 0).all(), (
                f"{where}: a probe column that is not this plan's was written"
            )
            within(probe[i, : len(row.probes)], np.array(row.probes), np.array(row.probe_bounds), f"{where}, probes")
    for index, plan in enumerate(loaded):
        for entry in compile_plan(plan, n_layers, hidden):
            if entry.kind != EntryKind.LATCH:
                continue
            for s in range(len(ends)):
                verdicts = {
                    v
                    for (gate, at, q), v in oracle.decided.items()
                    if q == s and at == entry.site and gate in {id(i.when) for i in plan}
                }
                if (
                    choice[s] == index and len(verdicts) == 1
                ):  # two gates decided at one site may differ: their rows tell them apart above
                    assert bool(gate_state[entry.gate_state, s]) == verdicts.pop()


def rows_of(seed: int, n: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different lengths, one in six of zeros, some elements -0.0."""
    x = randn(seed, n, hidden)
    pick = torch.randint(0, 6, (n, 1), generator=torch.Generator().manual_seed(seed + 1))
    x = x * torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0, 30.0])[pick]
    return torch.where(x.abs() < 0.05, -0.0, x).to(dtype) if seed % 2 else x.to(dtype)


def within(actual: Tensor, expected: np.ndarray, bound: float | np.ndarray, where: str) -> None:
    """Each number is off by at most the bound and its own last rounding."""
    info = torch.finfo(actual.dtype)
    value = actual.double().numpy()
    allowed = bound + info.eps / 2 * (np.abs(expected) + bound) + info.smallest_normal * info.eps
    worst = int(np.argmax(np.abs(value - expected) - allowed)) if value.size else 0
    assert value.size == 0 or abs(value[worst] - expected[worst]) <= (
        allowed if np.isscalar(allowed) else allowed[worst]
    ), f"{where}, element {worst}: {value[worst]!r}, the oracle says {expected[worst]!r} +- {np.max(allowed):.2g}"


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, dtype, id=f"{backend}-{name}")
        for backend in ("reference", "cpu")
        for name, dtype in DTYPES.items()
        if (backend, name) != ("cpu", "fp64")  # which is the reference once more
    ],
    indirect=["backend"],
)
@hypothesis.settings(max_examples=5000 if FULL else 300)
@hypothesis.given(data=st.data())
def test_agrees_with_the_oracle(dtype, data):
    hidden = data.draw(st.sampled_from([1, 2, 3, 5, 16, 33, 64, 127]), "hidden")
    n_layers = data.draw(st.integers(1, 2), "layers")
    loaded = data.draw(st.lists(plans(hidden, n_layers), min_size=1, max_size=3), "plans")
    check(dtype, hidden, n_layers, loaded, data)


# Chosen cases --------------------------------------------------------------------------------------------------------


def one_site(*interventions: fs.Intervention, hidden: int | None = None) -> fs.Program:
    """A program of one layer whose slot 0 holds these interventions; site 0 is the layer's resid_pre."""
    hidden = hidden or interventions[0].directions()[0].shape[-1]
    plan = fs.Plan(interventions)
    program = fs.Program(1, hidden, fs.Capacity.of([plan], 1, hidden))
    program.load(0, plan)
    return program


def rows_at(position: int | list[int], n: int, slot: int = 0) -> Tensor:
    return placed(slot, position, torch.arange(n))


def apply(x: Tensor, *interventions: fs.Intervention, position: int | list[int] = 0) -> Tensor:
    return steer(x, one_site(*interventions, hidden=x.shape[-1]).tables(0), rows_at(position, len(x)))


HERE = {"layers": 0, "at": "resid_pre"}


def along(q: Tensor, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows with a large part along the first of the directions `[k, hidden]`."""
    q = torch.atleast_2d(q).double()
    return (randn(seed, n, q.shape[1]).double() + 20 * torch.nn.functional.normalize(q[0], dim=0)).to(dtype)


def rounding(x: Tensor, expected: Tensor | None = None) -> Tensor:
    """`[rows, 1]`: how far a dot product with a unit vector, or one step made with it, may be off: n products and sums
    in fp32 (fp64), and one rounding to the row's dtype."""
    info, compute = torch.finfo(x.dtype), torch.finfo(torch.promote_types(x.dtype, torch.float32))
    table = torch.finfo(torch.float32).eps  # directions are kept in fp32
    return x.double().norm(dim=1, keepdim=True) * (2 * (x.shape[1] + 8) * compute.eps + 4 * table + 2 * info.eps)


@pytest.mark.parametrize(
    "direction_dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda d: f"direction_{d}"[16:],
)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
class TestIdentities:
    """Contract 4: what the formulas promise holds to rounding, whatever the dtype of the rows and of the directions."""

    hidden = 129

    @pytest.fixture
    def v(self, k, direction_dtype):
        return randn(5, k, self.hidden, dtype=direction_dtype)

    @pytest.fixture
    def q(self, v):
        return torch.linalg.qr(v.double().T)[0].T

    def test_ablate_leaves_nothing(self, v, q, dtype):
        x = along(v, 16, dtype)
        assert ((apply(x, fs.Ablate(v, **HERE)).double() @ q.T).abs() <= rounding(x)).all()

    def test_ablate_twice_is_once(self, v, dtype):
        x = along(v, 16, dtype)
        once = apply(x, fs.Ablate(v, **HERE))
        for twice in (apply(once, fs.Ablate(v, **HERE)), apply(x, fs.Ablate(v, **HERE), fs.Ablate(v, **HERE))):
            assert ((twice.double() - once.double()).abs() <= rounding(x)).all()

    def test_project_then_ablate_is_zero(self, v, dtype):
        x = along(v, 16, dtype)
        assert (apply(x, fs.Project(v, **HERE), fs.Ablate(v, **HERE)).double().abs() <= rounding(x)).all()

    def test_project_and_ablate_make_the_whole(self, v, dtype):
        x = along(v, 16, dtype)
        whole = apply(x, fs.Project(v, **HERE)).double() + apply(x, fs.Ablate(v, **HERE)).double()
        assert ((whole - x.double()).abs() <= 2 * rounding(x)).all()

    def test_reflecting_twice_is_nothing(self, v, dtype):
        x = along(v, 16, dtype)
        twice = apply(x, fs.Ablate(v, 2.0, **HERE), fs.Ablate(v, 2.0, **HERE))
        assert ((twice.double() - x.double()).abs() <= 4 * rounding(x)).all()

    def test_clamp_sets_the_projection(self, v, q, dtype, k):
        x = along(v, 16, dtype)
        p = apply(x, fs.Clamp(v[0], low=-3.0, high=-3.0, **HERE)).double() @ q[0]
        assert ((p.abs() - 3).abs().unsqueeze(1) <= rounding(x)).all()

    @pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
    def test_rotate_keeps_the_norm(self, v, dtype, relative):
        x, other = along(v, 16, dtype), randn(6, self.hidden)
        for degrees in (0.0, 30.0, -135.0, 200.0):
            turned = apply(x, fs.Rotate(v[0], other, degrees, relative=relative, **HERE))
            change = turned.double().norm(dim=1) - x.double().norm(dim=1)
            assert (change.abs().unsqueeze(1) <= 2 * rounding(x)).all()

    def test_rotate_there_and_back_is_nothing(self, v, dtype):
        x, other = along(v, 16, dtype), randn(6, self.hidden)
        there, back = (fs.Rotate(v[0], other, degrees, relative=True, **HERE) for degrees in (70.0, -70.0))
        assert ((apply(x, there, back).double() - x.double()).abs() <= 4 * rounding(x)).all()

    def test_rotate_to_an_angle(self, v, dtype):
        """At 0 degrees the part in the plane points along a, at 90 along b made orthogonal to a."""
        x, other = along(v, 16, dtype), randn(6, self.hidden)
        b1, b2 = torch.linalg.qr(torch.stack([v[0].double(), other.double()]).T)[0].T
        b1, b2 = b1 * (b1 @ v[0].double()).sign(), b2 * (b2 @ other.double()).sign()
        radius = torch.hypot(x.double() @ b1, x.double() @ b2).unsqueeze(1)
        for degrees, along_, across in ((0.0, b1, b2), (90.0, b2, b1), (180.0, -b1, b2)):
            turned = apply(x, fs.Rotate(v[0], other, degrees, **HERE)).double()
            assert ((turned @ along_).unsqueeze(1) - radius).abs().le(2 * rounding(x)).all()
            assert (turned @ across).unsqueeze(1).abs().le(2 * rounding(x)).all()

    def test_keep_norm(self, v, dtype):
        x = along(v, 16, dtype)
        kept = apply(x, fs.Add(v[0], 3.0, keep_norm=True, **HERE), fs.Ablate(v, keep_norm=True, **HERE))
        assert ((kept.double().norm(dim=1) - x.double().norm(dim=1)).abs().unsqueeze(1) <= 4 * rounding(x)).all()


@pytest.mark.parametrize("hidden", [33, 16384])
@pytest.mark.parametrize("norm", [1e-15, 1e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestRange:
    """What squares a row in fp32 is right at both ends of the range that the docstrings name."""

    def rows(self, hidden, norm, dtype):
        rows = randn(1, 4, hidden).double()
        return (rows * norm / rows.norm(dim=1, keepdim=True)).to(dtype)

    def test_the_norm_is_kept(self, hidden, norm, dtype):
        x, v = self.rows(hidden, norm, dtype), randn(2, hidden)
        add = fs.Add(v / v.norm(), 0.5 * norm, keep_norm=True, **HERE)
        for plan in (add, fs.Ablate(v, keep_norm=True, **HERE), fs.Rotate(v, randn(3, hidden), 40.0, **HERE)):
            change = apply(x, plan).double().norm(dim=1) / x.double().norm(dim=1) - 1
            assert (change.abs() <= 4 * torch.finfo(dtype).eps).all()

    def test_beyond_nothing_looks_right(self, hidden, norm, dtype):
        x, v = self.rows(hidden, norm, dtype) * (1e-10 if norm < 1 else 10), randn(2, hidden)
        for coefficient in (1.0, 1e20):
            result = apply(x, fs.Add(v / v.norm(), coefficient, keep_norm=True, **HERE))
            assert not (result.isfinite() & (result != 0)).any()
        own = fs.Gate(x[0].float(), 0.0, kind="cosine")
        assert torch.equal(apply(x, fs.Add(v, when=own, **HERE)), x)

    @pytest.mark.parametrize("threshold", [0.49, 0.51])
    def test_a_cosine_is_compared(self, hidden, norm, dtype, threshold):
        d, other = torch.linalg.qr(randn(4, hidden, 2))[0].T
        x = (norm * (0.5 * d + 0.75**0.5 * other)).to(dtype).unsqueeze(0)  # bf16 leaves the cosine within 0.004 of 0.5
        changed = apply(x, fs.Ablate(d, when=fs.Gate(d, threshold, kind="cosine"), **HERE)) != x
        assert bool(changed.any()) == (threshold < 0.5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
class TestUntouched:
    """Contract 1: a row that nothing acts on comes out with the bits it went in."""

    hidden = 33

    def special(self, dtype: torch.dtype, *, finite: bool) -> Tensor:
        """Rows of ordinary numbers, zeros of both signs, subnormals, the largest numbers; and NaN and infinity."""
        info = torch.finfo(dtype)
        x = randn(1, 8, self.hidden, dtype=dtype)
        x[1], x[2] = 0.0, -0.0
        x[3, ::2] = -0.0
        x[4] = info.smallest_normal * info.eps
        x[5, :4] = info.max
        if not finite:
            x[6, 3], x[7, 5], x[7, 6] = float("nan"), float("inf"), -float("inf")
        return x

    def check(self, x: Tensor, *interventions: fs.Intervention, position: int = 0) -> None:
        assert torch.equal(bits(apply(x, *interventions, position=position)), bits(x))

    def every_kind(self, **where) -> list[fs.Intervention]:
        v, w = randn(2, 2, self.hidden)
        where = HERE | where
        return [
            fs.Add(v, 2.0, **where),
            fs.Ablate(torch.stack([v, w]), **where),
            fs.Project(v, **where),
            fs.Clamp(v, low=1.0, high=1.0, **where),
            fs.Rotate(v, w, 40.0, **where),
            fs.Rotate(v, w, 40.0, relative=True, **where),
        ]

    def test_slot_minus_one(self, dtype):
        x = self.special(dtype, finite=False)
        tables = one_site(*self.every_kind(), hidden=self.hidden).tables(0)
        assert torch.equal(bits(steer(x, tables, rows_at(0, len(x), slot=-1))), bits(x))

    def test_empty_slot(self, dtype):
        x = self.special(dtype, finite=False)
        tables = one_site(*self.every_kind(), hidden=self.hidden).tables(0)
        assert torch.equal(bits(steer(x, tables, rows_at(0, len(x), slot=1))), bits(x))

    def test_no_interventions(self, dtype):
        self.check(self.special(dtype, finite=False))

    @pytest.mark.parametrize(
        ("positions", "r"),
        [
            ("prompt", 0),
            ("generated", -1),
            ("last", -2),
            ("last", 0),
            ("[-3:]", -4),
            ("[-3:]", 0),
            ("[1:3]", 3),
            (2, 1),
        ],
    )
    def test_outside_its_positions(self, dtype, positions, r):
        self.check(self.special(dtype, finite=False), *self.every_kind(positions=positions), position=r)

    @pytest.mark.parametrize("kind", ["dot", "cosine"])
    def test_closed_gate(self, dtype, kind):
        x = self.special(dtype, finite=True)
        x[5, :4] = 1.0  # the largest numbers overflow in a dot product
        gate = fs.Gate(randn(3, self.hidden), 1e6 if kind == "dot" else 1.5, kind=kind)
        self.check(x, *self.every_kind(when=gate))

    def test_undecided_latched_gate(self, dtype):
        gate = fs.Gate(randn(3, self.hidden), -1e6, latched=True)
        x = self.special(dtype, finite=False)
        self.check(x, *self.every_kind(when=gate))
        tables, state = (
            one_site(*self.every_kind(when=gate), hidden=self.hidden).tables(0),
            torch.zeros(1, 9, dtype=torch.bool),
        )
        latch_(x, tables, rows_at(0, len(x)), state)  # no row here is the last of a prompt
        assert torch.equal(bits(steer(x, tables, rows_at(0, len(x)), state)), bits(x))

    def test_coefficient_zero(self, dtype):
        self.check(
            self.special(dtype, finite=False),
            fs.Add(randn(2, self.hidden), 0.0, **HERE),
            fs.Add(randn(2, self.hidden), -0.0, **HERE),
        )

    def test_coefficient_zero_keeping_the_norm(self, dtype):
        self.check(self.special(dtype, finite=False), fs.Add(randn(2, self.hidden), 0.0, keep_norm=True, **HERE))

    def test_strength_zero(self, dtype):
        self.check(self.special(dtype, finite=True), fs.Ablate(randn(2, 2, self.hidden), 0.0, **HERE))

    def test_clamp_not_needed(self, dtype):
        x = self.special(dtype, finite=True)
        x[5, :4] = 1.0
        self.check(
            x,
            fs.Clamp(randn(2, self.hidden), low=-1e6, high=1e6, **HERE),
            fs.Clamp(randn(2, self.hidden), high=1e6, **HERE),
        )

    def test_probe_only_looks(self, dtype):
        self.check(self.special(dtype, finite=False), fs.Probe(randn(2, 2, self.hidden), **HERE))

    def test_direction_that_the_row_has_none_of(self, dtype):
        x = self.special(dtype, finite=True)
        x[:, 0] = 0.0
        first = torch.eye(self.hidden)[0]
        self.check(x, fs.Ablate(first, **HERE), fs.Clamp(first, low=0.0, high=0.0, **HERE))

    def test_whole_turns(self, dtype):
        x = self.special(dtype, finite=True)
        x[5, :4] = 1.0
        self.check(
            x,
            *(fs.Rotate(*randn(2, 2, self.hidden), degrees, relative=True, **HERE) for degrees in (0.0, 360.0, -720.0)),
        )


class TestAdd:
    """`Add` is h + c v as anybody would write it."""

    @pytest.mark.parametrize("c", [1.0, -8.0, 0.1, 1e-3, 3.3333])
    @pytest.mark.parametrize("hidden", [1, 31, 64, 4097])
    def test_bitwise_as_written_by_hand(self, hidden, c):
        x, v = randn(0, 7, hidden), randn(1, hidden)
        assert torch.equal(bits(apply(x, fs.Add(v, c, **HERE))), bits(x + c * v))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_bitwise_as_written_in_fp32_and_rounded_once(self, dtype):
        x, v = randn(0, 7, 64, dtype=dtype), randn(1, 64)
        assert torch.equal(bits(apply(x, fs.Add(v, 0.7, **HERE))), bits((x.float() + 0.7 * v).to(dtype)))
        assert torch.equal(
            bits(apply(x, fs.Add(v, 0.7, **HERE), fs.Add(v, 1.1, **HERE))),
            bits((x.float() + 0.7 * v + 1.1 * v).to(dtype)),
        )

    def test_not_what_one_rounding_would_give(self):
        """The product is rounded before the sum: a fused multiply-add has other bits."""
        x, v, c = randn(0, 200, 64), randn(1, 64), 0.1
        fused = (x.double() + torch.tensor(c, dtype=torch.float32).double() * v.double()).float()
        assert not torch.equal(fused, x + c * v)
        assert torch.equal(apply(x, fs.Add(v, c, **HERE)), x + c * v)

    def test_bits_do_not_depend_on_other_plans(self):
        """Not even the sign of a zero, next to a plan whose subspace is wider."""
        x, v = randn(0, 6, 32), randn(1, 32)
        x[:, ::3], v[::3] = -0.0, 0.0
        plan, wide = fs.Plan([fs.Add(v, -1.0, **HERE)]), fs.Plan([fs.Ablate(randn(2, 3, 32), **HERE)] * 2)
        alone, together = one_site(*plan), fs.Program(1, 32, fs.Capacity.of([plan, wide], 1, 32))
        together.load(0, plan)
        together.load(1, wide)
        expected = bits(x - v)
        assert torch.equal(bits(steer(x, alone.tables(0), rows_at(0, 6))), expected)
        assert torch.equal(bits(steer(x, together.tables(0), rows_at(0, 6))), expected)


def scalars_of(tables: Tables) -> Tensor:
    """The entries' A and B, `[n_entries, 2]`."""
    return numbers_of(tables.entries)[:, Field.A : Field.B + 1].clone()


class TestZeroRows:
    """A zero row has cosine 0, no norm to keep, and no gradient that is not a number."""

    @pytest.mark.parametrize(
        ("threshold", "above", "acts"),
        [(0.0, True, False), (0.0, False, True), (-0.1, True, True), (0.1, True, False), (-0.1, False, False)],
    )
    def test_cosine_gate(self, threshold, above, acts):
        v = randn(0, 8)
        gate = fs.Gate(randn(1, 8), threshold, kind="cosine", above=above)
        result = apply(torch.zeros(1, 8), fs.Add(v, when=gate, **HERE))
        assert torch.equal(result[0], v if acts else torch.zeros(8))

    @pytest.mark.parametrize("zero", [0.0, -0.0], ids=["+0", "-0"])
    def test_keep_norm_keeps_a_zero_row(self, zero):
        x = torch.full((2, 8), zero)
        v, w = randn(0, 2, 8)
        result = apply(x, fs.Add(v, 2.0, keep_norm=True, **HERE), fs.Clamp(w, low=3.0, keep_norm=True, **HERE))
        assert not result.any(), "a row without length stays a zero row"

    def test_a_row_that_becomes_zero_stays_zero(self):
        first = torch.eye(4)[0]
        assert not apply(5 * first.unsqueeze(0), fs.Ablate(first, keep_norm=True, **HERE)).any()

    @pytest.mark.parametrize("keep_norm", [False, True], ids=["", "keep_norm"])
    def test_gradients_are_finite(self, keep_norm):
        v, w = randn(0, 2, 8)
        gate = fs.Gate(w, -1.0, kind="cosine")
        more = {"keep_norm": keep_norm, "when": gate} | HERE
        for intervention in (
            fs.Add(v, 2.0, **more),
            fs.Ablate(torch.stack([v, w]), **more),
            fs.Project(v, **more),
            fs.Clamp(v, low=1.0, high=2.0, **more),
            fs.Rotate(v, w, 30.0, **more),
            fs.Rotate(v, w, 30.0, relative=True, **more),
        ):
            x = torch.zeros(2, 8, requires_grad=True)
            tables = one_site(intervention).tables(0)
            bank, scalars = tables.bank.clone().requires_grad_(), scalars_of(tables).requires_grad_()
            steer(x, tables._replace(bank=bank, scalars=scalars), rows_at(0, 2)).sum().backward()
            for name, tensor in {"x": x, "bank": bank, "scalars": scalars}.items():
                assert torch.isfinite(tensor.grad).all(), f"{type(intervention).__name__}, {name}"


@pytest.mark.parametrize(
    "more",
    [{}, {"keep_norm": True}, {"gate": "dot"}, {"gate": "cosine", "keep_norm": True}, {"positions": "last"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Add", "Ablate", "Project", "Clamp", "Rotate", "RotateRelative", "mixed"])
@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # which computes fp64 whatever the back end
def test_gradcheck(kind, more):
    """Contract 7: gradients to the rows, the directions and the numbers match finite differences in fp64."""
    hidden = 4
    v, w, d = randn(0, 3, hidden)
    more = dict(more)
    gate = more.pop("gate", None)
    where = HERE | more | ({"when": fs.Gate(d, 0.05, kind=gate)} if gate else {})
    made = {
        "Add": [fs.Add(v, 1.3, **where)],
        "Ablate": [fs.Ablate(torch.stack([v, w]), 0.7, **where)],
        "Project": [fs.Project(torch.stack([v, w]), **where)],
        "Clamp": [fs.Clamp(v, low=-0.5, high=0.5, **where)],
        "Rotate": [fs.Rotate(v, w, 40.0, **where)],
        "RotateRelative": [fs.Rotate(v, w, 40.0, relative=True, **where)],
    }
    made["mixed"] = [i for kind in made.values() for i in kind if not isinstance(i, fs.Project)]
    tables = one_site(*made[kind]).tables(0)
    used = int(tables.ranges[0, 1]) + int(tables.ranges[0, 0])
    rest = scalars_of(tables)[used:].double()

    def f(x: Tensor, bank: Tensor, scalars: Tensor) -> Tensor:
        now = tables._replace(
            bank=torch.cat([bank, tables.bank[len(bank) :].double()]), scalars=torch.cat([scalars, rest])
        )
        return steer(x, now, rows_at([-2, -1, 0, -1], 4))

    x, in_use = randn(4, 4, hidden, dtype=torch.float64).requires_grad_(), int(tables.bank.any(1).sum())
    bank, scalars = tables.bank[:in_use].double().requires_grad_(), scalars_of(tables)[:used].double().requires_grad_()
    assert not torch.equal(f(x, bank, scalars), x)
    assert torch.autograd.gradcheck(f, (x, bank, scalars))


@pytest.mark.parametrize("bound", [{"low": 0.5}, {"high": -0.5}], ids=["low", "high"])
def test_gradcheck_of_a_clamp_with_one_bound(bound):
    """The bound that is not there is infinite in the tables; no gradient may be multiplied by it."""
    tables = one_site(fs.Clamp(randn(0, 6), **bound, **HERE)).tables(0)

    def f(x: Tensor, bank: Tensor) -> Tensor:
        return steer(x, tables._replace(bank=torch.cat([bank, tables.bank[len(bank) :].double()])), rows_at(0, 4))

    x, bank = randn(4, 4, 6, dtype=torch.float64).requires_grad_(), tables.bank[:2].double().requires_grad_()
    assert not torch.equal(f(x, bank), x)
    assert torch.autograd.gradcheck(f, (x, bank))


def by_hand(kind: str, x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """What somebody would write in a forward hook, in the dtype of the model."""
    q = v / v.norm()
    p = (x @ q).unsqueeze(-1)
    if kind == "Add":
        return x + 2.5 * v
    if kind == "Ablate":
        return x - p * q
    if kind == "Project":
        return p * q
    if kind == "Clamp":
        return x + (p.clamp(-1.0, 1.0) - p) * q
    b = w - (w @ q) * q
    b = b / b.norm()
    p2 = (x @ b).unsqueeze(-1)
    c, s = torch.tensor(0.7).cos().to(x), torch.tensor(0.7).sin().to(x)
    if kind == "Rotate":
        return x - p * q - p2 * b + (p * p + p2 * p2).sqrt() * (c * q + s * b)
    if kind == "RotateRelative":
        return x - p * q - p2 * b + (p * c - p2 * s) * q + (p * s + p2 * c) * b
    moved = x + 2.5 * v
    return moved * (x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("kind", ["Add", "Ablate", "Project", "Clamp", "Rotate", "RotateRelative", "AddKeepNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_as_close_to_the_truth_as_pytorch(kind, dtype):
    """Contract 3: the error against fp64 is at most twice that of the same formula in plain PyTorch of the same
    dtype."""
    v, w = randn(0, 2, 2048)
    x = along(v, 32, dtype)
    intervention = {
        "Add": fs.Add(v, 2.5, **HERE),
        "Ablate": fs.Ablate(v, **HERE),
        "Project": fs.Project(v, **HERE),
        "Clamp": fs.Clamp(v, low=-1.0, high=1.0, **HERE),
        "Rotate": fs.Rotate(v, w, float(np.degrees(0.7)), **HERE),
        "RotateRelative": fs.Rotate(v, w, float(np.degrees(0.7)), relative=True, **HERE),
        "AddKeepNorm": fs.Add(v, 2.5, keep_norm=True, **HERE),
    }[kind]
    truth = by_hand(kind, x.double(), v.double(), w.double())
    ours = (apply(x, intervention).double() - truth).norm()
    plain = (by_hand(kind, x, v.to(dtype), w.to(dtype)).double() - truth).norm()
    half_an_ulp = torch.finfo(dtype).eps / 2 * truth.norm()  # what the best possible implementation may make
    assert ours <= 2 * plain + half_an_ulp


class TestProbe:
    def test_columns_follow_the_plan(self):
        """Columns 0, 1, ... in the plan's order, k for a k-dimensional basis, before acting; the norm of what is
        probed does not matter."""
        hidden = 16
        a, b, c = randn(0, 3, hidden)
        plan = [
            fs.Probe(torch.stack([3 * a, b]), **HERE),
            fs.Ablate(a, probe=True, **HERE),
            fs.Add(c, 2.0, **HERE),
            fs.Clamp(c, low=0.0, high=0.0, probe=True, **HERE),
            fs.Probe(torch.stack([a, c]), **HERE),
        ]
        program, x = one_site(*plan), randn(9, 5, hidden)
        assert program.columns[0] == 6
        probe = torch.empty(5, 7).fill_(7.0)
        steer(x, program.tables(0), rows_at(0, 5), probe=probe)
        unit = {name: t.double() / t.double().norm() for name, t in {"a": a, "b": b, "c": c}.items()}
        h = x.double()
        ablated = h - (h @ unit["a"]).unsqueeze(1) * unit["a"]
        added = ablated + 2 * c.double()
        final = added - (added @ unit["c"]).unsqueeze(1) * unit["c"]
        expected = torch.stack(
            [h @ unit["a"], h @ unit["b"], h @ unit["a"], added @ unit["c"], final @ unit["a"], final @ unit["c"]],
            dim=1,
        )
        assert ((probe[:, :6].double() - expected).abs() <= 8 * rounding(x)).all()
        assert (probe[:, 6] == 0).all(), "a column that belongs to no probe is zero"

    def test_written_whatever_gate_and_positions_say(self):
        v, x = randn(0, 16), randn(1, 4, 16)
        shut = fs.Gate(v, 1e6)
        program = one_site(
            fs.Ablate(v, probe=True, when=shut, **HERE),
            fs.Ablate(v, probe=True, positions=5, **HERE),
            fs.Ablate(v, 0.0, probe=True, **HERE),
            fs.Ablate(v, probe=True, when=fs.Gate(v, latched=True), **HERE),
        )
        probe = torch.zeros(4, 4)
        result = steer(x, program.tables(0), rows_at([-3, -1, 0, 2], 4), probe=probe)
        assert torch.equal(result, x)
        assert (
            (probe.double() - (x.double() @ v.double() / v.double().norm()).unsqueeze(1)).abs() <= rounding(x)
        ).all()

    def test_rows_of_other_plans_are_zero(self):
        v, w = randn(0, 2, 16)
        probing, other = fs.Plan([fs.Probe(v, **HERE)]), fs.Plan([fs.Add(w, **HERE)])
        program = fs.Program(1, 16, fs.Capacity.of([probing, other], 1, 16))
        program.load(0, probing)
        program.load(1, other)
        probe = torch.full((3, 1), 7.0)
        steer(randn(1, 3, 16), program.tables(0), placed([0, 1, -1], 0, [0, 1, 2]), probe=probe)
        assert probe[0] not in (0.0, 7.0) and (probe[1:] == 0).all()


class TestLatch:
    v, d = randn(0, 2, 8)

    def program(self, **where) -> fs.Program:
        gate = fs.Gate(self.d, 0.5, latched=True)
        return one_site(fs.Add(self.v, when=gate, **HERE, **where))

    def rows(self, positions: list[int], sequences: list[int]) -> Tensor:
        return placed(0, positions, sequences)

    def test_decided_at_the_last_prompt_token(self):
        """Rows are [sequence 0: -2, -1, 0, 1], [sequence 1: the same]; only sequence 0 is above the threshold at r =
        -1."""
        unit = self.d / self.d.norm()
        values = torch.tensor([9.0, 2.0, -9.0, -9.0, 9.0, -2.0, 9.0, 9.0])  # the cosine direction's share of each row
        x = values.unsqueeze(1) * unit
        rows = self.rows([-2, -1, 0, 1] * 2, [0] * 4 + [1] * 4)
        tables, state = self.program().tables(0), torch.zeros(1, 3, dtype=torch.bool)
        latch_(x, tables, rows, state)
        assert state[0, :2].tolist() == [True, False]
        acted = (steer(x, tables, rows, state) != x).any(1)
        assert acted.tolist() == [False, True, True, True, False, False, False, False]

    def test_holds_in_later_calls_until_decided_again(self):
        unit = self.d / self.d.norm()
        tables, state = self.program().tables(0), torch.zeros(1, 2, dtype=torch.bool)
        for position, value, opens in (
            (-1, 2.0, True),
            (0, -9.0, True),
            (7, -9.0, True),
            (-1, -2.0, False),
            (0, 9.0, False),
        ):
            x, rows = (value * unit).unsqueeze(0), self.rows([position], [0])
            latch_(x, tables, rows, state)
            assert bool((steer(x, tables, rows, state) != x).any()) is opens

    def test_looks_at_the_row_before_the_site_changes_it(self):
        unit = self.d / self.d.norm()
        gate = fs.Gate(self.d, 0.5, latched=True)
        program = one_site(fs.Add(-9 * unit, **HERE), fs.Add(self.v, when=gate, **HERE))
        x, rows, state = (2.0 * unit).unsqueeze(0), self.rows([-1], [0]), torch.zeros(1, 2, dtype=torch.bool)
        latch_(x, program.tables(0), rows, state)
        torch.testing.assert_close(steer(x, program.tables(0), rows, state)[0], 2.0 * unit - 9 * unit + self.v)

    def test_positions_still_hold(self):
        x = 9 * self.d.expand(4, 8)
        rows, state = self.rows([-1, 0, 1, 2], [0] * 4), torch.zeros(1, 2, dtype=torch.bool)
        tables = self.program(positions="[1:2]").tables(0)
        latch_(x, tables, rows, state)
        assert (steer(x, tables, rows, state) != x).any(1).tolist() == [False, False, True, False]

    def test_rows_of_other_plans_decide_nothing(self):
        rows, state = self.rows([-1], [0]), torch.zeros(1, 2, dtype=torch.bool)
        latch_(
            9 * self.d.expand(1, 8),
            self.program().tables(0),
            moved(rows, slot=-1),
            state,
        )
        assert not state.any()


class TestShapes:
    plan = (fs.Ablate(randn(0, 2, 40), **HERE), fs.Add(randn(1, 40), 1.5, keep_norm=True, **HERE))

    @pytest.mark.parametrize(
        "rows",
        [
            lambda x: torch.cat([x, x], dim=1)[:, :40],
            lambda x: torch.stack([x, x], dim=1)[:, 0],
        ],
        ids=["row_stride", "every_second_row"],
    )
    def test_strided_rows(self, rows):
        x = rows(randn(2, 6, 40))
        torch.testing.assert_close(apply(x, *self.plan), apply(x.contiguous(), *self.plan), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "rows", [lambda x: x.T.contiguous().T, lambda x: x[:1].expand(6, 40)], ids=["transposed", "expanded"]
    )
    def test_other_strides_are_refused(self, rows):
        with pytest.raises((ValueError, RuntimeError), match=r"\bx\b.*strides?"):
            apply(rows(randn(2, 6, 40)), *self.plan)

    def test_no_rows(self):
        assert apply(torch.zeros(0, 40), *self.plan).shape == (0, 40)


def test_one_graph_serves_every_plan():
    """Contract 6, as far as a CPU shows it: the op traces into one graph, which reads changed tables without being
    compiled again."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    a, b, x, rows = (
        fs.Plan([fs.Ablate(randn(0, 16), **HERE)]),
        fs.Plan([fs.Rotate(*randn(1, 2, 16), 30.0, **HERE)]),
        randn(2, 3, 16),
        rows_at(0, 3),
    )
    program = fs.Program(1, 16, fs.Capacity.of([a, b], 1, 16))
    program.load(0, b)
    tables = program.tables(0)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: steer(x, tables, rows), backend=backend, fullgraph=True)
    for plan in (b, a, b):
        program.load(0, plan)
        assert torch.equal(compiled(x), apply(x, *plan))
    assert len(compilations) == 1
