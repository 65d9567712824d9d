"""The op in plain PyTorch: the semantics every other back end must agree with, on any device, differentiable, and its
own fp64 oracle when given fp64 rows.

It decides nothing on the host: which entries act on a row is looked up per row, so that it traces into one graph and
replays with changed tables. What it does not do is go fast: each step gathers `[rows, width, hidden]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from faststeer.ops.tables import VECTORS, EntryKind, Field, GateMode, Tables

# As plain numbers: a compiler that traces this takes an enum for an object.
_A, _N_INTEGERS, _N_KINDS = int(Field.A), int(Field.PROBE) + 1, len(EntryKind)
_VECTORS = tuple((int(kind), vectors) for kind, vectors in VECTORS.items())


def steer(
    x: Tensor, tables: Tables, rows: Tensor, gate_state: Tensor | None = None, probe: Tensor | None = None
) -> Tensor:
    """Apply to each row of `x` the entries of its slot, in order, in fp32 (fp64 for fp64 rows), rounding once.

    Args:
        x: `[rows, hidden]`, fp32, fp16, bf16 or fp64.
        tables: the tables of this site.
        rows: `[3, rows]` int32: each row's slot (-1: untouched), position counted from the prompt's end, and sequence
            (its column of `gate_state`). There may be more columns than x has rows: the first count.
        gate_state: `[n_gates, n_sequences]` bool, needed where an entry reads a latched gate.
        probe: `[rows, n_columns]` fp32, filled in place; needed where an entry probes.

    Returns:
        A new tensor like `x`. A row that nothing acted on has the bits it came with. Formulas: docs/design.md.
    """
    return _steer(x, tables, rows, gate_state, probe)[0]


def _steer(
    x: Tensor, tables: Tables, rows: Tensor, gate_state: Tensor | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`steer`, and which rows something acted on `[rows]`."""
    rows = rows[:, : x.shape[0]]
    h = x.to(_compute_dtype(x))
    touched = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for step in range(tables.depth):
        entry = _Entry(tables, rows, step, h.dtype)
        q = entry.vectors(tables)
        p = (h.unsqueeze(1) * q).sum(-1)  # [rows, width]
        if probe is not None:
            _write_probe(probe, entry, p)
        acts = entry.live & entry.in_position() & entry.gate_open(h, tables, gate_state)
        new, changes = _intervene(h, q, p, entry)
        acts = acts & changes
        new = torch.where((entry.keep_norm != 0).unsqueeze(1), _with_norm_of(h, new), new)
        h = torch.where(acts.unsqueeze(1), new, h)
        touched = touched | acts
    return torch.where(touched.unsqueeze(1), h.to(x.dtype), x), touched


