"""JSON Schema of plans (draft 2020-12), made from the dataclasses that the reader of plans fills.

It says which objects, fields, types and names a plan may have. It never opens a file: whether a vector is registered, a
file's content and whether a plan fits a model is known only to `Plan.load` and to the model.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from faststeer.intervention import FLOAT32_MAX, KINDS, Add, Clamp, Gate, Intervention, Probe
from faststeer.ops.tables import POSITION_MAX, POSITION_MIN
from faststeer.plan import FORMAT
from faststeer.vector import HOOK_POINTS, MAX_LAYERS

BASE64 = {
    "type": "string",
    "minLength": 4,
    "pattern": "^[A-Za-z0-9+/]+={0,2}$",
    "contentEncoding": "base64",
}
NUMBER = {"type": "number", "minimum": -FLOAT32_MAX, "maximum": FLOAT32_MAX}
HOOK_POINT = {"enum": list(HOOK_POINTS)}
POSITIONS = {
    "oneOf": [
        {"type": "string", "pattern": r"^(all|prompt|generated|last|\[?-?[0-9]*:(-?[0-9]+)?\]?)$"},
        {"type": "integer", "minimum": POSITION_MIN, "maximum": POSITION_MAX - 1},
    ]
}
LAYERS = {
    "oneOf": [
        {"type": "integer"},
        {"const": "all"},
        {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": 1,
            "maxItems": MAX_LAYERS,
            "uniqueItems": True,
        },
        {"type": "null"},
    ]
}
# By the annotation of a field in intervention.py.
BY_ANNOTATION: dict[str, dict[str, Any]] = {
    "Direction": {"$ref": "#/$defs/direction"},
    "Gate | None": {"oneOf": [{"$ref": "#/$defs/gate"}, {"type": "null"}]},
    "Layers": LAYERS,
    "Positions": POSITIONS,
    "HookPoint | tuple[HookPoint, ...] | None": {
        "oneOf": [
            HOOK_POINT,
            {"type": "array", "items": HOOK_POINT, "minItems": 1, "uniqueItems": True},
            {"type": "null"},
        ]
    },
    "HookPoint | None": {"enum": [*HOOK_POINTS, None]},
    "Literal['dot', 'cosine']": {"enum": ["dot", "cosine"]},
    "Number": NUMBER,
    "float": NUMBER,
    "float | None": {"oneOf": [NUMBER, {"type": "null"}]},
    "int | None": {"type": ["integer", "null"]},
    "bool": {"type": "boolean"},
}
TEXT = {"type": "string"}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "a vector that the reader knows by this name": {"name": TEXT},
    "a file, relative to the plan's folder; with sha256 it must have this content": {"path": TEXT, "sha256": TEXT},
    "the bytes of a vector's file": {"vector": BASE64},
    "the bytes of a safetensors file with one tensor, named direction": {"tensor": BASE64},
}


def plan_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `Plan.to_json` writes and `Plan.load` reads.

    Returns:
        an object for a file or a validator. It describes each kind of intervention, a gate and a direction under
        "$defs". What it accepts can still be refused by `Plan.load`: an empty range of positions, bounds of a Clamp in
        the wrong order, a name or file that is not there, content that is no vector.
    """
    kinds = {name: _kind(kind) for name, kind in KINDS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "faststeer plan",
        "description": "Interventions on the residual stream of a language model, in the order in which they act.",
        "type": "object",
        "properties": {
            "format": {"const": FORMAT},
            "interventions": {"type": "array", "items": {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in kinds]}},
        },
        "required": ["format", "interventions"],
        "additionalProperties": False,
        "$defs": {**kinds, "gate": _gate(), "direction": _direction()},
    }


def _kind(kind: type[Intervention]) -> dict[str, Any]:
    schema = _object(kind, kind.direction_names)
    schema["properties"] = {"type": {"const": kind.__name__}, **schema["properties"]}
    schema["required"].insert(0, "type")
    properties = schema["properties"]
    if kind is Add:
        properties["probe"] = {"const": False, "description": "Add takes no dot product that could be written."}
    if kind is Probe:
        every = {"description": "a Probe looks at every token and changes none."}
        properties |= {"positions": {"const": "all"} | every, "keep_norm": {"const": False} | every}
        properties["when"] = {"type": "null"} | every
    if kind is Clamp:
        schema["anyOf"] = [{"properties": {name: NUMBER}, "required": [name]} for name in ("low", "high")]
    return schema


def _gate() -> dict[str, Any]:
    latched = {"properties": {"latched": {"const": True}}, "required": ["latched"]}
    anywhere = {"properties": {"layer": {"type": "null"}, "at": {"type": "null"}}}
    return _object(Gate, ("direction",)) | {"anyOf": [latched, anywhere]}


def _object(item: type, directions: tuple[str, ...]) -> dict[str, Any]:
    """A dataclass as a JSON object: every field by its annotation, the directions required."""
    texts = _described(item)
    properties = {}
    for field in dataclasses.fields(item):
        properties[field.name] = dict(BY_ANNOTATION[str(field.type)])
        if field.name in texts:
            properties[field.name]["description"] = texts[field.name]
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = field.default
    return {
        "description": " ".join((item.__doc__ or "").split("\n\n")[0].split()),
        "type": "object",
        "properties": properties,
        "required": list(directions),
        "additionalProperties": False,
    }


def _described(item: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field under "Args:"."""
    texts: dict[str, str] = {}
    for base in reversed(item.__mro__):
        _, _, args = (base.__doc__ or "").partition("Args:\n")
        for names, text in re.findall(r"(?ms)^        (\w[\w, ]*): (.*?)(?=^        \w|\n\n|\Z)", args):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def _direction() -> dict[str, Any]:
    forms = [
        {
            "description": text,
            "type": "object",
            "properties": properties,
            "required": [next(iter(properties))],
            "additionalProperties": False,
        }
        for text, properties in DIRECTIONS.items()
    ]
    return {"description": "A steering vector, or a bare direction.", "oneOf": forms}
