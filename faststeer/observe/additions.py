"""What plans add to the residual stream, for analyses of added vectors. Plans that do anything else are refused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from faststeer.compile import Entry, compile_plan
from faststeer.ops.tables import EntryKind, GateMode
from faststeer.plan import Plan


def additions(plan: Plan, n_layers: int, hidden_size: int, analysis: str) -> Iterator[tuple[Entry, Tensor]]:
    """Yield the plan's entries but probes, each with the vector that it adds: `[hidden]` fp64 on the CPU.

    Raises:
        ValueError: a plan that does something else than add vectors, said of `analysis`.
    """
    for entry in compile_plan(plan, n_layers, hidden_size):
        if entry.kind == EntryKind.PROBE:
            continue
        if entry.kind != EntryKind.ADD or entry.gate_mode != GateMode.NONE or entry.keep_norm:
            gated = " with a gate" if entry.gate_mode != GateMode.NONE else " with keep_norm" * entry.keep_norm
            raise ValueError(
                f"{analysis}: the plan must hold Add alone (and Probe), without gates and keep_norm; it has "
                f"{entry.kind.name.capitalize()}{gated}"
            )
        yield entry, float(entry.scalars[0]) * entry.basis[0].detach().cpu().double()
