"""Whether the back ends compute on this machine what they should, and what steering costs here: what `faststeer verify`
runs. Nothing here prints or writes a file.

A back end is compared with the reference in fp64 on the CPU, on random plans of every kind of intervention. Its error
may be twice that of plain PyTorch in the same dtype, plus a floor for what both must round. All errors are given as a
share of that: above 1 a back end disagrees.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from faststeer import measure, ops
from faststeer.engine import Engine
from faststeer.hf import steer
from faststeer.intervention import Ablate, Add, Clamp, Gate, Intervention, Probe, Project, Rotate
from faststeer.ops import Tables, reference
from faststeer.ops.tables import Field, GateMode
from faststeer.plan import Plan
from faststeer.program import Capacity, Program
from faststeer.version import versions

DTYPES = torch.bfloat16, torch.float32, torch.float16
MIXES = 4  # random mixes of interventions for each dtype and hidden size
MOST_DISAGREEMENTS = 8  # described of one back end
GATES = 8  # rows of gate_state; a plan has fewer latched gates
EPS = 1e-6  # of the norms
EPS32 = torch.finfo(torch.float32).eps
# Shares of the time that the back ends, then back ends and kernels together may have. Steps get the rest.
CHECKS_UNTIL, KERNELS_UNTIL = 0.6, 0.75


# Random programs ------------------------------------------------------------------------------------------------------


def interventions(hidden: int, generator: torch.Generator) -> dict[str, Intervention]:
    """One of every kind, at the first site, with random directions."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def gate(kind: Any, **more: Any) -> Gate:
        # Of unit length, so that about half of the rows pass.
        return Gate(torch.nn.functional.normalize(randn(hidden), dim=0), 0.0, kind=kind, **more)

    place: dict[str, Any] = {"layers": 0, "at": "resid_pre"}
    return {
        "Add": Add(randn(hidden), 1.5, **place),
        "Ablate": Ablate(randn(hidden), probe=True, **place),
        "Ablate, a subspace": Ablate(randn(3, hidden), strength=0.7, **place),
        "Project": Project(randn(2, hidden), **place),
        "Clamp": Clamp(randn(hidden), low=-0.5, high=0.25, **place),
        "Rotate": Rotate(randn(hidden), randn(hidden), 40.0, **place),
        "Rotate, relative": Rotate(randn(hidden), randn(hidden), -70.0, relative=True, **place),
        "Probe": Probe(randn(2, hidden), **place),
        "Add, keep_norm": Add(randn(hidden), 3.0, keep_norm=True, **place),
        "Add, positions": Add(randn(hidden), -1.0, positions="[-3:0]", **place),
        "Add, dot gate": Add(randn(hidden), -2.0, when=gate("dot"), **place),
        "Ablate, cosine gate": Ablate(randn(hidden), when=gate("cosine", above=False), **place),
        "Add, latched gate": Add(randn(hidden), 1.0, when=gate("dot", latched=True), **place),
    }


KINDS = tuple(interventions(4, torch.Generator()))


