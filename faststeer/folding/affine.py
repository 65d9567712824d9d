"""Linear maps of the residual stream as a multiple of the identity plus low rank, in fp64: what an intervention is when
it is the same for every row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from faststeer.compile import Entry, orthonormal
from faststeer.ops.tables import POSITION_MAX, POSITION_MIN, EntryKind, GateMode

NEGLIGIBLE = 1e-9  # singular values of a map in fp64 that are none
SAME = 1e-6  # of maps made of fp32 directions: nobody computes orthogonal ones more exactly


class FoldError(ValueError):
    """A plan that cannot be made permanent in this model, with the reason."""


@dataclass(frozen=True)
class Map:
    """h -> M h with M = scale I + left right^T; left and right `[hidden, rank]` fp64 on the CPU."""

    scale: float
    left: Tensor
    right: Tensor

    @classmethod
    def identity(cls, hidden_size: int) -> Map:
        none = torch.zeros(hidden_size, 0, dtype=torch.float64, device="cpu")
        return cls(1.0, none, none)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.rank == 0

    def __call__(self, columns: Tensor) -> Tensor:
        """M times `[hidden, n]` or `[hidden]`, in fp64 on its device."""
        left, right = self.left.to(columns.device), self.right.to(columns.device)
        return self.scale * columns + left @ (right.T @ columns)

    def after(self, first: Map) -> Map:
        """The map that does `first`, then this one."""
        left = torch.cat(
            [self.scale * first.left + self.left @ (self.right.T @ first.left), first.scale * self.left], 1
        )
        right = torch.cat([first.right, self.right], 1)
        return Map(self.scale * first.scale, *_trimmed(left, right))

    def leaves(self, other: Map) -> bool:
        """Whether this map changes nothing that `other` gives: (M - I) M_other = 0, to what fp32 directions can say."""
        change = Map(self.scale - 1.0, self.left, self.right).after(other)
        return abs(change.scale) <= SAME and bool((change.left.norm(dim=0) <= SAME).all())


def _trimmed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of the rank it has."""
    if not left.shape[1]:
        return left, right
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    rank_mask = s > NEGLIGIBLE
    return q_left @ (u[:, : len(s)] * s)[:, rank_mask], q_right @ v.T[:, : len(s)][:, rank_mask]


def affine(entry: Entry, where: str) -> tuple[Map, Tensor]:
    """An entry as (M, c), h -> M h + c; c `[hidden]` fp64.

    Raises:
        FoldError: what it does depends on the row or its position, so that no weights can do it.
    """
    kind = entry.kind.name.capitalize().replace("_relative", "")
    name = f"{kind} at {where}"
    if entry.kind == EntryKind.LATCH or entry.gate_mode != GateMode.NONE:
        raise FoldError(f"{name} has a gate: weights cannot decide row by row; steer with hooks instead")
    low, high = entry.position_range
    if (low, high) != (POSITION_MIN, POSITION_MAX):
        raise FoldError(f"{name} acts at some positions only: weights act at every token; use positions='all'")
    if entry.keep_norm:
        raise FoldError(f"{name} keeps the norm, which is another factor for every row: no weights do that")
    basis = entry.basis.detach().to("cpu", torch.float64)
    hidden = basis.shape[1]
    nothing, same = torch.zeros(hidden, dtype=torch.float64, device="cpu"), Map.identity(hidden)
    first, second = (float(number) for number in entry.scalars)
    if entry.kind == EntryKind.ADD:
        return same, first * basis[0]
    if entry.kind == EntryKind.PROBE or entry.probe_column >= 0:
        raise FoldError(f"{name} watches a direction: a folded model has no probe; take the probe out of the plan")
    q = orthonormal(basis, name).double().T  # as the hooks have it to fp32, and orthonormal to fp64 here
    if entry.kind == EntryKind.ABLATE:
        return (Map(1.0, -first * q, q) if first else same), nothing
    if entry.kind == EntryKind.PROJECT:
        return Map(0.0, q, q), nothing
    if entry.kind == EntryKind.ROTATE_RELATIVE:
        turn = torch.tensor([[first - 1, -second], [second, first - 1]], dtype=torch.float64, device="cpu")
        return (Map(1.0, q @ turn, q) if (first, second) != (1.0, 0.0) else same), nothing
    if entry.kind == EntryKind.CLAMP and first == second and math.isfinite(first):
        return Map(1.0, -q, q), first * q[:, 0]
    if entry.kind == EntryKind.CLAMP:
        what, way = "clips where a projection is out of bounds", "a Clamp with low = high can be folded"
    else:
        what, way = "turns every row by its own angle", "Rotate(relative=True) can be folded at attn_out and mlp_out"
    raise FoldError(f"{name} {what}, which is not linear: no weights do that ({way})")
