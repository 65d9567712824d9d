"""Random steering for any back end and device, and the bound on its error; test_backends.py and tests/gpu share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from placing import placed
from torch import Tensor

import faststeer as fs
from faststeer import ops
from faststeer.ops import Tables
from faststeer.program import Capacity, Program

KINDS = ("Add", "Ablate", "Ablate3", "Project", "Clamp", "Rotate", "RotateRelative", "Probe", "KeepNorm", "Gated")


@dataclass
class Steered:
    """Rows, and the tables of one site that steer them."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    tables: Tables
    rows: Tensor
    gate_state: Tensor
    columns: int
    program: Program


def intervention(kind: str, hidden: int, generator: torch.Generator) -> fs.Intervention:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    here = {"layers": 0, "at": "resid_pre"}
    d = randn(hidden)
    return {
        "Add": lambda: fs.Add(d, 1.5, **here),
        "Ablate": lambda: fs.Ablate(d, probe=True, **here),
        "Ablate3": lambda: fs.Ablate(randn(min(3, hidden), hidden), strength=0.7, **here),
        "Project": lambda: fs.Project(randn(min(2, hidden), hidden), **here),
        "Clamp": lambda: fs.Clamp(d, low=-0.5, high=0.25, **here),
        "Rotate": lambda: fs.Rotate(d, randn(hidden), 40.0, **here),
        "RotateRelative": lambda: fs.Rotate(d, randn(hidden), -70.0, relative=True, positions="generated", **here),
        "Probe": lambda: fs.Probe(randn(min(2, hidden), hidden), **here),
        "KeepNorm": lambda: fs.Add(d, 3.0, keep_norm=True, positions="[-3:]", **here),
        # Half of the rows pass a gate at 0; none is within rounding of a threshold far outside.
        "Gated": lambda: fs.Add(d, -2.0, when=fs.Gate(randn(hidden), -1e4, kind="dot"), **here),
    }[kind]()


