"""The op in plain PyTorch: the semantics every other back end must agree with, on any device, differentiable, and its
own fp64 oracle when given fp64 rows.

It decides nothing on the host: which entries act on a row is looked up per row, so that it traces into one graph and
replays with changed tables. What it does not do is go fast: each step gathers `[rows, width, hidden]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from faststeer.ops.tables import Field, GateMode, Kind, Rows, Scalar, Tables


def steer(
    x: Tensor, tables: Tables, rows: Rows, gate_state: Tensor | None = None, probe: Tensor | None = None
) -> Tensor:
    """Apply to each row of `x` the entries of its slot, in order, in fp32 (fp64 for fp64 rows), rounding once.

    Args:
        x: `[rows, hidden]`, fp32, fp16, bf16 or fp64.
        tables: the tables of this site.
        rows: slot, position and sequence of each row.
        gate_state: `[n_gates, n_sequences]` bool, needed where an entry reads a latched gate.
        probe: `[rows, n_columns]`, written in place; needed where an entry probes.

    Returns:
        A new tensor like `x`. A row that nothing acted on has the bits it came with. Formulas: docs/design.md.
    """
    h = x.to(_compute_dtype(x))
    touched = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for step in range(tables.depth):
        entry = _Entry(tables, rows, step, h.dtype)
        q = entry.vectors(tables)
        p = (h.unsqueeze(1) * q).sum(-1)  # [rows, width]
        if probe is not None:
            _write_probe(probe, entry, p)
        acts = entry.live & entry.in_position(rows) & entry.gate_open(h, tables, rows, gate_state)
        new, changes = _intervene(h, q, p, entry)
        acts = acts & changes
        new = torch.where((entry.field(Field.KEEP_NORM) != 0).unsqueeze(1), _with_norm_of(h, new), new)
        h = torch.where(acts.unsqueeze(1), new, h)
        touched = touched | acts
    return torch.where(touched.unsqueeze(1), h.to(x.dtype), x)


def latch(x: Tensor, tables: Tables, rows: Rows, gate_state: Tensor) -> None:
    """Decide this site's latched gates: each LATCH entry, at rows with position -1, writes its verdict on the row as it
    stands to `gate_state[gate, sequence]` in place.

    Runs before `steer` at the same site, so that rows after the prompt's end may read in `steer` what the prompt's last
    row decided.
    """
    h = x.detach().to(_compute_dtype(x))
    for step in range(tables.depth):
        entry = _Entry(tables, rows, step, h.dtype)
        decides = entry.live & entry.is_kind(Kind.LATCH) & (rows.position == -1)
        verdict = entry.compare(h, tables)
        # A row that decides nothing writes back what is there. Only one row of a sequence has position -1, so no two
        # rows write different values to one cell,
        # except the rows that decide nothing: those write to the spare last column.
        spare = gate_state.shape[1] - 1
        column = torch.where(decides, rows.sequence, spare).long()
        gate_state[entry.field(Field.GATE_STATE).long(), column] = verdict & decides


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Entry:
    """The step-th entry of each row's slot: its fields and scalars, gathered per row."""

    def __init__(self, tables: Tables, rows: Rows, step: int, dtype: torch.dtype) -> None:
        span = tables.ranges[rows.slot.clamp(min=0).long()]  # [rows, 2]
        self.live = (rows.slot >= 0) & (step < span[:, 1])
        index = torch.where(self.live, span[:, 0] + step, 0).long()
        self.fields = tables.fields[index]
        self.scalars = tables.scalars[index].to(dtype)
        self.dtype = dtype

    # int(...) because a compiler that traces this takes an enum for an object and not for a number.

    def field(self, field: Field) -> Tensor:
        return self.fields[:, int(field)]

    def scalar(self, scalar: Scalar) -> Tensor:
        return self.scalars[:, int(scalar)]

    def is_kind(self, kind: Kind) -> Tensor:
        return self.field(Field.KIND) == int(kind)

    def is_mode(self, mode: GateMode) -> Tensor:
        return self.field(Field.GATE_MODE).abs() == int(mode)

    def vectors(self, tables: Tables) -> Tensor:
        """`[rows, width, hidden]`: the entry's bank rows, zero beyond its count."""
        offset = torch.arange(tables.width, device=tables.bank.device)
        used = offset < self.field(Field.COUNT).unsqueeze(1)
        index = torch.where(used, self.field(Field.VECTOR).unsqueeze(1) + offset, 0).long()
        return torch.where(used.unsqueeze(-1), tables.bank[index].to(self.dtype), 0)

    def in_position(self, rows: Rows) -> Tensor:
        return (self.field(Field.POSITION_LOW) <= rows.position) & (rows.position < self.field(Field.POSITION_HIGH))

    def gate_open(self, h: Tensor, tables: Tables, rows: Rows, gate_state: Tensor | None) -> Tensor:
        opened = self.is_mode(GateMode.NONE) | self.compare(h.detach(), tables)
        if gate_state is None:
            return opened
        latched = gate_state[self.field(Field.GATE_STATE).long(), rows.sequence.long()]
        return torch.where(self.is_mode(GateMode.LATCHED), latched, opened)

    def compare(self, h: Tensor, tables: Tables) -> Tensor:
        """The verdict of a dot or cosine gate on each row."""
        d = tables.bank[self.field(Field.GATE_VECTOR).long()].detach().to(h.dtype)
        dot = (h * d).sum(-1)
        norm = h.norm(dim=-1)
        cosine = torch.where(norm > 0, dot / norm, 0)  # d is a unit vector in this mode
        value = torch.where(self.is_mode(GateMode.COSINE), cosine, dot)
        above = value > self.scalar(Scalar.THRESHOLD)
        decided_here = self.is_mode(GateMode.DOT) | self.is_mode(GateMode.COSINE)
        return torch.where(self.field(Field.GATE_MODE) < 0, ~above, above) & decided_here


