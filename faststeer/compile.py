"""Compiling a plan for a model: layers resolved, directions made orthonormal, gates and probes numbered, room counted.
What comes out is what a `Program` puts on the device; this module touches no device itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from faststeer.intervention import Direction, Gate, Intervention, Number
from faststeer.ops.tables import POSITION_MAX, EntryKind, GateMode
from faststeer.plan import Plan, site
from faststeer.vector import HookPoint, SteeringVector, is_trained, layers_text


@dataclass(frozen=True, eq=False)
class Entry:
    """One intervention at one site, ready for the tables: what docs/design.md calls an entry."""

    site: int
    kind: EntryKind
    basis: Tensor  # [k, hidden]
    scalars: tuple[Number, Number] = (0.0, 0.0)
    position_range: tuple[int, int] = (-1, POSITION_MAX)
    gate_mode: int = int(GateMode.NONE)
    gate_vector: Tensor | None = None  # [1, hidden]
    gate_threshold: float = 0.0
    gate_state: int = 0
    keep_norm: bool = False
    probe_column: int = -1


def compile_plan(plan: Plan, n_layers: int, hidden_size: int) -> list[Entry]:
    """The entries of a plan in a model of this shape, site by site, in the plan's order within a site (LATCH entries
    first).

    Differentiable: directions and numbers that require a gradient keep it.

    Raises:
        ValueError: layer out of range, wrong hidden size, dependent or zero directions, a gate that looks later than
            the intervention acts.
    """
    latches: dict[tuple[int, int], Entry] = {}  # (gate, its site) -> the entry that decides it
    entries: list[Entry] = []
    for intervention in plan:
        entries += _compile(intervention, n_layers, hidden_size, latches)
    ordered = sorted([*latches.values(), *entries], key=lambda entry: entry.site)  # stable: order within a site stays
    return _number_probes(ordered)


def _compile(
    intervention: Intervention, n_layers: int, hidden_size: int, latches: dict[tuple[int, int], Entry]
) -> list[Entry]:
    name = type(intervention).__name__
    for direction in [*intervention.directions(), *([intervention.when.direction] if intervention.when else [])]:
        size = direction.hidden_size if isinstance(direction, SteeringVector) else direction.shape[-1]
        if size != hidden_size:
            raise ValueError(
                f"{name}: a direction has hidden size {size}, the model has {hidden_size}: was it found in another "
                "model?"
            )
    layers = resolve_layers(intervention, n_layers)
    points = hook_points(intervention)
    sites = sorted({site(at, layer): (at, layer) for layer in layers for at in points}.items())
    low, high = intervention.position_range
    entries = []
    bases: dict[tuple[int, ...], Tensor] = {}  # once per direction, not per site
    for number, (_, layer) in sites:
        directions = [direction_at(d, layer) for d in intervention.directions()]
        key = tuple(map(id, directions))
        if key not in bases:
            bases[key] = _basis(intervention, directions)
        gate = _gate(intervention.when, name, sites[0], layer, n_layers, latches)
        if gate["gate_mode"] == GateMode.LATCHED:
            low = max(low, -1)
        entries.append(
            Entry(
                site=number,
                kind=intervention.kind,
                basis=bases[key],
                scalars=intervention.scalars,
                position_range=(low, high),
                keep_norm=intervention.keep_norm,
                probe_column=0 if intervention.probe else -1,
                **gate,
            )
        )
    return entries


def layer_numbers(layers: Iterable[int] | None, n_layers: int, who: str = "") -> list[int]:
    """Return layers as numbers from 0, in the order given; None: all. Negative ones count from the end.

    Raises:
        ValueError: no layer, or one that the model does not have; the text begins with `who`.
    """
    numbers = list(range(n_layers) if layers is None else layers)
    wrong = [x for x in numbers if not (isinstance(x, Integral) and -n_layers <= x < n_layers)]
    if wrong or not numbers:
        fault = f"layer {wrong[0]!r} is out of range" if wrong else "no layer is named"
        raise ValueError(f"{who}{fault}: the model has layers 0..{n_layers - 1} (or -{n_layers}..-1)")
    return [layer % n_layers for layer in numbers]


def resolve_layers(intervention: Intervention, n_layers: int) -> list[int]:
    """The layers an intervention acts at in a model of `n_layers`, ascending.

    Raises:
        ValueError: out of range; none named for a bare tensor; one that a SteeringVector has no direction for.
    """
    name = type(intervention).__name__
    vectors = [d for d in intervention.directions() if isinstance(d, SteeringVector)]
    if intervention.layers is None:
        if not vectors:
            raise ValueError(f"{name} with a bare tensor needs layers=: an int, several, a range, or 'all'")
        layers = sorted(set.intersection(*(set(v.layers) for v in vectors)))
        if not layers:
            raise ValueError(f"{name}: its vectors have no layer in common, so it would act nowhere: say layers=")
    elif intervention.layers == "all":
        layers = list(range(n_layers))
    else:
        layers = list(intervention.layers)  # type: ignore[arg-type]
    layers = sorted(layer_numbers(layers, n_layers, f"{name}: "))
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name}: layers={intervention.layers} names a layer twice: -1 is layer {n_layers - 1}")
    for layer in layers:
        for v in vectors:
            if layer not in v:
                raise ValueError(
                    f"{name}: the vector has no direction for layer {layer}; it has {layers_text(v.layers)}. "
                    f"To use one layer's direction elsewhere, say so by passing the tensor: {name}(v[{v.layers[-1]}], "
                    "layers=...)"
                )
    return layers


def direction_at(direction: Direction, layer: int) -> Tensor:
    """A SteeringVector's direction for the layer; a bare tensor serves every layer."""
    return direction[layer] if isinstance(direction, SteeringVector) else direction


