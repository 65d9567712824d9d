"""What the kernel benchmarks run: plans, rows, and the same steering as anybody would write it in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from faststeer.intervention import Ablate, Add, Clamp, Rotate
from faststeer.ops import Field, Tables
from faststeer.plan import Plan
from faststeer.program import Capacity, Program

STEERINGS = ("none", "add", "ablate", "mixed4")
COEFFICIENT, MIXED_COEFFICIENT, DEGREES = 1.0, 0.5, 30.0


def directions(hidden: int, seed: int) -> Tensor:
    return torch.randn(8, hidden, generator=torch.Generator().manual_seed(seed))


def plan(steering: str, hidden: int, seed: int = 0) -> Plan:
    """A plan at the first site: nothing, one addition, one ablation, or four different interventions."""
    d = directions(hidden, seed)
    here = {"layers": 0, "at": "resid_pre"}
    interventions = {
        "none": lambda: [],
        "add": lambda: [Add(d[0], COEFFICIENT, **here)],
        "ablate": lambda: [Ablate(d[0], **here)],
        "mixed4": lambda: [
            Add(d[0], MIXED_COEFFICIENT, **here),
            Ablate(d[1], **here),
            Clamp(d[2], low=0.0, **here),
            Rotate(d[3], d[4], DEGREES, relative=True, **here),
        ],
    }
    return Plan(interventions[steering]())


def tables(steering: str, hidden: int, device: str, n_plans: int = 1, seed: int = 0) -> Tables:
    """Tables with `n_plans` plans in as many slots. Plan p has plan 0's vectors, turned by p columns: as good as its
    own for the kernels, and made in no time."""
    one = plan(steering, hidden, seed)
    program = Program(1, hidden, Capacity.of([one], 1, hidden), device)
    program.load(0, one)
    first, count = program.ranges[0, 0].tolist()
    entries = program.entries[first : first + count]
    n_vectors = int((entries[:, Field.VECTOR] + entries[:, Field.COUNT]).max()) if count else 1
    turned = (torch.arange(hidden, device=device) + torch.arange(n_plans, device=device).unsqueeze(1)) % hidden
    bank = program.bank[:n_vectors, turned].transpose(0, 1).reshape(n_plans * n_vectors, hidden).contiguous()
    entries = entries.repeat(n_plans, 1, 1)
    entries[:, :, Field.VECTOR] += n_vectors * torch.arange(n_plans, dtype=torch.int32, device=device).unsqueeze(1)
    starts = count * torch.arange(n_plans, dtype=torch.int32, device=device)
    ranges = torch.stack([starts, torch.full_like(starts, count)], dim=1)
    return Tables(bank, entries.flatten(0, 1), ranges, program.depth[0], program.width[0])


def rows_of(rows: int, n_plans: int, device: str, contiguous: bool = False) -> Tensor:
    """Row r runs plan r modulo `n_plans`; contiguous: rows of one plan stand together, as the tokens of a prompt do."""
    number, where = torch.arange(rows, device=device), torch.zeros(3, rows, dtype=torch.int32, device=device)
    where[0] = number * n_plans // rows if contiguous else number % n_plans
    return where


@dataclass
class Case:
    """Rows of a tensor and the tables that steer them."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    tables: Tables
    rows: Tensor


def case(
    steering: str, rows: int, hidden: int, dtype: torch.dtype, device: str, n_plans: int = 1, seed: int = 0
) -> Case:
    """`rows` rows of which row r runs plan r modulo `n_plans`."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, hidden, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=generator).to(device, dtype)
    return Case(x, residual, weight, tables(steering, hidden, device, n_plans, seed), rows_of(rows, n_plans, device))


def eager_hook(
    steering: str, hidden: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """The hook that people write for `plan(steering, ...)`, in the tensor's dtype."""
    d = directions(hidden, seed).to(device, dtype)
    if steering == "none":
        return lambda x: x
    if steering == "add":
        return lambda x: x + COEFFICIENT * d[0]
    unit = d / d.norm(dim=1, keepdim=True)
    if steering == "ablate":
        return lambda x: x - (x @ unit[0]).unsqueeze(-1) * unit[0]
    other = d[4] - (d[4] @ unit[3]) * unit[3]
    first, second = unit[3], other / other.norm()
    cos, sin = math.cos(math.radians(DEGREES)), math.sin(math.radians(DEGREES))

    def mixed4(x: Tensor) -> Tensor:
        x = x + MIXED_COEFFICIENT * d[0]
        x = x - (x @ unit[1]).unsqueeze(-1) * unit[1]
        p = (x @ unit[2]).unsqueeze(-1)
        x = x + (p.clamp(min=0) - p) * unit[2]
        p1, p2 = (x @ first).unsqueeze(-1), (x @ second).unsqueeze(-1)
        return x + ((p1 * cos - p2 * sin) - p1) * first + ((p1 * sin + p2 * cos) - p2) * second

    return mixed4