def add_steer(
    x: Tensor,
    residual: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """`steer` of x + residual, the sum rounded to their dtype first."""
    return steer(x + residual, tables, rows, gate_state, probe)


def steer_pair_(
    x: Tensor,
    residual: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
) -> None:
    """Steer a stream that is kept as the pair (x, residual), in place.

    With h = `add_steer`, a row that something acted on becomes (0, h), whose sum is h in every dtype. Other rows keep
    their pair, and so the bits of whatever is made of it.

    Args:
        probe: of as many rows as x or more. Rows whose slot has entries here are overwritten, zero where no entry
            writes; others are left alone.
    """
    n_rows = x.shape[0]
    seen = None if probe is None else probe.new_zeros(n_rows, probe.shape[1])
    hidden, touched = _steer(x + residual, tables, rows, gate_state, seen)
    residual.copy_(torch.where(touched.unsqueeze(1), hidden, residual))
    x.masked_fill_(touched.unsqueeze(1), 0)
    if probe is not None and seen is not None and tables.depth:  # a site without entries has no rows to overwrite
        steered = _Entry(tables, rows[:, :n_rows], 0, torch.float32).here.unsqueeze(1)
        probe[:n_rows] = torch.where(steered, seen, probe[:n_rows])


def add_steer_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    fp32_weight: bool,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_steer`, then `rmsnorm` of its result: `(normed, hidden)`."""
    hidden = add_steer(x, residual, tables, rows, gate_state, probe)
    return rmsnorm(hidden, weight, eps, weight_offset, fp32_weight), hidden


def rmsnorm(hidden: Tensor, weight: Tensor, eps: float, weight_offset: float, fp32_weight: bool) -> Tensor:
    """RMSNorm in Hugging Face's order of rounding.

    With h = hidden in fp32 and n = h / sqrt(mean(h^2) + eps): `fp32_weight` false rounds n to the dtype and multiplies
    by the weight there (Llama); true computes n (weight_offset + weight) in fp32 and rounds once (Gemma with offset 1,
    OLMo 2 with 0).
    """
    h = hidden.to(_compute_dtype(hidden))
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if fp32_weight:
        return (normed * (weight_offset + weight.to(h.dtype))).to(hidden.dtype)
    return (normed.to(hidden.dtype) * weight).to(hidden.dtype)


def latch_(x: Tensor, residual: Tensor | None, tables: Tables, rows: Tensor, gate_state: Tensor) -> None:
    """Decide this site's latched gates: each LATCH entry, at rows with position -1, writes its verdict on the row of x,
    or of x + residual, to `gate_state[gate, sequence]` in place.

    Runs before `steer` at the same site, so that rows after the prompt's end may read in `steer` what the prompt's last
    row decided.
    """
    s = x if residual is None else x + residual
    h, rows = s.detach().to(_compute_dtype(x)), rows[:, : x.shape[0]]
    for step in range(tables.depth):
        entry = _Entry(tables, rows, step, h.dtype)
        cell, inside = entry.gate_cell(gate_state)
        decides = entry.live & entry.is_kind(EntryKind.LATCH) & (entry.position == -1) & inside
        verdict = decides & entry.compare(h, tables)
        # Counted and not assigned: rows that decide nothing must not write, and no row's number may decide who wins.
        votes = torch.zeros(2, gate_state.numel(), dtype=torch.int32, device=x.device)
        votes.index_add_(1, cell, torch.stack([decides, verdict]).to(torch.int32))
        decided, opened = (votes > 0).view(2, *gate_state.shape)
        gate_state.copy_(torch.where(decided, opened, gate_state))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Entry:
    """The step-th entry of each row's slot, and the row's place. `here`: the slot has so many. An entry that points
    outside the tables is not live (docs/kernels.md, 'Never out of bounds')."""

    def __init__(self, tables: Tables, rows: Tensor, step: int, dtype: torch.dtype) -> None:
        n_slots, (n_entries, n_vectors) = tables.ranges.shape[0], (tables.entries.shape[0], tables.bank.shape[0])
        slot, self.position, self.sequence = rows.unbind()
        known = (slot >= 0) & (slot < n_slots)
        first, count = tables.ranges[torch.where(known, slot, 0).long()].long().unbind(-1)
        index = first.clamp(min=0) + step
        self.here = known & (index < first + count) & (index < n_entries)
        index = torch.where(self.here, index, 0)
        fields = tables.entries[index]
        # In the order of `Field`.
        self.kind, self.vector, self.count, self.low, self.high, self.mode, *rest = fields[:, :_N_INTEGERS].unbind(1)
        self.gate_vector, self.gate_state, self.keep_norm, self.probe = rest
        numbers = fields[:, _A : _A + 3].view(torch.float32)
        self.threshold = numbers[:, 2].to(dtype)
        scalars = numbers[:, :2] if tables.scalars is None else tables.scalars[index]
        self.a, self.b = scalars.to(dtype).unbind(1)
        self.dtype = dtype
        self.live = self.here & self._valid(n_vectors)

    def _valid(self, n_vectors: int) -> Tensor:
        vector, count, gate = self.vector, self.count, self.gate_vector
        valid = (self.kind >= 0) & (self.kind < _N_KINDS) & (vector >= 0) & (count >= 1) & (vector <= n_vectors - count)
        for kind, vectors in _VECTORS:
            valid = valid & ((self.kind != kind) | (count == vectors))
        looks = self.is_mode(GateMode.DOT) | self.is_mode(GateMode.COSINE)
        latched = self.mode == int(GateMode.LATCHED)
        return valid & torch.where(looks, (gate >= 0) & (gate < n_vectors), self.is_mode(GateMode.NONE) | latched)

    def is_kind(self, kind: EntryKind) -> Tensor:
        return self.kind == int(kind)

    def is_mode(self, mode: GateMode) -> Tensor:
        return self.mode.abs() == int(mode)

    def vectors(self, tables: Tables) -> Tensor:
        """`[rows, width, hidden]`: the entry's bank rows, zero beyond its count."""
        offset = torch.arange(tables.width, device=tables.bank.device)
        used = self.live.unsqueeze(1) & (offset < self.count.unsqueeze(1))
        index = torch.where(used, self.vector.unsqueeze(1) + offset, 0).long()
        return torch.where(used.unsqueeze(-1), tables.bank[index].to(self.dtype), 0)

    def in_position(self) -> Tensor:
        return (self.low <= self.position) & (self.position < self.high)

    def gate_open(self, h: Tensor, tables: Tables, gate_state: Tensor | None) -> Tensor:
        opened = self.is_mode(GateMode.NONE) | self.compare(h.detach(), tables)
        if gate_state is None or gate_state.numel() == 0:
            return opened
        cell, inside = self.gate_cell(gate_state)
        return torch.where(self.is_mode(GateMode.LATCHED), gate_state.flatten()[cell] & inside, opened)

    def gate_cell(self, gate_state: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row's decision stands in the flat `gate_state`, and whether there is such a place."""
        gate, sequence = self.gate_state.long(), self.sequence.long()
        n_gates, n_sequences = gate_state.shape
        inside = (gate >= 0) & (gate < n_gates) & (sequence >= 0) & (sequence < n_sequences)
        return torch.where(inside, gate * n_sequences + sequence, 0), inside

    def compare(self, h: Tensor, tables: Tables) -> Tensor:
        """The verdict of a dot or cosine gate on each row."""
        vector = torch.where(self.live, self.gate_vector, 0).clamp(0, tables.bank.shape[0] - 1)
        d = tables.bank[vector.long()].detach().to(h.dtype)
        dot = (h * d).sum(-1)
        norm = h.norm(dim=-1)
        cosine = torch.where(norm > 0, dot / norm, 0)  # d is a unit vector in this mode
        value = torch.where(self.is_mode(GateMode.COSINE), cosine, dot)
        above = value > self.threshold
        decided_here = self.is_mode(GateMode.DOT) | self.is_mode(GateMode.COSINE)
        return torch.where(self.mode < 0, ~above, above) & decided_here


def _intervene(h: Tensor, q: Tensor, p: Tensor, entry: _Entry) -> tuple[Tensor, Tensor]:
    """The row after the entry `[rows, hidden]`, and whether it differs at all `[rows]`.

    Every kind is h <- h + sum_k w_k q_k with a weight per direction (Project starts from zero instead of h).
    """
    a, b, count = entry.a, entry.b, entry.count.unsqueeze(1)
    adds, projects = entry.is_kind(EntryKind.ADD), entry.is_kind(EntryKind.PROJECT)
    relative = entry.is_kind(EntryKind.ROTATE_RELATIVE)
    rotates = relative | entry.is_kind(EntryKind.ROTATE)
    p1, p2 = p[:, 0], p[:, min(1, p.shape[1] - 1)]
    # A clamp's missing bound is infinite: other kinds' formulas must not meet it, not even times zero in a gradient.
    w1, w2 = _rotation(p1, p2, torch.where(rotates, a, 1), torch.where(rotates, b, 0), relative)
    clamped = torch.where(entry.is_kind(EntryKind.CLAMP), p1.clamp(min=a, max=b) - p1, 0)
    first = torch.where(adds, a, torch.where(rotates, w1, clamped))
    second = torch.where(rotates, w2, 0)
    projection = torch.where(projects.unsqueeze(1), p, 0)
    ablates = entry.is_kind(EntryKind.ABLATE)
    weight = torch.where(ablates.unsqueeze(1), -torch.where(ablates, a, 0).unsqueeze(1) * p, projection)

    # One direction at a time, product rounded before the sum: `Add` is then h + c v as anybody would write it, bit for
    # bit.
    moved = torch.where(projects.unsqueeze(1), 0, h)
    for k in range(p.shape[1]):
        w = weight[:, k]
        if k < 2:
            w = w + (first, second)[k]  # one of the two is zero
        # Nothing is added beyond the entry's own directions, not even zero, which would take the sign of a -0.
        moved = torch.where(k < count, moved + w.unsqueeze(1) * q[:, k], moved)
    acts = ~entry.is_kind(EntryKind.PROBE) & ~entry.is_kind(EntryKind.LATCH)
    changes = projects | (weight != 0).any(1) | (first != 0) | (second != 0)
    return moved, acts & changes


def _rotation(p1: Tensor, p2: Tensor, cos: Tensor, sin: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """What to add along b1 and b2 so that the part of the row in their plane points at the angle, or is turned by
    it."""
    radius = _root(p1 * p1 + p2 * p2)
    w1 = torch.where(relative, p1 * cos - p2 * sin, radius * cos) - p1
    w2 = torch.where(relative, p1 * sin + p2 * cos, radius * sin) - p2
    return w1, w2


def _with_norm_of(h: Tensor, new: Tensor) -> Tensor:
    """`new` scaled to the norm of `h`; a zero row stays zero."""
    old, now = (_root((t * t).sum(-1, keepdim=True)) for t in (h, new))
    return new * torch.where(now > 0, old / torch.where(now > 0, now, 1), 1)


def _root(square: Tensor) -> Tensor:
    """The square root, whose gradient stays finite at 0."""
    inside = square > 0
    return torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)


def _write_probe(probe: Tensor, entry: _Entry, p: Tensor) -> None:
    """Columns column .. column + count - 1 of each row take the row's p; other columns keep what they have."""
    column = entry.probe.unsqueeze(1)
    source = torch.arange(probe.shape[1], device=probe.device) - column  # which p belongs in each column
    mine = (entry.live.unsqueeze(1)) & (column >= 0) & (source >= 0) & (source < entry.count.unsqueeze(1))
    values = p.detach().gather(1, source.clamp(0, p.shape[1] - 1).long()).to(probe.dtype)
    probe.copy_(torch.where(mine, values, probe))