def hook_points(intervention: Intervention) -> tuple[HookPoint, ...]:
    """Where in a layer an intervention acts: as it says, as its SteeringVector says, or `resid_post`."""
    if intervention.at is not None:
        return intervention.at  # type: ignore[return-value]
    vectors = [d for d in intervention.directions() if isinstance(d, SteeringVector)]
    if len({v.at for v in vectors}) > 1:
        raise ValueError(
            f"{type(intervention).__name__}: its vectors come from different hook points {[v.at for v in vectors]}: "
            "say at= which one is meant"
        )
    return (vectors[0].at if vectors else "resid_post",)


def _basis(intervention: Intervention, directions: list[Tensor]) -> Tensor:
    """The bank rows `[k, hidden]` for one layer's directions."""
    rows = torch.cat([torch.atleast_2d(direction) for direction in directions])
    what = f"plane ({', '.join(intervention.direction_names)})" if len(directions) > 1 else "direction"
    name = f"{type(intervention).__name__}'s {what}"
    if intervention.vectors == "as they are":
        return rows
    if intervention.vectors == "each of length 1":
        return torch.cat([orthonormal(row, name) for row in rows])
    return orthonormal(rows, name)


def orthonormal(directions: Tensor, what: str) -> Tensor:
    """Gram-Schmidt of `[hidden]` or `[k, hidden]` to `[k, hidden]`: the first row keeps its direction. Computed in
    fp64, differentiable.

    Raises:
        ValueError: a zero direction, or directions that are linearly dependent (to 1e-5 of their length:
            single-precision copies of one another are).
    """
    rows = torch.atleast_2d(directions).to(torch.float64)
    norms = rows.norm(dim=1)
    if not bool((norms > 0).all()):
        raise ValueError(f"{what} is zero: it has no direction to normalise; check where it came from")
    unit = rows / norms.unsqueeze(1)
    if unit.shape[0] > unit.shape[1]:
        raise ValueError(
            f"{what} has {unit.shape[0]} directions in a space of {unit.shape[1]}: they cannot be independent"
        )
    q, r = torch.linalg.qr(unit.T)
    diagonal = torch.diagonal(r)
    if bool((diagonal.abs() < 1e-5).any()):
        raise ValueError(
            f"{what}: the directions are linearly dependent (or parallel): remove the ones that the others span"
        )
    # Not to a half dtype: a unit vector rounded to one is no unit vector.
    return (q * diagonal.sign()).T.to(torch.promote_types(directions.dtype, torch.float32))


