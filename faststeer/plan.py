"""Plans: interventions in order, as JSON that travels; which plan each of several rows has; how sites are numbered."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faststeer import tensor_files
from faststeer.files import UNREADABLE, FormatError, read_json, read_text, reading, write_atomically
from faststeer.intervention import (
    KINDS,
    Direction,
    Gate,
    Intervention,
)
from faststeer.vector import HOOK_POINTS, HookPoint, SteeringVector

FORMAT = "faststeer.plan/1"


def site(at: HookPoint, layer: int) -> int:
    """The number of a site, in the order of a forward pass: 4 per layer, and `resid_post` of layer l is `resid_pre`
    of layer l + 1."""
    return 4 * layer + HOOK_POINTS.index(at)


def n_sites(n_layers: int) -> int:
    return 4 * n_layers + 1


def site_name(number: int, n_layers: int) -> tuple[HookPoint, int]:
    """Hook point and layer of a site; the last one is the `resid_post` of the last layer."""
    if number == 4 * n_layers:
        return "resid_post", n_layers - 1
    return HOOK_POINTS[number % 4], number // 4


class Plan:
    """Interventions in the order in which they act.

    Args:
        interventions: any number of them; a plan without interventions changes nothing.

    Raises:
        TypeError: the list has something that is no intervention.
    """

    def __init__(self, interventions: Iterable[Intervention] = ()) -> None:
        if isinstance(interventions, Intervention):
            interventions = [interventions]
        if not isinstance(interventions, Iterable):
            kind = type(interventions).__name__
            raise TypeError(f"interventions is a {kind}: a Plan takes a list of {', '.join(KINDS)}, [] for nothing")
        self.interventions: tuple[Intervention, ...] = tuple(interventions)
        for i, intervention in enumerate(self.interventions):
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"interventions[{i}] is a {type(intervention).__name__}: a Plan takes {', '.join(KINDS)}"
                )

    def __len__(self) -> int:
        return len(self.interventions)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __repr__(self) -> str:
        return f"Plan([{', '.join(map(repr, self.interventions))}])"

    def __eq__(self, other: object) -> bool:
        """Plans are equal when they do the same: same interventions in order, same values in the directions."""
        return isinstance(other, Plan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal plans, hashable, and without the directions themselves, of which it holds digests of their
        present values."""
        return tuple(map(_key, self.interventions))

    @property
    def requires_grad(self) -> bool:
        """Whether any direction or number in it is being trained."""
        return any(i.requires_grad for i in self.interventions)

    def to_json(
        self, names: Mapping[str, SteeringVector] | None = None, *, inline: bool = False, indent: int | None = None
    ) -> str:
        """The plan as JSON.

        A SteeringVector found in `names` is written by that name; one that is what its file holds (loaded or saved) by
        path and SHA-256 of its content; others, bare tensors, and everything when `inline`, by value (safetensors in
        base64).
        """
        return json.dumps(_encode(self, names or {}, inline), indent=indent)

    def save(self, path: str | os.PathLike[str], *, inline: bool = False) -> Path:
        """Write the plan as JSON to `path`, atomically. Vectors that have a file are named by a path relative to the
        plan's folder, so that both can be moved together."""
        path = Path(path)
        write_atomically(path, json.dumps(_encode(self, {}, inline, path.parent), indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan's file, as `save` and `to_json` write it; paths in it start at its folder.

        Raises:
            FileNotFoundError: there is no such file.
            FormatError: no text; as `from_json`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no plan at {path}: no such file")
        text = read_text(path)
        try:
            return cls.from_json(text, folder=path.parent)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error

    @classmethod
    def from_json(
        cls, text: str, names: Mapping[str, SteeringVector] | None = None, folder: str | Path | None = None
    ) -> Plan:
        """Read what `to_json` wrote.

        Args:
            names: the vectors that the plan may refer to by name.
            folder: where relative paths start (default: the working directory).

        Raises:
            FormatError (a ValueError): no JSON, a field given twice, another format, unknown kinds or fields, a name
                that `names` lacks, a file whose content is not the one the plan was written with; the message says
                where in the plan.
            FileNotFoundError: a file that the plan names is not there.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"the plan's JSON is a {type(text).__name__}: expected a text; Plan.load reads a file")
        try:
            data = read_json(text)
        except ValueError as error:
            raise FormatError(f"the plan is no valid JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(
                f'this JSON is no faststeer plan: expected an object with "format": {FORMAT!r}; write one with '
                "plan.to_json()"
            )
        listed = data.get("interventions")
        if not isinstance(listed, list) or set(data) != {"format", "interventions"}:
            raise FormatError('a plan holds "format" and "interventions" (a list), nothing else')
        reader = _PlanReader(names or {}, Path(folder or "."))
        return cls([reader.intervention(item, f"interventions[{i}]") for i, item in enumerate(listed)])


Plans = Plan | Intervention | Sequence[Plan | Intervention | None]


def plans_for(n: int | None, plans: Plans | None) -> list[Plan | None]:
    """A plan, or None for unsteered, for each of n rows, prompts or requests.

    Args:
        n: how many; None: as many as the list has, one for a single plan.
        plans: one for all (None: unsteered), or a list with one or None for each. An intervention stands for a plan of
            it alone.

    Raises:
        TypeError: something else, or something else in the list.
        ValueError: a list of another length, or an empty one.
    """
    if isinstance(plans, (Plan, Intervention)) or (plans is None and n is not None):
        return [as_plan(plans, "plans")] * (1 if n is None else n)
    if plans is None or isinstance(plans, str) or not isinstance(plans, Iterable):
        raise TypeError(
            f"plans is a {type(plans).__name__}: expected a Plan or a list with one Plan or None per row of the batch"
        )
    listed = [as_plan(plan, f"plans[{i}]") for i, plan in enumerate(plans)]
    if n is not None and len(listed) != n:
        raise ValueError(f"{len(listed)} plans for {n} prompts: expected one plan for all, or one (or None) for each")
    if not listed:
        raise ValueError("the list of plans is empty: give one Plan or None per row of the batch")
    return listed


def distinct(plans: Iterable[Plan | None]) -> list[Plan]:
    """The different plan objects, in order."""
    return list({id(plan): plan for plan in plans if plan is not None}.values())


def as_plan(plan: object, what: str) -> Plan | None:
    """Return a plan, or an intervention as one, or None; TypeError for anything else."""
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, Intervention):
        return Plan([plan])
    raise TypeError(f"{what} is a {type(plan).__name__}: expected a Plan, an intervention, or None")


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(values.numpy(), digest_size=16).digest()  # type: ignore[arg-type]


def _key(item: Any) -> Any:
    """What an intervention, or one of its fields, is compared by."""
    if isinstance(item, SteeringVector):
        words = item.at, item.scale, item.model, item.method, item.op, json.dumps(dict(item.provenance), sort_keys=True)
        return words, tuple((layer, _key(d)) for layer, d in sorted(item.directions.items()))
    if isinstance(item, (Intervention, Gate)):
        return type(item).__name__, *(_key(getattr(item, f.name)) for f in dataclasses.fields(item))
    if isinstance(item, Tensor):
        return (tuple(item.shape), _digest(item)) if item.dim() else float(item.detach())
    return item if isinstance(item, (int, float, str, type(None))) else repr(item)


# JSON -----------------------------------------------------------------------------------------------------------------


def _encode(
    plan: Plan, names: Mapping[str, SteeringVector] | None = None, inline: bool = False, folder: Path | None = None
) -> dict[str, Any]:
    return {"format": FORMAT, "interventions": [_encode_fields(i, names or {}, inline, folder) for i in plan]}


def _encode_fields(
    item: Intervention | Gate, names: Mapping[str, SteeringVector], inline: bool, folder: Path | None
) -> dict[str, Any]:
    """An intervention or gate as an object: its kind and every field that differs from its default."""
    encoded: dict[str, Any] = {} if isinstance(item, Gate) else {"type": type(item).__name__}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        if isinstance(value, (SteeringVector, Tensor)) and f.name in (
            *getattr(item, "direction_names", ()),
            "direction",
        ):
            encoded[f.name] = _encode_direction(value, names, inline, folder)
        elif isinstance(value, Gate):
            encoded[f.name] = _encode_fields(value, names, inline, folder)
        elif value != f.default and not (f.name == "probe" and type(item).__name__ == "Probe"):
            encoded[f.name] = _plain(value)
    return encoded


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value.detach())
    return list(value) if isinstance(value, tuple) else value


def _encode_direction(
    direction: Direction, names: Mapping[str, SteeringVector], inline: bool, folder: Path | None
) -> dict[str, str]:
    if isinstance(direction, Tensor):
        tensor = direction.detach().to("cpu", torch.float32).contiguous()
        return {"tensor": base64.b64encode(tensor_files.to_bytes({"direction": tensor}, {})).decode()}
    if inline:
        return {"vector": base64.b64encode(direction.to_bytes()).decode()}
    for name, vector in names.items():
        if vector is direction:
            return {"name": name}
    path = direction.path
    if path is not None and path.is_file() and direction.is_in_file and _sha256(path) == direction.sha256:
        path = path if folder is None else Path(os.path.relpath(path.resolve(), folder.resolve()))
        return {"path": str(path), "sha256": str(direction.sha256)}
    return {"vector": base64.b64encode(direction.to_bytes()).decode()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class _PlanReader:
    """Reads a plan's JSON; every error says where."""

    names: Mapping[str, SteeringVector]
    folder: Path

    def intervention(self, item: Any, where: str) -> Intervention:
        kind = item.get("type") if isinstance(item, dict) else item
        if not isinstance(item, dict) or not isinstance(kind, str) or kind not in KINDS:
            raise FormatError(
                f'{where}: unknown intervention {kind!r}: expected an object whose "type" is one of {", ".join(KINDS)}'
            )
        cls = KINDS[kind]
        fields = {k: v for k, v in item.items() if k != "type"}
        if isinstance(fields.get("at"), list):
            fields["at"] = tuple(fields["at"])
        return self._build(cls, fields, cls.direction_names, where)

    def _build(self, kind: type, fields: dict[str, Any], directions: tuple[str, ...], where: str) -> Any:
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := set(fields) - known:
            raise FormatError(
                f"{where}: {kind.__name__} has no field {', '.join(map(repr, sorted(unknown)))}: it has "
                f"{', '.join(sorted(known))}"
            )
        for name in directions:
            if name not in fields:
                raise FormatError(f"{where}: {kind.__name__} needs {name!r}")
            fields[name] = self.direction(fields[name], f"{where}.{name}")
        if fields.get("when") is not None:
            if not isinstance(fields["when"], dict):
                raise FormatError(f"{where}.when: expected an object with the fields of a Gate")
            fields["when"] = self._build(Gate, dict(fields["when"]), ("direction",), f"{where}.when")
        try:
            return kind(**fields)
        except UNREADABLE as error:
            raise FormatError(f"{where}: {error}") from error

    def direction(self, item: Any, where: str) -> Direction:
        ways = '{"name": ...}, {"path": ..., "sha256": ...}, {"vector": base64} or {"tensor": base64}'
        forms = ({"name"}, {"path"}, {"path", "sha256"}, {"vector"}, {"tensor"})
        if not isinstance(item, dict) or set(item) not in forms:
            raise FormatError(f"{where}: expected a direction as {ways}, with no other field")
        if "name" in item:
            if not isinstance(item["name"], str) or item["name"] not in self.names:
                raise FormatError(
                    f"{where}: no vector is registered as {item['name']!r}; known: "
                    f"{', '.join(sorted(self.names)) or 'none'}"
                )
            return self.names[item["name"]]
        if "path" in item:
            return self._from_file(item, where)
        with reading(f"{where}: the direction cannot be read", "write the plan again with plan.to_json()"):
            data = base64.b64decode(item["vector"] if "vector" in item else item["tensor"], validate=True)
            if "vector" in item:
                return SteeringVector.from_bytes(data, f"{where}: the vector")
            tensors = tensor_files.TensorFile(data).tensors()
            if set(tensors) != {"direction"}:
                raise ValueError(f'it holds {sorted(tensors)}, expected one tensor named "direction"')
            return tensors["direction"]

    def _from_file(self, item: dict[str, Any], where: str) -> SteeringVector:
        if not isinstance(item["path"], str):
            raise FormatError(f"{where}: the path is a {type(item['path']).__name__}: expected the name of a file")
        path = self.folder / item["path"]
        try:
            vector = SteeringVector.load(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FormatError(f"{where}: the file {str(path)[:200]!r} cannot be read: {error.strerror}") from error
        if "sha256" in item and vector.sha256 != item["sha256"]:
            raise FormatError(
                f"{where}: {path} is not the file that the plan was written with (SHA-256 differs): use that one, or "
                'remove "sha256" from the plan'
            )
        return vector