class Case:
    """Random rows and the tables of one site that steer them: on the CPU, and on the device of a back end.

    Args:
        plans: the kinds of intervention of each plan. Rows run the plans in turn, and every seventh row none.
    """

    def __init__(
        self, plans: Sequence[Sequence[str]], rows: int, hidden: int, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        compiled = [Plan([interventions(hidden, generator)[kind] for kind in kinds]) for kinds in plans]
        program = Program(1, hidden, Capacity.of(compiled, 1, hidden))
        program.change(dict(enumerate(compiled)))
        number = torch.arange(rows)
        slot = torch.where(number % 7 == 6, -1, number % len(plans)).int()
        x, residual = (torch.randn(rows, hidden, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(hidden, generator=generator).to(dtype)
        gate_state = torch.rand(GATES, rows, generator=generator) < 0.5
        where = torch.stack((slot, (number % 5 - 3).int(), number.int()))
        self.cpu = Arguments(x, residual, weight, program.tables(0), where, gate_state)
        self.device = self.cpu.to(device)
        self.columns = program.columns[0]
        self.norm = x.double().norm(dim=1) + residual.double().norm(dim=1)
        self.size = self.norm * self.cpu.tables.bank.abs().max()  # of what a vector adds to an element
        self.gated = any(intervention.when is not None for plan in compiled for intervention in plan)
        self.title = f"{rows} rows of {hidden}, {str(dtype).removeprefix('torch.')}"
        self.plans = ["no plan" if s < 0 else " + ".join(plans[i % len(plans)]) for i, s in enumerate(slot.tolist())]


def _tables_on(tables: Tables, device: str) -> Tables:
    bank, entries, ranges = (t.to(device) for t in tables[:3])
    return Tables(bank, entries, ranges, tables.depth, tables.width)


@dataclass(frozen=True)
class Arguments:
    """What the ops are called with."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    tables: Tables
    rows: Tensor
    gate_state: Tensor

    def to(self, device: str) -> Arguments:
        x, residual, weight, gate_state = (t.to(device) for t in (self.x, self.residual, self.weight, self.gate_state))
        return Arguments(x, residual, weight, _tables_on(self.tables, device), self.rows.to(device), gate_state)

    @property
    def steering(self) -> tuple[Tables, Tensor, Tensor]:
        return self.tables, self.rows, self.gate_state

    def moved_thresholds(self, by: float) -> tuple[Tables, Tensor, Tensor]:
        """The same with the thresholds of all gates moved by as much as rounding may move a gate's value: `by` times
        n u for a cosine of n products, u = 2^-24, and times the norm of the largest row for a dot product with a unit
        vector. Interventions before the gate may make a row 8 times as large."""
        hidden = self.x.shape[1]
        largest = 8 * float((self.x.double().norm(dim=1) + self.residual.double().norm(dim=1)).max())
        slack = (hidden + 32) * EPS32 / 2
        entries = self.tables.entries.clone()
        cosine = entries[:, Field.GATE_MODE].abs() == GateMode.COSINE
        entries.view(torch.float32)[:, Field.THRESHOLD] += by * torch.where(cosine, 2 * slack, slack * largest)
        return self.tables._replace(entries=entries), self.rows, self.gate_state


def cases(backend: ops.Backend, device: str) -> list[Callable[[], Case]]:
    """For each hidden size and dtype a case with every kind of intervention by itself, then random mixes. Shapes that
    make another launch of the kernels; few where a compiler or an interpreter takes longer than the check."""
    on_gpu = device == "cuda"
    many, few = (150, 32) if on_gpu else (2 * len(KINDS), 9)
    sizes = [4096, 111] if on_gpu else [896, 111]
    if backend == "triton":
        sizes = sizes[:1] if on_gpu else [64]
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    shapes = [(hidden, dtype, device) for hidden in sizes for dtype in DTYPES]
    # Each plan twice or more, since every seventh row has none.
    listed = [functools.partial(Case, [[kind] for kind in KINDS], many, *shape, seed=0) for shape in shapes]
    for shape in shapes:
        for seed in range(MIXES):
            plans = [[KINDS[draw(len(KINDS))] for _ in range(1 + draw(6))] for _ in range(1 + draw(6))]
            listed.append(functools.partial(Case, plans, 1 + draw(few), *shape, seed=1 + seed))
    return listed  # type: ignore[return-value]


# Checking a back end --------------------------------------------------------------------------------------------------


@dataclass
class BackendCheck:
    """What became of a back end's check.

    Attributes:
        works, reason: as `faststeer.ops.states` has it.
        device: where it was checked.
        cases, of: how many random programs were run, of how many; fewer where the time was up.
        largest_error: as a share of the tolerance, over all rows and ops; `where`: op, shape and the row's plan.
        disagreements: what is wrong, in words; `n_disagreements` of them, the first few described.
        replays: whether a captured graph ran the plan that was loaded between two replays; None: there is no GPU.
    """

    works: bool
    reason: str
    device: str = ""
    cases: int = 0
    of: int = 0
    largest_error: float = 0.0
    where: str = ""
    n_disagreements: int = 0
    disagreements: list[str] = field(default_factory=list)
    replays: bool | None = None

    @property
    def passed(self) -> bool | None:
        """None: nothing was checked."""
        return None if not self.cases and not self.n_disagreements else self.n_disagreements == 0

    def disagree(self, what: str) -> None:
        self.n_disagreements += 1
        if len(self.disagreements) < MOST_DISAGREEMENTS:
            self.disagreements.append(what)

    def note(self, op: str, case: Case, shares: Tensor) -> None:
        """Take notice of each row's error `[rows]` in one op."""
        worst = int(shares.argmax())
        share, where = float(shares[worst]), f"{op}, {case.title}, {case.plans[worst]}"
        if share > self.largest_error:
            self.largest_error, self.where = share, where
        if share > 1:
            self.disagree(f"{where}: the error is {share:.3g} times what is allowed")

    def same(self, op: str, case: Case, ours: Tensor, expected: Tensor, rows: Tensor, meaning: str) -> None:
        """Take notice of rows that must have the same bits."""
        differs = (_bits(ours) != _bits(expected)).flatten(1).any(1) & rows
        if differs.any():
            first = int(differs.int().argmax())
            self.disagree(f"{op}, {case.title}, {case.plans[first]}: {meaning}, but {int(differs.sum())} rows differ")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that is no number is null."""
        error = self.largest_error if self.largest_error < float("inf") else None
        return asdict(self) | {"passed": self.passed, "largest_error": error}


def tolerance(exact: Tensor, plain: Tensor, dtype: torch.dtype, size: Tensor) -> Tensor:
    """`[rows]`: 2 |plain PyTorch - fp64| + one rounding of the row's largest element + one rounding, in fp32, of a sum
    as large as `size`. By row, in its largest error: elements share the row's dot products."""
    largest = torch.finfo(dtype).eps * exact.abs().amax(1)
    return 2 * (plain.double() - exact).abs().amax(1) + largest + EPS32 / 2 * size


def _shares(ours: Tensor, exact: Tensor, plain: Tensor, size: Tensor) -> Tensor:
    error = (ours.cpu().double() - exact).abs().amax(1)
    share = torch.where(error == 0, 0, error / tolerance(exact, plain, ours.dtype, size))
    return share.nan_to_num(nan=float("inf"))


def _bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


def check_ops(case: Case, backend: ops.Backend, check: BackendCheck) -> None:
    """Every op of a back end against the reference in fp64 and, where two of them must agree, against each other."""
    cpu, on_device = case.cpu, case.device
    _check_steer(case, backend, check)
    added, decided = _check_add_steer(case, backend, check)
    everywhere = torch.ones(len(cpu.x), dtype=torch.bool)
    for fp32_weight, offset in ((False, 0.0), (True, 1.0)):
        norm = EPS, offset, fp32_weight
        normed, hidden = ops.add_steer_rmsnorm(
            on_device.x, on_device.residual, on_device.weight, *norm, *on_device.steering, backend=backend
        )
        check.same("add_steer_rmsnorm", case, hidden, added, everywhere, "the sum is add_steer's")
        exact = reference.rmsnorm(hidden.cpu().double(), cpu.weight.double(), *norm)
        plain = reference.rmsnorm(hidden.cpu(), cpu.weight, *norm)
        check.note("add_steer_rmsnorm", case, _shares(normed, exact, plain, case.size))
    _check_pair(case, backend, added, decided, check)
    _check_latch(case, backend, check)


def _expected(case: Case, s: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in fp64, and which of them are the same however rounding decides their gates."""
    exact = reference.steer(s.double(), *case.cpu.steering, probe)
    decided = torch.ones(len(s), dtype=torch.bool)
    for by in (-1.0, 1.0) if case.gated else ():
        decided &= (reference.steer(s.double(), *case.cpu.moved_thresholds(by), probe.clone()) == exact).all(1)
    return exact, decided


def _check_rows(case: Case, op: str, s: Tensor, ours: Tensor, seen: Tensor, check: BackendCheck) -> Tensor:
    """What an op made of the rows s `[rows, hidden]`, and what it probed. Returns which rows rounding cannot turn."""
    cpu = case.cpu
    exact_probe = torch.zeros(len(s), case.columns, dtype=torch.float64)
    plain_probe = exact_probe.float()
    exact, decided = _expected(case, s, exact_probe)
    plain = reference.steer(s, *cpu.steering, plain_probe)
    shares = _shares(ours, exact, plain, case.size)
    check.note(op, case, torch.where(decided, shares, 0))
    check.same(op, case, ours, s, cpu.rows[0] < 0, "a row without a plan keeps its bits")
    if case.columns:
        # The error of a dot product is bounded by the row's norm, since the direction is a unit vector.
        allowed = 2 * (plain_probe - exact_probe).abs() + 8 * EPS32 * case.norm.unsqueeze(1)
        share = ((seen.cpu().double() - exact_probe).abs() / allowed).amax(1).nan_to_num(nan=float("inf"))
        check.note(f"{op}, probes", case, torch.where(decided, share, 0))
    return decided


def _check_steer(case: Case, backend: ops.Backend, check: BackendCheck) -> None:
    on_device = case.device
    seen = torch.full((len(on_device.x), case.columns), float("nan"), device=on_device.x.device)
    ours = ops.steer(on_device.x, *on_device.steering, seen, backend=backend)
    _check_rows(case, "steer", case.cpu.x, ours, seen, check)


def _check_add_steer(case: Case, backend: ops.Backend, check: BackendCheck) -> tuple[Tensor, Tensor]:
    cpu, on_device = case.cpu, case.device
    seen = torch.full((len(on_device.x), case.columns), float("nan"), device=on_device.x.device)
    added = ops.add_steer(on_device.x, on_device.residual, *on_device.steering, seen, backend=backend)
    return added, _check_rows(case, "add_steer", cpu.x + cpu.residual, added, seen, check)


def _check_pair(case: Case, backend: ops.Backend, added: Tensor, decided: Tensor, check: BackendCheck) -> None:
    """(0, what add_steer gives) where something acts, else the pair as it was."""
    cpu, on_device = case.cpu, case.device
    x, residual = cpu.x.clone(), cpu.residual.clone()
    reference.steer_pair_(x, residual, *cpu.steering)
    acted = ~x.any(1)
    ours = on_device.x.clone(), on_device.residual.clone()
    ops.steer_pair_(ours[0], ours[1], *on_device.steering, backend=backend)
    for part, steered, before in zip(
        ours, (torch.zeros_like(added), added), (on_device.x, on_device.residual), strict=True
    ):
        check.same("steer_pair_", case, part, steered, acted & decided, "a row becomes (0, what add_steer gives)")
        check.same("steer_pair_", case, part, before, ~acted & decided, "a row that nothing acts on keeps its bits")


def _check_latch(case: Case, backend: ops.Backend, check: BackendCheck) -> None:
    cpu, on_device = case.cpu, case.device
    low, high = (cpu.gate_state.clone() for _ in range(2))
    for by, state in ((-1.0, low), (1.0, high)):
        tables, rows, _ = cpu.moved_thresholds(by)
        reference.latch_(cpu.x.double(), None, tables, rows, state)
    ours = on_device.gate_state.clone()
    ops.latch_(on_device.x, on_device.tables, on_device.rows, ours, backend=backend)
    wrong = (low == high) & (ours.cpu() != low)
    if wrong.any():
        check.disagree(f"latch_, {case.title}: {int(wrong.sum())} gates are decided otherwise")


def check_replays(backend: ops.Backend, device: str, check: BackendCheck) -> None:
    """A steered op of a decode step, captured once: what is loaded into a slot between two replays is what runs."""
    hidden, rows = 1024, 8
    generator = torch.Generator().manual_seed(0)
    kinds = interventions(hidden, generator)
    plans = [Plan([kinds[name]]) for name in ("Ablate", "Add")]
    program = Program(1, hidden, Capacity.of(plans, 1, hidden), device)
    program.load(0, plans[0])
    where = torch.zeros(3, rows, dtype=torch.int32, device=device)
    x = torch.randn(rows, hidden, generator=generator).to(device, torch.bfloat16)
    replay, result = capture(lambda: ops.steer(x, program.tables(0), where, backend=backend), device)
    check.replays = True
    for plan, name in zip(plans, ("Ablate", "Add"), strict=True):
        program.load(0, plan)
        replay()
        measure.synchronize(device)
        at = tables, _ = _tables_on(program.tables(0), "cpu"), where.cpu()
        exact, plain = (reference.steer(t, *at) for t in (x.cpu().double(), x.cpu()))
        size = x.cpu().double().norm(dim=1) * tables.bank.abs().max()
        if not (_shares(result, exact, plain, size) <= 1).all():
            check.replays = False
            check.disagree(f"a replay of a captured graph did not run the plan in its slot, {name}")


def capture(run: Callable[[], Tensor], device: str) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `run`: what replays it, and where its result is."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # what is compiled or loaded at its first use
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    return graph.replay, result


def check_backend(backend: ops.Backend, device: str, end: float) -> BackendCheck:
    """All cases, or as many as begin before `end` on `time.monotonic`, at the least the first, which has every kind of
    intervention. What a back end raises is a disagreement."""
    state = ops.states()[backend]
    check = BackendCheck(state.works, state.reason)
    if not state.works:
        return check
    check.device = device
    listed = cases(backend, device)
    check.of = len(listed)
    try:
        for make in listed:
            if check.cases and time.monotonic() > end:
                break
            check_ops(make(), backend, check)
            check.cases += 1
        if device == "cuda" and time.monotonic() < end:
            check_replays(backend, device, check)
    except Exception as error:
        check.disagree(f"it raised {type(error).__name__}: {str(error).strip()[:300]}")
    return check


def device_of(backend: ops.Backend) -> str:
    """Where a back end that works is checked: on the GPU, if there is one that it runs on."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


# Times ----------------------------------------------------------------------------------------------------------------


def time_kernels(backends: Sequence[ops.Backend], end: float) -> Iterator[dict[str, Any]]:
    """Time of an op with one ablation per row against a copy of as many bytes, in two records per back end: `steer`,
    which a hook calls, and `add_steer_rmsnorm`, of which fused layers are made. The reference is timed where it is all
    there is, Triton's interpreter never."""
    for backend in [name for name in backends if name != "reference"] or backends:
        device = device_of(backend)
        on_gpu = device == "cuda"
        if backend == "triton" and not on_gpu:
            continue
        rows, hidden, dtype = (8192, 4096, torch.bfloat16) if on_gpu else (512, 4096, torch.float32)
        about = {"backend": backend, "device": device, "rows": rows, "hidden": hidden}
        about |= {"dtype": str(dtype).removeprefix("torch.")}
        for op in ("steer", "add_steer_rmsnorm"):
            record: dict[str, Any] = {"op": op, **about}
            if time.monotonic() > end:
                yield record | {"skipped": "out of time"}
                continue
            try:
                yield record | _against_copy(op, backend, rows, hidden, dtype, device)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                yield record | {"failed": str(error).strip().split("\n")[0][:300]}


def _against_copy(
    op: str, backend: ops.Backend, rows: int, hidden: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    plan = Plan([Ablate(torch.randn(hidden, generator=torch.Generator().manual_seed(0)), layers=0, at="resid_pre")])
    program = Program(1, hidden, Capacity(1, 1, 1), device)
    program.load(0, plan)
    where, tables = torch.zeros(3, rows, dtype=torch.int32, device=device), program.tables(0)
    n_bytes = measure.TENSORS_MOVED[op] * rows * hidden * dtype.itemsize
    sets = measure.tensor_sets(n_bytes, most=8)
    x, residual = (torch.randn(sets, rows, hidden, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=dtype)

    def run(i: int) -> Any:
        if op == "steer":
            return ops.steer(x[i], tables, where, backend=backend)
        return ops.add_steer_rmsnorm(x[i], residual[i], weight, EPS, 0.0, False, tables, where, backend=backend)

    replays = 3 if backend == "reference" else 7
    timing = measure.time_calls(run, sets if device == "cuda" else 2, device, replays=replays)
    copy, _ = measure.copy_bandwidth(device, n_bytes // 2, replays=7)
    speed = n_bytes / max(timing.us, 1e-3) * 1e6
    record = asdict(timing) | {"gb_per_s": round(speed / 1e9, 2), "copy_gb_per_s": round(copy / 1e9, 2)}
    return record | {"percent_of_copy": round(100 * speed / copy, 1)}


def time_steps(device: str, end: float, *, rows: int = 16, tokens: int = 16) -> Iterator[dict[str, Any]]:
    """Milliseconds of a decode step of the demo model, a vector added at every layer: `generate` unsteered, with a
    hand-written hook and inside `fs.steer`, and the Engine unsteered and steered. `against_unsteered` divides by the
    step of the same kind without steering."""
    from faststeer import demo

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = demo.load(dtype=dtype)[0].to(device)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = []  # all rows draw all tokens
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = 0.01 * vector / vector.norm()
    plan = Plan([Add(vector, layers="all", at="resid_post")])
    ids = torch.randint(5, model.config.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(0)).to(device)
    listed = ids.tolist()
    engine: Engine | None = None

    def generate(n: int) -> None:
        settings = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def inside(context: Callable[[], Any]) -> Callable[[int], None]:
        def run(n: int) -> None:
            with context():
                generate(n)

        return run

    def by_engine(plans: Plan | None) -> Callable[[int], None]:
        def run(n: int) -> None:
            nonlocal engine
            engine = engine or Engine(model, _Untokenized(), max_batch=rows, max_length=ids.shape[1] + tokens + 1)
            for completion in engine.generate(listed, plans, max_new_tokens=n):
                if completion.error is not None:
                    raise RuntimeError(str(completion.error))

        return run

    parts = {
        "generate": inside(nullcontext),
        "generate, hand-written hook": inside(lambda: _hand_written(model, vector)),
        "generate, fs.steer": inside(lambda: steer(model, plan)),
        "Engine": by_engine(None),
        "Engine, steered": by_engine(plan),
    }
    unsteered: dict[str, float] = {}
    for name, run in parts.items():
        kind = name.partition(",")[0]
        record: dict[str, Any] = {"what": name, "device": device, "rows": rows}
        record |= {"dtype": str(dtype).removeprefix("torch.")}
        if time.monotonic() > end:
            yield record | {"skipped": "out of time"}
            continue
        try:
            timing = measure.time_steps(run, tokens, device)
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            yield record | {"failed": str(error).strip().split("\n")[0][:300]}
            continue
        record |= asdict(timing)
        if name == kind:
            unsteered[kind] = timing.step_ms
        elif unsteered.get(kind):
            record["against_unsteered"] = round(timing.step_ms / unsteered[kind], 3)
        if kind == "Engine" and engine is not None:
            record["path"] = engine.path
        yield record


@contextmanager
def _hand_written(model: Any, vector: Tensor) -> Iterator[None]:
    """What people write: a forward hook on every layer."""
    addend = vector.to(model.device, model.dtype)
    handles = [layer.register_forward_hook(lambda _m, _a, out: out + addend) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Untokenized:
    """Prompts are token ids, and nobody reads the text."""

    chat_template = eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


# All of it ------------------------------------------------------------------------------------------------------------


def verify(
    backend: str | None = None, seconds: float = 100.0, progress: Callable[[str], Any] = lambda what: None
) -> dict[str, Any]:
    """Check every back end that works here and measure what steering costs.

    Args:
        backend: check and time the kernels of this one alone; None: all.
        seconds: nothing new is begun after so long.
        progress: called with what is done next.

    Returns:
        What JSON can hold: `versions`, `machine`, `backends` (`BackendCheck` by name), `kernels` and `steps` (records
        of `time_kernels` and `time_steps`), `passed`, `seconds`.

    Raises:
        ValueError: an unknown back end, or one that does not work here.
    """
    begun, states = time.monotonic(), ops.states()
    if backend is not None and backend not in states:
        raise ValueError(f"unknown back end {backend!r}: expected {', '.join(states)}")
    if backend is not None and not states[backend].works:
        raise ValueError(f"the back end {backend!r} does not work here: {states[backend].reason}")
    names = [name for name in states if backend in (None, name)]
    working = [name for name in names if states[name].works]
    gpu = torch.cuda.is_available()
    checks = {}
    with torch.no_grad():
        for i, name in enumerate(names):
            progress(f"checking {name}")
            # What others left over is for those that come behind.
            now, last = time.monotonic(), begun + CHECKS_UNTIL * seconds
            remaining = sum(other in working for other in names[i:])
            checks[name] = check_backend(name, device_of(name), now + (last - now) / max(remaining, 1))
        progress("timing the kernels")
        kernels = list(time_kernels(working, begun + KERNELS_UNTIL * seconds))
    progress("timing decode steps of the demo model")
    steps = list(time_steps("cuda" if gpu else "cpu", begun + seconds))
    return {
        "versions": versions() | {"python": platform.python_version(), "triton": measure.version("triton")},
        "machine": measure.machine() | {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "backends": {name: check.to_dict() for name, check in checks.items()},
        "kernels": kernels,
        "steps": steps,
        "passed": not any(check.n_disagreements for check in checks.values()),
        "seconds": round(time.monotonic() - begun, 1),
    }
