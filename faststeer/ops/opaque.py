"""The reference as operators that a compiler does not look into: `torch.ops.faststeer.steer.reference`, and so on, with
the schemas and checks of the compiled back ends. For graphs that stay while plans change: traced, the reference would
be fixed to the plans of the moment, since its loops are as long as they are. Without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from faststeer.ops import reference
from faststeer.ops.schema import define, host_tables, implements

ANYWHERE = "CompositeExplicitAutograd"
for _name in ("steer", "steer_pair_", "latch_"):
    define(_name, "reference")


@implements("steer.reference", ANYWHERE)
def steer(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    bank, entries, ranges, rows, gate_state, scalars, columns = rest
    tables, probe = host_tables(bank, entries, ranges, scalars), x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    return reference.steer(x, tables, rows, gate_state, probe if columns else None), probe


@implements("steer_pair_.reference", ANYWHERE)
def steer_pair_(x: Tensor, residual: Tensor, *rest: Any) -> None:
    *tables, rows, gate_state, probe = rest
    reference.steer_pair_(x, residual, host_tables(*tables), rows, gate_state, probe)


@implements("latch_.reference", ANYWHERE)
def latch_(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    *tables, rows, gate_state = rest
    reference.latch_(x, residual, host_tables(*tables), rows, gate_state)
