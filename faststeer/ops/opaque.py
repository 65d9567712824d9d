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
from faststeer.ops.tables import Rows

ANYWHERE = "CompositeExplicitAutograd"
for _name in ("steer", "steer_pair_", "latch_"):
    define(_name, "reference")


@implements("steer.reference", ANYWHERE)
def steer(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tables, slot, position, sequence, gate_state, columns = rest
    probe = x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    rows = Rows(slot, position, sequence)
    return reference.steer(x, host_tables(*tables), rows, gate_state, probe if columns else None), probe


@implements("steer_pair_.reference", ANYWHERE)
def steer_pair_(x: Tensor, residual: Tensor, *rest: Any) -> None:
    *tables, slot, position, sequence, gate_state, probe = rest
    reference.steer_pair_(x, residual, host_tables(*tables), Rows(slot, position, sequence), gate_state, probe)


@implements("latch_.reference", ANYWHERE)
def latch_(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    *tables, slot, position, sequence, gate_state = rest
    s = x if residual is None else x + residual
    reference.latch(s, host_tables(*tables), Rows(slot, position, sequence), gate_state)
