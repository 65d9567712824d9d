"""Contract 6 on the GPU: an op can be captured in a CUDA graph, and what the tables say at a replay is what happens;
it allocates its results and nothing else, none at a replay, and never waits for the device. Also: what torch.compile
and autograd make of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_cases import Steered, bits, check_close, intervention, steered
from device import CUDA, DEVICE, DTYPES, MARKS, allocations, captured, needs_device, no_synchronisation
from placing import numbers_of
from torch import Tensor

import faststeer as fs
from faststeer import ops

pytestmark = MARKS

MIXES = [["Add", "Ablate"], ["Ablate3", "Clamp", "Probe"], ["Rotate", "KeepNorm"], ["Project", "Add"], []]
NORM = 1e-6, 0.0, False


def calls(case: Steered, backend: str, columns: int) -> dict[str, Callable[[], Any]]:
    """Every op once, on one case."""
    probe = torch.zeros(len(case.x), columns, device=DEVICE) if columns else None
    arguments = case.tables, case.rows, case.gate_state
    run = functools.partial
    return {
        "steer": run(ops.steer, case.x, *arguments, probe, backend=backend),
        "add_steer": run(ops.add_steer, case.x, case.residual, *arguments, probe, backend=backend),
        "steer_pair_": run(ops.steer_pair_, case.x, case.residual, *arguments, probe, backend=backend),
        "add_steer_rmsnorm": run(
            ops.add_steer_rmsnorm, case.x, case.residual, case.weight, *NORM, *arguments, probe, backend=backend
        ),
        "latch_": run(ops.latch_, case.x, case.tables, case.rows, case.gate_state, backend=backend),
    }


RESULTS = {"steer": 1, "add_steer": 1, "steer_pair_": 0, "add_steer_rmsnorm": 2, "latch_": 0}


@needs_device
@pytest.mark.parametrize("op", RESULTS)
@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 4096), (300, 111), (300, 16384)])
def test_allocates_its_results_and_never_waits(kernels, op, columns, rows, hidden):
    case = steered(MIXES, rows, hidden, torch.bfloat16, DEVICE, seed=1)
    run = calls(case, kernels, columns)[op]
    run()
    with no_synchronisation():
        before = allocations()
        found = run()
        asked_for = allocations() - before
    assert asked_for <= RESULTS[op] + (columns > 0 and RESULTS[op] > 0), f"{asked_for} allocations"
    del found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 111), (33, 4096), (300, 896)] if CUDA else [(5, 64)])
def test_plans_change_between_replays(kernels, dtype, rows, hidden):
    """One graph of a small layer: latch, steer, add + steer + norm. Then other plans in the slots, other
    slots, positions and gates for the rows, and other rows, all by copy_."""
    case = steered(MIXES, rows, hidden, DTYPES[dtype], DEVICE, seed=2)
    program, x, state = case.program, case.x.clone(), case.gate_state.clone()
    probe = torch.zeros(rows, case.columns, device=DEVICE)

    def layer(x: Tensor, state: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tables, norm = program.tables(0), (case.weight, *NORM)
        ops.latch_(x, tables, case.rows, state, backend=kernels)
        steered = ops.steer(x, tables, case.rows, state, probe, backend=kernels)
        pair = ops.add_steer_rmsnorm(steered, case.residual, *norm, tables, case.rows, state, backend=kernels)
        return steered, *pair

    (steered_rows, normed, hidden_rows), replay = captured(lambda: layer(x, state, probe))
    generator = torch.Generator().manual_seed(3)
    addresses = [t.data_ptr() for t in (program.bank, program.entries, program.ranges)]
    for kinds in (MIXES, MIXES[::-1], [["Clamp"], ["Gated", "Add"], ["Latched"], ["Ablate"], ["Latched", "Probe"]]):
        for slot, listed in enumerate(kinds):
            program.load(slot, fs.Plan([any_intervention(kind, hidden, generator) for kind in listed]))
        case.rows[0].copy_(torch.randint(-1, len(kinds), (rows,), generator=generator))
        case.rows[1].copy_(torch.randint(-3, 3, (rows,), generator=generator))
        x.copy_(torch.randn(rows, hidden, generator=generator))
        state.copy_(torch.rand(state.shape, generator=generator) < 0.5)
        before = x.clone(), state.clone()
        eager = x.clone(), state.clone(), torch.zeros_like(probe)
        expected = layer(*eager)
        count = allocations()
        with no_synchronisation():
            replay()
            assert allocations() == count, "a replay allocates"
        for ours, theirs in zip((steered_rows, normed, hidden_rows, x, state, probe), (*expected, *eager), strict=True):
            assert torch.equal(ours, theirs)
        tables = program.tables(0)
        ops.latch_(before[0], tables, case.rows, before[1], backend="reference")
        assert torch.equal(state, before[1])
        added = steered_rows + case.residual
        for found, s, what in ((steered_rows, x, "steer"), (hidden_rows, added, "add_steer_rmsnorm")):
            exact, plain = (ops.reference.steer(t, tables, case.rows, state) for t in (s.double(), s))
            check_close(found, case, exact, plain, f"{what}, replayed")
    assert addresses == [t.data_ptr() for t in (program.bank, program.entries, program.ranges)]


def any_intervention(kind: str, hidden: int, generator: torch.Generator) -> fs.Intervention:
    if kind != "Latched":
        return intervention(kind, hidden, generator)
    d, of = (torch.randn(hidden, generator=generator) for _ in range(2))
    return fs.Add(d, 1.0, when=fs.Gate(of, 0.1, latched=True), layers=0, at="resid_pre")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 111), (33, 4096), (300, 896)] if CUDA else [(5, 64)])
def test_other_rows_of_a_pair_are_steered_at_a_replay(kernels, dtype, rows, hidden):
    """One graph for a server's buffers: slots change, and so which rows of the pair and the probe are written."""
    case = steered(MIXES, rows, hidden, DTYPES[dtype], DEVICE, seed=7)
    room = rows + 9
    buffers = torch.zeros(3, room, dtype=torch.int32, device=DEVICE)
    x, residual, probe = case.x.clone(), case.residual.clone(), torch.zeros(room, case.columns, device=DEVICE)

    def layer(x: Tensor, residual: Tensor, probe: Tensor) -> tuple[Tensor]:
        ops.steer_pair_(x, residual, case.tables, buffers, case.gate_state, probe, backend=kernels)
        return (x + residual,)

    (stream,), replay = captured(lambda: layer(x, residual, probe))
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        buffers[0].copy_(torch.randint(-1, len(MIXES), (room,), generator=generator))
        buffers[1].copy_(torch.randint(-3, 3, (room,), generator=generator))
        for tensor in (x, residual, probe):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        eager = x.clone(), residual.clone(), probe.clone()
        (expected,) = layer(*eager)
        with no_synchronisation():
            replay()
        for ours, theirs in zip((stream, x, residual, probe), (expected, *eager), strict=True):
            assert torch.equal(bits(ours), bits(theirs))