def _intervene(h: Tensor, q: Tensor, p: Tensor, entry: _Entry) -> tuple[Tensor, Tensor]:
    """The row after the entry `[rows, hidden]`, and whether it differs at all `[rows]`.

    Every kind is h <- h + sum_k w_k q_k with a weight per direction (Project starts from zero instead of h).
    """
    a, b = entry.scalar(Scalar.A), entry.scalar(Scalar.B)
    adds, projects, relative = entry.is_kind(Kind.ADD), entry.is_kind(Kind.PROJECT), entry.is_kind(Kind.ROTATE_RELATIVE)
    rotates = relative | entry.is_kind(Kind.ROTATE)
    p1, p2 = p[:, 0], p[:, min(1, p.shape[1] - 1)]
    w1, w2 = _rotation(p1, p2, a, b, relative)
    clamped = torch.where(entry.is_kind(Kind.CLAMP), p1.clamp(min=a, max=b) - p1, 0)
    first = torch.where(adds, a, torch.where(rotates, w1, clamped))
    second = torch.where(rotates, w2, 0)
    kept = torch.where(projects.unsqueeze(1), p, 0)
    weight = torch.where(entry.is_kind(Kind.ABLATE).unsqueeze(1), -a.unsqueeze(1) * p, kept)

    # One direction at a time, product rounded before the sum: `Add` is then h + c v as anybody would write it, bit for
    # bit.
    moved = torch.where(projects.unsqueeze(1), 0, h)
    for k in range(p.shape[1]):
        w = weight[:, k]
        if k < 2:
            w = w + (first, second)[k]  # one of the two is zero
        moved = moved + w.unsqueeze(1) * q[:, k]
    acts = ~entry.is_kind(Kind.PROBE) & ~entry.is_kind(Kind.LATCH)
    changes = projects | (weight != 0).any(1) | (first != 0) | (second != 0)
    return moved, acts & changes


def _rotation(p1: Tensor, p2: Tensor, cos: Tensor, sin: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """What to add along b1 and b2 so that the part of the row in their plane points at the angle, or is turned by
    it."""
    square = p1 * p1 + p2 * p2
    inside = square > 0
    radius = torch.where(
        inside, torch.where(inside, square, 1).sqrt(), 0
    )  # the inner where keeps the gradient finite at 0
    w1 = torch.where(relative, p1 * cos - p2 * sin, radius * cos) - p1
    w2 = torch.where(relative, p1 * sin + p2 * cos, radius * sin) - p2
    return w1, w2


def _with_norm_of(h: Tensor, new: Tensor) -> Tensor:
    """`new` scaled to the norm of `h`; a zero row stays zero."""
    old, now = _norm(h), _norm(new)
    return new * torch.where(now > 0, old / torch.where(now > 0, now, 1), 1)


def _norm(h: Tensor) -> Tensor:
    square = (h * h).sum(-1, keepdim=True)
    inside = square > 0
    return torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)


def _write_probe(probe: Tensor, entry: _Entry, p: Tensor) -> None:
    """Columns column .. column + count - 1 of each row take the row's p; other columns keep what they have."""
    column = entry.field(Field.PROBE).unsqueeze(1)
    source = torch.arange(probe.shape[1], device=probe.device) - column  # which p belongs in each column
    mine = (entry.live.unsqueeze(1)) & (column >= 0) & (source >= 0) & (source < entry.field(Field.COUNT).unsqueeze(1))
    values = p.detach().gather(1, source.clamp(0, p.shape[1] - 1).long()).to(probe.dtype)
    probe.copy_(torch.where(mine, values, probe))