def _gate(
    gate: Gate | None,
    name: str,
    first: tuple[int, tuple[HookPoint, int]],
    layer: int,
    n_layers: int,
    latches: dict[tuple[int, int], Entry],
) -> dict[str, Any]:
    """The gate fields of an entry at `layer`; a latched gate gets its LATCH entry, once per gate and site, in
    `latches`."""
    if gate is None:
        return {"gate_mode": int(GateMode.NONE)}
    first_site, (first_at, first_layer) = first
    where = layer
    if gate.latched:
        where = first_layer if gate.layer is None else gate.layer + n_layers if gate.layer < 0 else gate.layer
        if not 0 <= where < n_layers:
            raise ValueError(
                f"{name}: its gate's layer {gate.layer} is out of range: the model has layers 0..{n_layers - 1}"
            )
    if isinstance(gate.direction, SteeringVector) and where not in gate.direction:
        raise ValueError(
            f"{name}: its gate's vector has no direction for layer {where}; pass one layer's tensor to use it elsewhere"
        )
    d = direction_at(gate.direction, where)
    vector = orthonormal(d, "the gate's direction") if gate.kind == "cosine" else d.unsqueeze(0)
    if not gate.latched:
        return {"gate_mode": gate.mode, "gate_vector": vector, "gate_threshold": gate.threshold}
    at = gate.at or (
        gate.direction.at if isinstance(gate.direction, SteeringVector) and gate.layer is not None else first_at
    )
    number = site(at, where)
    if number > first_site:
        raise ValueError(
            f"{name}: its gate looks at {at} of layer {where}, after the intervention first acts ({first_at} of layer "
            f"{first_layer}): it must look there or earlier"
        )
    key = (id(gate), number)
    if key not in latches:
        latches[key] = Entry(
            number,
            EntryKind.LATCH,
            vector,
            gate_mode=gate.mode,
            gate_vector=vector,
            gate_threshold=gate.threshold,
            gate_state=len(latches),
        )
    return {"gate_mode": int(GateMode.LATCHED), "gate_state": latches[key].gate_state}


def _number_probes(entries: Sequence[Entry]) -> list[Entry]:
    """Give each probing entry its columns: 0, 1, ... at each site, in order."""
    used: dict[int, int] = {}
    numbered = []
    for entry in entries:
        if entry.probe_column >= 0:
            column = used.get(entry.site, 0)
            used[entry.site] = column + entry.basis.shape[0]
            entry = dataclasses.replace(entry, probe_column=column)
        numbered.append(entry)
    return numbered


# Room -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The distinct blocks of bank rows `[k, hidden]` that a plan's entries use. Equal values are one block, but what
    is being trained is its entry's own, since its values will move."""

    values: dict[bytes, Tensor]
    basis: list[bytes]  # per entry
    gate: list[bytes | None]
    keys: dict[int, bytes]  # of tensors seen already, by identity

    @classmethod
    def of(cls, entries: Sequence[Entry], slot: int) -> Blocks:
        blocks = cls({}, [], [], {})
        for i, entry in enumerate(entries):
            trained = f"trained {slot} {i} {len(entry.basis)}".encode() if is_trained(entry.basis) else None
            blocks.basis.append(blocks._add(entry.basis, trained))
            blocks.gate.append(None if entry.gate_vector is None else blocks._add(entry.gate_vector))
        return blocks

    def _add(self, block: Tensor, key: bytes | None = None) -> bytes:
        known = None if key else self.keys.get(id(block))
        if known is not None:
            return known
        values = block.detach().to("cpu", torch.float32).contiguous()
        if key is None:
            values_hash = hashlib.blake2b(values.numpy(), digest_size=16).digest()  # type: ignore[arg-type]
            key = self.keys[id(block)] = len(values).to_bytes(4, "little") + values_hash
        self.values[key] = values
        return key


def probed_columns(entries: Sequence[Entry]) -> dict[int, int]:
    """How many values a plan probes at each site where it probes any."""
    columns: dict[int, int] = {}
    for entry in entries:
        if entry.probe_column >= 0:
            columns[entry.site] = max(columns.get(entry.site, 0), entry.probe_column + len(entry.basis))
    return columns


@dataclass(frozen=True)
class Need:
    """The room that plans take together in a program's tables.

    Args:
        slots: one for each.
        vectors: bank rows: equal directions once, k for a k-dimensional basis.
        entries, probe_columns, latched_gates: of the plan that has most; probe columns at the site that has most.
    """

    slots: int
    vectors: int
    entries: int
    probe_columns: int
    latched_gates: int

    @classmethod
    def of(cls, plans: Sequence[Sequence[Entry]]) -> Need:
        """Of compiled plans."""
        blocks = {key: len(b) for i, entries in enumerate(plans) for key, b in Blocks.of(entries, i).values.items()}
        return cls(
            slots=len(plans),
            vectors=sum(blocks.values()),
            entries=max(map(len, plans), default=0),
            probe_columns=max((n for entries in plans for n in probed_columns(entries).values()), default=0),
            latched_gates=max((sum(e.kind == EntryKind.LATCH for e in entries) for entries in plans), default=0),
        )