@needs_device
def test_runs_on_the_stream_that_is_current(kernels):
    case = steered(MIXES, 64, 4096, torch.bfloat16, DEVICE, seed=4)
    expected = ops.steer(2 * case.x, case.tables, case.rows, case.gate_state, backend=kernels)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        doubled = 2 * case.x  # too late for an op that is not on this stream
        found = ops.steer(doubled, case.tables, case.rows, case.gate_state, backend=kernels)
    side.synchronize()
    assert torch.equal(bits(found), bits(expected))


def test_compiles_into_one_graph(kernels):
    case = steered(MIXES, 40 if CUDA else 5, 256 if CUDA else 64, torch.bfloat16, DEVICE, seed=5)

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        arguments = case.tables, case.rows, case.gate_state
        normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, *NORM, *arguments, backend=kernels)
        return ops.steer(hidden, *arguments, backend=kernels), normed

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if CUDA else "eager")
    arguments = case.x, case.residual, case.weight
    for ours, theirs in zip(compiled(*arguments), run(*arguments), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("op", ["steer", "add_steer", "add_steer_rmsnorm"])
def test_gradients_are_the_references(kernels, op):
    case = steered(MIXES, 9, 48, torch.float32, DEVICE, seed=6)
    grads = {}
    for name in (kernels, "reference"):
        numbers = numbers_of(case.tables.entries)[:, ops.Field.A : ops.Field.B + 1]
        leaves = (case.x, case.residual, case.weight, case.tables.bank, numbers)
        x, residual, weight, bank, scalars = (leaf.clone().requires_grad_() for leaf in leaves)
        arguments = case.tables._replace(bank=bank, scalars=scalars), case.rows, case.gate_state
        if op == "steer":
            out = ops.steer(x, *arguments, backend=name)
        elif op == "add_steer":
            out = ops.add_steer(x, residual, *arguments, backend=name)
        else:
            normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, 1e-6, 1.0, True, *arguments, backend=name)
            out = normed + 3 * hidden
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
        grads[name] = [leaf.grad for leaf in (x, residual, weight, bank, scalars) if leaf.grad is not None]
    assert len(grads[kernels]) == {"steer": 3, "add_steer": 4, "add_steer_rmsnorm": 5}[op]
    for ours, theirs in zip(grads[kernels], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_device
def test_auto_takes_the_cuda_back_end():
    with fs.backend("auto"):
        assert ops.backend_for("cuda") == "cuda"
