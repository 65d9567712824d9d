"""What the kernel benchmarks run: plans, rows, and the same steering as anybody would write it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from faststeer.intervention import Ablate, Add, Clamp, Rotate
from faststeer.ops import Rows, Tables
from faststeer.plan import Plan
from faststeer.program import Capacity, Program

STEERINGS = ("none", "add", "ablate", "mixed4")


def plan(steering: str, hidden: int, generator: torch.Generator) -> Plan:
    """A plan at the first site: nothing, one addition, one ablation, or four different interventions."""
    directions = iter(torch.randn(8, hidden, generator=generator))
    here = {"layers": 0, "at": "resid_pre"}
    interventions = {
        "none": lambda: [],
        "add": lambda: [Add(next(directions), 1.0, **here)],
        "ablate": lambda: [Ablate(next(directions), **here)],
        "mixed4": lambda: [
            Add(next(directions), 0.5, **here),
            Ablate(next(directions), **here),
            Clamp(next(directions), low=0.0, **here),
            Rotate(next(directions), next(directions), 30.0, relative=True, **here),
        ],
    }
    return Plan(interventions[steering]())


@dataclass
class Case:
    """Rows of a tensor and the tables that steer them."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    tables: Tables
    rows: Rows
    plans: list[Plan]


def case(
    steering: str, rows: int, hidden: int, dtype: torch.dtype, device: str, n_plans: int = 1, seed: int = 0
) -> Case:
    """`rows` rows of which row r runs plan r modulo `n_plans`."""
    generator = torch.Generator().manual_seed(seed)
    plans = [plan(steering, hidden, generator) for _ in range(n_plans)]
    program = Program(1, hidden, Capacity.of(plans, 1, hidden), device)
    slots = program.load_all(plans)
    slot = torch.tensor(slots, dtype=torch.int32, device=device)[torch.arange(rows, device=device) % n_plans]
    zeros = torch.zeros(rows, dtype=torch.int32, device=device)
    x, residual = (torch.randn(rows, hidden, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=generator).to(device, dtype)
    return Case(x, residual, weight, program.tables(0), Rows(slot.contiguous(), zeros, zeros), plans)


def eager_hook(
    steering: str, hidden: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """The hook that people write: the first intervention of `plan`, in the tensor's dtype."""
    direction = torch.randn(8, hidden, generator=torch.Generator().manual_seed(seed))[0].to(device, dtype)
    if steering == "add":
        return lambda x: x + 1.0 * direction
    unit = direction / direction.norm()
    return lambda x: x - (x @ unit).unsqueeze(-1) * unit
