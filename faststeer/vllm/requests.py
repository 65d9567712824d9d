"""What a request says about steering: read, checked against the model, and made self-contained.

    payload (a name, JSON, a Plan) -> parse -> ParsedPlan -> wire form -> received, in the engine

Payloads come from strangers: whatever they hold, only ValueError comes out, and nothing is opened but files in the
server's folder. This module imports no vLLM and keeps no state.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, float32

from faststeer.compile import Entry, compile_plan
from faststeer.files import read_json
from faststeer.intervention import KINDS, Intervention
from faststeer.ops.tables import EntryKind
from faststeer.plan import FORMAT, Plan
from faststeer.vector import SteeringVector
from faststeer.vllm.registry import Registry, Stamp, read_vector
from faststeer.vllm.switch import NONE, PAYLOAD_KEY

SHORT = {kind.lower(): kind for kind in KINDS}  # {"add": "refusal", "coefficient": 2} for an Add of that vector
EXPECTED = (
    "the name of a registered plan, JSON of plan.to_json(), or the short form "
    '{"add": "name of a vector", "coefficient": 1.0} (or a list of these)'
)


@dataclass(frozen=True)
class Limits:
    """What a plan has to fit into.

    Args:
        n_layers, hidden_size: of the model.
        max_plan_bytes: of a request's JSON, vectors inside it included.
        max_interventions: of one plan.
        max_directions: of one subspace.
        check: of what the plan becomes; raises ValueError where the tables have no room for it.
    """

    n_layers: int
    hidden_size: int
    max_plan_bytes: int = 2**22
    max_interventions: int = 32
    max_directions: int = 16
    check: Callable[[list[Entry]], None] | None = None


@dataclass(frozen=True)
class ParsedPlan:
    """A plan that fits the model.

    Attributes:
        plan: with every vector by value.
        digest: of what it does: vectors' bytes, layers, coefficients, positions, gates. Plans that do the same have the
            same, however they were written.
        ranges: the positions [low, high) at which it may change a row, each range once, sorted; counted from the
            prompt's end. Keys and values of a token depend on the plan from the first of these on.
        probes: whether it watches anything.
        files: those it was read from, as they were.
    """

    plan: Plan
    digest: str
    ranges: tuple[tuple[int, int], ...]
    probes: bool
    files: tuple[Stamp, ...] = ()

    def wire(self, room: int = 0) -> dict[str, Any]:
        """What the request carries to the engine in the payload's place (see `Wire`): nothing in it refers to anything
        outside."""
        ranges = [list(one) for one in self.ranges]
        return {
            "plan": self.plan.to_json(inline=True), "digest": self.digest, "ranges": ranges, "room": room,
            "probes": self.probes,
        }  # fmt: skip


@dataclass(frozen=True)
class Wire:
    """A request's plan as the engine gets it (see `ParsedPlan`).

    Attributes:
        plan: JSON without names and paths.
        room: for how many different plans at a time; 0 where those that find no room wait.
        probes: whether it has probes.
    """

    plan: str
    digest: str
    ranges: list[list[int]]
    room: int = 0
    probes: bool = False


def received(extra_args: Mapping[str, Any] | None) -> Wire | None:
    """The plan that the front end put into a request, None where there is none.

    Raises:
        ValueError: a payload that no front end has seen.
    """
    payload = (extra_args or {}).get(PAYLOAD_KEY)
    if payload is None:
        return None
    types = {"plan": str, "digest": str, "ranges": list, "room": int, "probes": bool}
    if not isinstance(payload, Mapping) or {k: type(v) for k, v in payload.items()} != types:
        raise ValueError(
            "a plan reached the engine unchecked: requests must come through a front end that has faststeer's plugin"
        )
    return Wire(**payload)


def parse(payload: Any, registry: Registry, limits: Limits) -> ParsedPlan | None:
    """Read what a request says.

    Args:
        payload: a Plan; the name of a registered plan; JSON as a text or as what it says: what `Plan.to_json` writes,
            with vectors by registered name, by path in the registry's folder, or inline, or the short form. "none" is
            no plan.
        registry: of vectors and plans.
        limits: of the model and the server.

    Returns:
        None where nothing is to be done.

    Raises:
        ValueError: anything else; the message says what was wrong, and where.
    """
    files: list[Stamp] = []
    plan = payload if isinstance(payload, Plan) else _plan_of(payload, registry, limits, files)
    if len(plan) > limits.max_interventions:
        raise ValueError(
            f"the plan has {len(plan)} interventions: this server takes at most {limits.max_interventions}"
        )
    entries = _entries(plan, limits)
    if not entries:
        return None
    if limits.check is not None:
        limits.check(entries)
    changing = {entry.position_range for entry in entries if entry.kind not in (EntryKind.PROBE, EntryKind.LATCH)}
    probes = any(entry.probe_column >= 0 for entry in entries)
    return ParsedPlan(plan, digest(entries), tuple(sorted(changing)), probes, tuple(files))


def _entries(plan: Plan, limits: Limits) -> list[Entry]:
    """The plan's entries in the model.

    Raises:
        ValueError: it does not fit the model, or has a subspace of too many directions.
    """
    for number, intervention in enumerate(plan):
        if (k := _directions(intervention)) > limits.max_directions:
            raise ValueError(
                f"interventions[{number}] has {k} directions: this server takes at most {limits.max_directions}"
            )
    try:
        return compile_plan(plan, limits.n_layers, limits.hidden_size)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the plan does not fit the model: {error}") from error


def digest(entries: list[Entry]) -> str:
    """SHA-256 of what entries do, in the precision of the tables."""
    hasher, layouts = hashlib.sha256(b"faststeer.entries/1"), {}

    def bank(rows: Tensor | None) -> bytes:
        if rows is None:
            return bytes(32)
        if id(rows) not in layouts:
            values = rows.detach().to("cpu", float32).contiguous()
            shape = struct.pack("<2q", *values.shape)
            layouts[id(rows)] = hashlib.sha256(shape + values.numpy().tobytes()).digest()
        return layouts[id(rows)]

    for entry in entries:
        numbers = (entry.site, int(entry.kind), *entry.position_range, entry.gate_mode, entry.gate_state)
        scalars = (*map(float, entry.scalars), entry.gate_threshold)
        hasher.update(struct.pack("<6q3f?q", *numbers, *scalars, entry.keep_norm, entry.probe_column))
        hasher.update(bank(entry.basis) + bank(entry.gate_vector))
    return hasher.hexdigest()


def _directions(intervention: Intervention) -> int:
    tensors = [d for d in intervention.directions() if isinstance(d, Tensor)]
    return max((t.shape[0] for t in tensors if t.ndim == 2), default=1)


# Reading --------------------------------------------------------------------------------------------------------------


def _plan_of(payload: Any, registry: Registry, limits: Limits, files: list[Stamp]) -> Plan:
    if isinstance(payload, str) and not payload.lstrip().startswith(("{", "[")):
        return _registered(payload.strip(), registry, limits, files)
    return _read(_data(payload, limits), registry, limits, files)


def _registered(name: str, registry: Registry, limits: Limits, files: list[Stamp]) -> Plan:
    if name == NONE:
        return Plan()
    try:
        plan, stamp = registry.plan(name)
    except ValueError as error:
        raise ValueError(f"{error}. Expected {EXPECTED}") from error
    if stamp is not None:
        files.append(stamp)
    return plan if isinstance(plan, Plan) else _read(_data(plan, limits), registry, limits, files)


def _data(payload: Any, limits: Limits) -> Any:
    """The payload as fresh plain data."""
    if not isinstance(payload, str | dict | list):
        raise ValueError(f"a plan is a {type(payload).__name__}: expected {EXPECTED}")
    try:
        text = payload if isinstance(payload, str) else json.dumps(payload)
        if len(text) > limits.max_plan_bytes:
            raise ValueError(f"it has {len(text):,} bytes, this server takes at most {limits.max_plan_bytes:,}")
        return read_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the plan is no valid JSON: {error}. Expected {EXPECTED}") from error


def _read(data: Any, registry: Registry, limits: Limits, files: list[Stamp]) -> Plan:
    """A plan of plain data, which is consumed."""
    if isinstance(data, list) or (isinstance(data, dict) and set(data) & set(SHORT)):
        short = data if isinstance(data, list) else [data]
        data = {"format": FORMAT, "interventions": [_long(item, n) for n, item in enumerate(short)]}
    listed = data.get("interventions") if isinstance(data, dict) else None
    if not isinstance(listed, list):
        raise ValueError(f"this JSON is no plan: expected {EXPECTED}")
    if len(listed) > limits.max_interventions:
        raise ValueError(
            f"the plan has {len(listed)} interventions: this server takes at most {limits.max_interventions}"
        )
    reader = _Directions(registry, limits, files)
    for number, item in enumerate(listed):
        if isinstance(item, dict):
            reader.replace(item, f"interventions[{number}]")
    try:
        return Plan.from_json(json.dumps(data), names=reader.found)
    except (TypeError, OverflowError, KeyError, RuntimeError) as error:
        raise ValueError(f"the plan cannot be read: {error}") from error


def _long(item: Any, number: int) -> dict[str, Any]:
    """An intervention of the short form as `Plan.to_json` writes it."""
    kinds = sorted(set(item) & set(SHORT)) if isinstance(item, dict) else []
    if len(kinds) != 1 or "type" in item:
        raise ValueError(f"[{number}]: expected one of {', '.join(SHORT)} with the name of a vector, and its fields")
    kind = KINDS[SHORT[kinds[0]]]
    direction_value, names = item.pop(kinds[0]), kind.direction_names
    values = direction_value if isinstance(direction_value, list) else [direction_value]
    if len(values) != len(names) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"[{number}].{kinds[0]}: expected {len(names)} name(s) of vectors")
    return item | {"type": kind.__name__} | {n: {"name": v} for n, v in zip(names, values, strict=True)}


@dataclass
class _Directions:
    """Looks up the directions of a plan, so that what is left refers to `found` alone."""

    registry: Registry
    limits: Limits
    files: list[Stamp]
    found: dict[str, SteeringVector] = field(default_factory=dict)

    def replace(self, item: dict[str, Any], where: str) -> None:
        for name in ("direction", "a", "b"):
            if isinstance(item.get(name), dict):
                item[name] = self._known(item[name], f"{where}.{name}")
        when = item.get("when")
        if isinstance(when, dict) and isinstance(when.get("direction"), dict):
            when["direction"] = self._known(when["direction"], f"{where}.when.direction")

    def _known(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        allowed: tuple[set[str], ...] = ({"name"}, {"path"}, {"path", "sha256"}, {"vector"}, {"tensor"})
        if set(item) not in allowed or not all(isinstance(value, str) for value in item.values()):
            raise ValueError(
                f'{where}: expected {{"name": ...}}, {{"path": ...}} (with "sha256" or without), {{"vector": base64}} '
                'or {"tensor": base64}'
            )
        if "tensor" in item:
            return item
        try:
            key, vector, stamp = self._vector(item)
        except ValueError as error:  # binascii.Error is one
            raise ValueError(f"{where}: {error}") from error
        if stamp is not None:
            self.files.append(stamp)
        self.found[key] = vector
        return {"name": key}

    def _vector(self, item: dict[str, str]) -> tuple[str, SteeringVector, Stamp | None]:
        (kind, value) = next((kind, item[kind]) for kind in ("name", "path", "vector") if kind in item)
        key = f"{kind}:{value if kind != 'vector' else hashlib.sha256(value.encode()).hexdigest()}"
        if kind == "name":
            return (key, *self.registry.vector(value))
        if kind == "vector":
            try:
                most = self.limits.n_layers * self.limits.hidden_size
                return key, read_vector(base64.b64decode(value, validate=True), "what is inline", most), None
            except binascii.Error as error:
                raise ValueError(f"what is inline is no base64: {error}") from error
        vector, stamp = self.registry.vector_file(value)
        if item.get("sha256") not in (None, vector.sha256):
            raise ValueError(f"the file {value!r} is not the one that the plan was written with (SHA-256 differs)")
        return key, vector, stamp
