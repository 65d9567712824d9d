"""The reference as operators that a compiler does not look into: `torch.ops.faststeer.steer.reference`, and so on, with
the schemas and checks of the compiled back ends. For graphs that stay while plans change: traced, the reference would
be fixed to the plans of the moment, since its loops are as long as they are. Without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from faststeer.ops import reference, schema
from faststeer.ops.tables import Rows


def _steer(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    schema.check_steer(x, *rest)
    *tables, slot, position, sequence, gate_state, columns = rest
    probe = x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    rows = Rows(slot, position, sequence)
    return reference.steer(x, schema.host_tables(*tables), rows, gate_state, probe if columns else None), probe


def _steer_pair_(x: Tensor, residual: Tensor, *rest: Any) -> None:
    schema.check_steer_pair_(x, residual, *rest)
    *tables, slot, position, sequence, gate_state, probe = rest
    rows = Rows(slot, position, sequence)
    reference.steer_pair_(x, residual, schema.host_tables(*tables), rows, gate_state, probe)


def _latch_(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    schema.check_latch_(x, residual, *rest)
    *tables, slot, position, sequence, gate_state = rest
    s = x if residual is None else x + residual
    reference.latch(s, schema.host_tables(*tables), Rows(slot, position, sequence), gate_state)


for _name, _run in (("steer", _steer), ("steer_pair_", _steer_pair_), ("latch_", _latch_)):
    schema.library.define(f"{_name}.reference{schema.SCHEMAS[_name]}", tags=(torch.Tag.pt2_compliant_tag,))
    schema.library.impl(f"{_name}.reference", _run, "CompositeExplicitAutograd")
    _op = getattr(torch.ops.faststeer, _name).reference
    torch.library.register_fake(_op, schema.fake(_name), lib=schema.library)
