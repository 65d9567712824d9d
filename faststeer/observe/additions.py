"""What plans add to the residual stream, for analyses of added vectors. Plans that do anything else are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faststeer.compile import compile_plan
from faststeer.hf.hook_points import HookPoints
from faststeer.ops.tables import EntryKind, GateMode
from faststeer.plan import Plan


@dataclass(frozen=True)
class Addition:
    """What the plan of one slot adds to tokens at positions low..high - 1: at each site a vector `[hidden]`, fp64 on
    the CPU."""

    slot: int
    low: int
    high: int
    by_site: dict[int, Tensor]

    def before(self, number: int) -> Tensor:
        """What has been added when the stream passes a site, that site included."""
        zero = torch.zeros_like(next(iter(self.by_site.values())))
        return sum((vector for n, vector in self.by_site.items() if n <= number), zero)


def additions(plans: Mapping[int, Plan | None], points: HookPoints, analysis: str) -> list[Addition]:
    """What plans add, by the slots they are in; probes add nothing.

    Raises:
        ValueError: a plan that does something else than add vectors, said of `analysis`.
    """
    by_tokens: dict[tuple[int, int, int], Addition] = {}
    for slot, plan in plans.items():
        for entry in () if plan is None else compile_plan(plan, points.n_layers, points.hidden_size):
            if entry.kind == EntryKind.PROBE:
                continue
            if entry.kind != EntryKind.ADD or entry.gate_mode != GateMode.NONE or entry.keep_norm:
                gated = " with a gate" if entry.gate_mode != GateMode.NONE else " with keep_norm" * entry.keep_norm
                raise ValueError(
                    f"{analysis}: the plan must hold Add alone (and Probe), without gates and keep_norm; it has "
                    f"{entry.kind.name.capitalize()}{gated}"
                )
            vector = float(entry.scalars[0]) * entry.basis[0].detach().cpu().double()
            key = slot, *entry.position_range
            by_site = by_tokens.setdefault(key, Addition(*key, {})).by_site
            by_site[entry.site] = by_site[entry.site] + vector if entry.site in by_site else vector
    return list(by_tokens.values())


def acting(additions: Sequence[Addition], slot: Tensor, position: Tensor, like: Tensor) -> Tensor:
    """`[..., additions]`: 1 where an addition acts on the token with that slot and position `[...]`, else 0."""
    masks = [(slot == a.slot) & (position >= a.low) & (position < a.high) for a in additions]
    return torch.stack(masks, dim=-1).to(like)
