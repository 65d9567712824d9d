"""What docs/design.md says steering does to a row, once more: float64, row by row, intervention by intervention,
straight from the page's words.

Nothing of faststeer's compilation, tables or op is used; of an intervention only its public fields are read. Beside
each value stands a bound on the error that a correct implementation in fp32 (or fp64) may have made there, by standard
forward error analysis, so that a test needs no tolerance of its own. Where rounding could turn a decision (a gate's
value at its threshold, a norm that is all rounding error), `TooClose` is raised and the case says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HOOK_POINT_OFFSET = {"resid_pre": 0, "attn_out": 1, "resid_mid": 2, "mlp_out": 3, "resid_post": 4}
TABLE_ROUNDOFF = 2.0**-24  # directions and numbers are kept in fp32


class TooClose(Exception):
    """A decision here hangs on rounding errors."""


# Where and when ----------------------------------------------------------------------------------


def in_positions(positions: str | int, r: int) -> bool:
    """Whether the token at position r, counted from the prompt's end, is meant."""
    if isinstance(positions, int):
        return r == positions
    named = {"all": True, "prompt": r < 0, "generated": r >= 0, "last": r == -1}
    if positions in named:
        return named[positions]
    start, stop = re.fullmatch(r"\[(-?\d*):(-?\d*)\]", positions).groups()
    low = int(start) if start else -math.inf
    high = int(stop) if stop else (0 if low < 0 else math.inf)
    return low <= r < high


def directions_of(intervention: Any) -> list[Any]:
    names = ("a", "b") if type(intervention).__name__ == "Rotate" else ("direction",)
    return [getattr(intervention, name) for name in names]


def is_vector(direction: Any) -> bool:
    """A SteeringVector, with a direction for each of several layers; else one tensor for all layers."""
    return hasattr(direction, "directions")


def sites_of(intervention: Any, n_layers: int) -> dict[int, tuple[str, int]]:
    """{site: (hook point, layer)} where an intervention acts, in the order of a forward pass."""
    vectors = [d for d in directions_of(intervention) if is_vector(d)]
    if intervention.layers == "all":
        layers = set(range(n_layers))
    elif intervention.layers is None:
        layers = set.intersection(*(set(v.directions) for v in vectors))
    else:
        layers = {layer % n_layers for layer in intervention.layers}
    points = intervention.at or (vectors[0].at if vectors else "resid_post",)
    found = {}
    for layer in sorted(layers):
        for at in points:
            found[4 * layer + HOOK_POINT_OFFSET[at]] = at, layer
    return dict(sorted(found.items()))


def gate_site(intervention: Any, n_layers: int) -> tuple[int, int]:
    """The site and layer at which a latched gate is decided."""
    gate = intervention.when
    first_at, first_layer = next(iter(sites_of(intervention, n_layers).values()))
    layer = first_layer if gate.layer is None else gate.layer % n_layers
    default = gate.direction.at if is_vector(gate.direction) and gate.layer is not None else first_at
    return 4 * layer + HOOK_POINT_OFFSET[gate.at or default], layer


def values(direction: Any, layer: int) -> np.ndarray:
    """A direction's numbers at a layer, `[k, hidden]`."""
    tensor = direction.directions[layer] if is_vector(direction) else direction
    return np.atleast_2d(tensor.detach().double().numpy())


def gram_schmidt(rows: np.ndarray) -> np.ndarray:
    basis: list[np.ndarray] = []
    for row in rows:
        row = row / np.linalg.norm(row)
        for _ in range(2):  # twice is enough
            for q in basis:
                row = row - (row @ q) * q
            row = row / np.linalg.norm(row)
        basis.append(row)
    return np.stack(basis)


# Rows --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One token of one sequence: its values, its plan (None: untouched), where it stands."""

    x: np.ndarray
    plan: Any
    position: int
    sequence: int


@dataclass
class Steered:
    """What becomes of a row, and how far a correct implementation may be from it."""

    h: np.ndarray
    bound: float = 0.0  # 2-norm, before the last rounding to the row's dtype
    touched: bool = False  # False: must come out with the bits it went in
    probes: list[float] = field(default_factory=list)
    probe_bounds: list[float] = field(default_factory=list)