def steered(kinds: list[list[str]], rows: int, hidden: int, dtype: torch.dtype, device: str, seed: int) -> Steered:
    """One plan per list of kinds; rows run them in turn, and every seventh row none."""
    generator = torch.Generator().manual_seed(seed)
    plans = [fs.Plan([intervention(kind, hidden, generator) for kind in listed]) for listed in kinds]
    program = Program(1, hidden, Capacity.of(plans, 1, hidden), device)
    program.change(dict(enumerate(plans)))
    number = torch.arange(rows)
    slot = torch.where(number % 7 == 6, -1, number % len(plans)).int()
    position = (number % 5 - 3).int()
    x, residual = (torch.randn(rows, hidden, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=generator).to(device, dtype)
    gate_state = torch.rand(4, rows + 1, generator=generator).lt(0.5).to(device)
    where = placed(slot, position, number).to(device)
    return Steered(x, residual, weight, program.tables(0), where, gate_state, program.columns[0], program)


def check_close(found: Tensor, case: Steered, expected: Tensor, reference: Tensor, what: str) -> None:
    """|found - fp64| <= 2 |reference in the same dtype - fp64| + one rounding of the row's largest element + one
    rounding, in fp32, of a sum as large as the row, along the direction with the largest element.

    The bound is per row, in the largest error of the row: elements share the row's dot products, so their errors do
    not come one by one. The last term is for rows whose dot products the reference happens to sum without error.
    """
    found, reference = found.double(), reference.double()
    ours = (found - expected).abs().amax(-1)
    plain = (reference - expected).abs().amax(-1)
    size = (case.x.double().norm(dim=1) + case.residual.double().norm(dim=1)) * case.tables.bank.abs().max()
    floor = torch.finfo(case.x.dtype).eps * expected.abs().amax(-1) + torch.finfo(torch.float32).eps / 2 * size
    worst = (ours - 2 * plain - floor).amax() if ours.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"{what}: error {ours.max():.3g}, reference {plain.max():.3g}, excess {worst:.3g}"


def by_reference(x: Tensor, case: Steered, probe: Tensor) -> Tensor:
    """The reference on some rows at a time, which stay in the processor's cache: no row depends on another."""
    some = max(1, 2**18 // x.shape[1])
    parts = zip(*(whole.split(some) for whole in (x, case.rows.T, probe)), strict=True)
    return torch.cat([ops.reference.steer(x, case.tables, rows.T, case.gate_state, seen) for x, rows, seen in parts])


def check_ops(case: Steered, backend: ops.Backend) -> None:
    """The steering ops of `backend` against the reference in fp64 and in the same dtype."""
    x, residual, weight = case.x, case.residual, case.weight
    rows = x.shape[0]

    def probe(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(rows, case.columns, dtype=dtype, device=x.device)

    arguments = case.tables, case.rows, case.gate_state
    exact, plain, ours = probe(torch.float64), probe(), probe()
    expected, same = by_reference(x.double(), case, exact), by_reference(x, case, plain)
    found = ops.steer(x, *arguments, ours, backend=backend)
    check_close(found, case, expected, same, "steer")
    check_probe(ours, exact, plain, x)
    idle = case.rows[0] < 0
    assert torch.equal(bits(found[idle]), bits(x[idle])), "a row without a plan changed"

    s = x + residual
    exact, plain, ours = probe(torch.float64), probe(), probe()
    expected, same = by_reference(s.double(), case, exact), by_reference(s, case, plain)
    found = ops.add_steer(x, residual, *arguments, ours, backend=backend)
    check_close(found, case, expected, same, "add_steer")
    check_probe(ours, exact, plain, s)
    check_pair(case, found, ours, backend)
    assert torch.equal(bits(found[idle]), bits(s[idle])), "the sum of a row without a plan differs"
    for fp32_weight, offset in ((False, 0.0), (True, 1.0)):
        norm = weight, 1e-6, offset, fp32_weight
        normed, hidden = ops.add_steer_rmsnorm(x, residual, *norm, *arguments, backend=backend)
        assert torch.equal(bits(hidden), bits(found)), "the residual differs from add_steer's"
        exact_norm = ops.reference.rmsnorm(hidden.double(), weight.double(), 1e-6, offset, fp32_weight)
        same_norm = ops.reference.rmsnorm(hidden, *norm)
        check_close(normed, case, exact_norm, same_norm, f"rmsnorm, fp32_weight={fp32_weight}")


def check_pair(case: Steered, added: Tensor, seen: Tensor, backend: ops.Backend) -> None:
    """`steer_pair_` of `backend` against its `add_steer`, which gave `added` and `seen`; rows and probe have room for
    more than x's."""
    n, more = len(case.x), 3
    where = torch.nn.functional.pad(case.rows, (0, more))
    probe = torch.full((n + more, case.columns), 7.0, device=case.x.device)
    expected, found = ((case.x.clone(), case.residual.clone()) for _ in range(2))
    ops.reference.steer_pair_(*expected, case.tables, case.rows, case.gate_state)
    acted = ~expected[0].any(1)
    ops.steer_pair_(*found, case.tables, where, case.gate_state, probe, backend=backend)
    for pair, steered_row in zip(found, (torch.zeros_like(added), added), strict=True):
        assert torch.equal(bits(pair[acted]), bits(steered_row[acted])), "not (0, what add_steer gives)"
    for pair, row in zip(found, (case.x, case.residual), strict=True):
        assert torch.equal(bits(pair[~acted]), bits(row[~acted])), "a pair that nothing acts on changed"
    has_entries = (case.rows[0] >= 0) & (case.tables.ranges[case.rows[0].clamp(min=0).long(), 1] > 0)
    assert torch.equal(probe[:n][has_entries], seen[has_entries]), "not what add_steer probes"
    assert (probe[:n][~has_entries] == 7).all() and (probe[n:] == 7).all(), "the probe of another row was written"


def check_probe(found: Tensor, exact: Tensor, plain: Tensor, x: Tensor) -> None:
    if not found.numel():
        return
    # A dot product's error is bounded by the row's norm (the direction is a unit vector), not by its own size.
    floor = torch.finfo(torch.float32).eps * x.double().norm(dim=1, keepdim=True) * 8
    assert ((found - exact).abs() <= 2 * (plain - exact).abs() + floor).all()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])