class Oracle:
    """A model's sites, visited in order. `decided` holds the latched gates: {(id of the gate, its site, sequence):
    open}."""

    def __init__(self, n_layers: int, *, roundoff: float) -> None:
        self.n_layers, self.u = n_layers, roundoff
        self._sites: dict[int, dict[int, tuple[str, int]]] = {}  # by id of the intervention
        self._bases: dict[tuple[int, int], np.ndarray] = {}
        self.decided: dict[tuple[int, int, int], bool] = {}

    def visit(self, site: int, rows: Sequence[Row]) -> list[Steered]:
        for row in rows:
            if row.plan is not None and row.position == -1:
                self._decide(site, row)
        return [self._steer(site, row) for row in rows]

    def _decide(self, site: int, row: Row) -> None:
        """Latched gates look at the last prompt token as it enters their site, before any intervention of that site."""
        for intervention in row.plan:
            gate = intervention.when
            if gate is not None and gate.latched and gate_site(intervention, self.n_layers)[0] == site:
                _, layer = gate_site(intervention, self.n_layers)
                self.decided[id(gate), site, row.sequence] = self._open(gate, layer, row.x, 0.0)

    def _here(self, site: int, plan: Any) -> Iterator[tuple[Any, int]]:
        """The interventions of a plan that act at a site, and the layer whose directions they take."""
        for intervention in plan or ():
            if id(intervention) not in self._sites:
                self._sites[id(intervention)] = sites_of(intervention, self.n_layers)
            sites = self._sites[id(intervention)]
            if site in sites:
                yield intervention, sites[site][1]

    def _steer(self, site: int, row: Row) -> Steered:
        now = Steered(row.x.astype(np.float64))
        for intervention, layer in self._here(site, row.plan):
            self._probe(now, intervention, layer)
            if in_positions(intervention.positions, row.position) and self._gate(now, intervention, layer, row):
                self._act(now, intervention, layer)
        return now

    def _gate(self, now: Steered, intervention: Any, layer: int, row: Row) -> bool:
        gate = intervention.when
        if gate is None:
            return True
        if gate.latched:
            key = id(gate), gate_site(intervention, self.n_layers)[0], row.sequence
            return row.position >= -1 and self.decided.get(key, False)
        return self._open(gate, layer, now.h, now.bound)

    def _open(self, gate: Any, layer: int, h: np.ndarray, error: float) -> bool:
        d = values(gate.direction, layer)[0]
        norm = float(np.linalg.norm(h))
        slack = error + self._dot_error(h, error)
        if gate.kind == "cosine":
            if norm == 0 and error == 0:
                value, slack = 0.0, 0.0
            elif norm <= 4 * slack:
                raise TooClose
            else:
                value, slack = float(h @ d) / norm / float(np.linalg.norm(d)), 4 * slack / norm
        else:
            value, slack = float(h @ d), slack * float(np.linalg.norm(d))
        if abs(value - gate.threshold) <= slack + 2 * TABLE_ROUNDOFF * abs(gate.threshold) and not (
            slack == 0 and value == gate.threshold
        ):
            raise TooClose
        return (value > gate.threshold) == gate.above

    def _dot_error(self, h: np.ndarray, error: float) -> float:
        """How far a computed h . q may be off for a unit q, the error of h itself apart: n products and sums, and q
        rounded to fp32."""
        return ((len(h) + 2) * self.u + 2 * TABLE_ROUNDOFF) * (float(np.linalg.norm(h)) + error)

    def _basis(self, intervention: Any, layer: int) -> np.ndarray:
        key = id(intervention), layer
        if key not in self._bases:
            rows = np.concatenate([values(d, layer) for d in directions_of(intervention)])
            looks = type(intervention).__name__ == "Probe"
            self._bases[key] = rows / np.linalg.norm(rows, axis=1, keepdims=True) if looks else gram_schmidt(rows)
        return self._bases[key]

    def _probe(self, now: Steered, intervention: Any, layer: int) -> None:
        if not intervention.probe:
            return
        for p in self._basis(intervention, layer) @ now.h:
            now.probes.append(float(p))
            now.probe_bounds.append(now.bound + self._dot_error(now.h, now.bound) + TABLE_ROUNDOFF * abs(float(p)))

    def _act(self, now: Steered, intervention: Any, layer: int) -> None:
        """h and its bound after the intervention. A bound grows by what the formula makes of the error that h has, and
        by the formula's own roundings."""
        kind = type(intervention).__name__
        if (
            kind == "Probe"
            or float(getattr(intervention, "coefficient", 1)) == 0
            or float(getattr(intervention, "strength", 1)) == 0
        ):
            return
        h, error = now.h, now.bound
        norm = float(np.linalg.norm(h))
        if kind == "Add":
            step = float(intervention.coefficient) * values(intervention.direction, layer)[0]
            new, moved, grows, local = h + step, float(np.linalg.norm(step)), 1.0, 0.0
        else:
            q = self._basis(intervention, layer)
            p = q @ h
            off = math.sqrt(len(q)) * self._dot_error(h, error)
            if kind == "Ablate":
                s = float(intervention.strength)
                new, moved, grows, local = (
                    h - s * (p @ q),
                    abs(s) * float(np.abs(p).sum()),
                    max(1.0, abs(1 - s)),
                    abs(s) * off,
                )
            elif kind == "Project":
                new, moved, grows, local = p @ q, float(np.abs(p).sum()), 1.0, off
            elif kind == "Clamp":
                low = -math.inf if intervention.low is None else float(intervention.low)
                high = math.inf if intervention.high is None else float(intervention.high)
                at_bounds = TABLE_ROUNDOFF * max(abs(b) for b in (low, high) if math.isfinite(b))
                if low + off + error + at_bounds < p[0] < high - off - error - at_bounds:
                    return
                w = min(max(p[0], low), high) - p[0]
                new, moved, grows, local = h + w * q[0], abs(w), 1.0, off + at_bounds
            else:
                t, radius = math.radians(float(intervention.degrees)), math.hypot(*p)
                turn = (
                    np.array([p[0] * math.cos(t) - p[1] * math.sin(t), p[0] * math.sin(t) + p[1] * math.cos(t)])
                    if intervention.relative
                    else radius * np.array([math.cos(t), math.sin(t)])
                )
                new, moved, grows = h + (turn - p) @ q, float(np.abs(turn).sum() + np.abs(p).sum()), 1.0
                local = 2 * off + 8 * (self.u + TABLE_ROUNDOFF) * radius
            moved *= 1 + len(q)
        error_after = (
            grows * error + local + moved * (4 * TABLE_ROUNDOFF + 4 * self.u) + 2 * self.u * (norm + moved + error)
        )
        if intervention.keep_norm:
            new, error_after = self._with_norm(norm, error, new, error_after)
        now.h, now.bound, now.touched = new, error_after, True

    def _with_norm(self, norm: float, error: float, new: np.ndarray, error_after: float) -> tuple[np.ndarray, float]:
        length = float(np.linalg.norm(new))
        sums = (len(new) + 4) * self.u
        if norm == 0 and error == 0:
            return np.zeros_like(new), 0.0
        if length <= 4 * error_after:
            raise TooClose
        return new * (norm / length), 2 * (2 * norm / length * error_after + error + 2 * sums * norm)
