"""GGUF control vectors, as llama.cpp and repeng write and apply them.

A tensor `direction.N` (fp32, `[hidden]`) is added to what decoder layer N, counted from 0, gives: `resid_post` of layer
N. Both projects agree on that when a vector is applied (llama.cpp adds it to the layer's `l_out`, repeng to the output
of `model.layers[N]`); llama.cpp never has one for layer 0 and refuses a file with `direction.0`. llama.cpp's
cvector-generator labels what it found at layer N - 1 with N; a file means what is applied, so that is not undone here.

Reading walks the header with bounds first, since the gguf library believes a file's counts and lengths.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faststeer.extras import needed_for
from faststeer.files import FormatError, read_json, writing
from faststeer.formats.conventions import Said, built
from faststeer.vector import SteeringVector

MAGIC = b"GGUF"
ARCHITECTURE = "controlvector"
SAYS_NOTHING = ("controlvector.model_hint", "controlvector.layer_count")  # what both writers write; layers are counted
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a metadata value, by its type
_STRING, _ARRAY = 8, 9
_MOST = 10_000  # metadata values, elements of an array, tensors: no control vector comes near


def read(data: bytes, what: str, said: Said) -> SteeringVector:
    """Read a control vector; fp32, fp16 and fp64 tensors.

    Raises:
        FormatError: damaged; a model instead of a control vector; a tensor that is no `direction.N`; metadata under
            `controlvector.` that is not known here, which might say that the directions are not to be added (say
            op="add" if they are).
    """
    said.unused(what, "position")
    architecture = _walk(data, what)
    if architecture != ARCHITECTURE:
        raise FormatError(
            f"{what} is GGUF with architecture {architecture!r}: expected {ARCHITECTURE!r}; is it a model?"
        )
    fields, tensors = _read(data, what)
    at, op = said.known("at", "resid_post", what), said.known("op", _op(fields, what, said), what)
    directions = {_layer(name, what): _values(tensor, name, what) for name, tensor in tensors.items()}
    if not directions:
        raise FormatError(f"{what} holds no direction")
    ours = _ours(fields, what)
    hint = fields.get("controlvector.model_hint")
    scale = said.known("scale", ours["scale"], what) if "scale" in ours else "raw"
    return built(
        what,
        said.kept(directions, what),
        at=at,
        op=op,
        model=ours.get("model") or said.model,
        method=ours.get("method"),
        scale=scale,
        provenance=ours.get("provenance", {"format": "gguf", "model_hint": hint}),
    )


def to_bytes(vector: SteeringVector, model_hint: str | None = None) -> bytes:
    """The vector as a GGUF control vector, fp32.

    A vector at `resid_pre` of layer N is written as `direction.(N - 1)`: the same tensor of the residual stream.
    Coefficients are not part of such a file (llama.cpp: `--control-vector-scaled FILE SCALE`).

    Args:
        model_hint: the architecture's name that other tools expect there (repeng: `config.model_type`); by default the
            vector's model.

    Raises:
        ImportError: the gguf library is not installed.
        ValueError: a vector that is not meant to be added, is at another hook point, or has a direction for what leaves
            layer 0, which llama.cpp cannot steer.
    """
    gguf = _library()
    if vector.op not in (None, "add"):
        raise ValueError(f"the vector is meant to {vector.op}: llama.cpp and repeng would add it")
    if vector.at not in ("resid_pre", "resid_post"):
        raise ValueError(f"the vector is at {vector.at}: llama.cpp and repeng steer resid_post only")
    shift = 1 if vector.at == "resid_pre" else 0
    if (first := vector.layers[0] - shift) < 1:
        raise ValueError(
            f"{vector.at} of layer {vector.layers[0]} would be written as direction.{first}: llama.cpp steers what "
            "leaves layers 1, 2, ... and refuses such a file; leave that layer out "
            "(`formats.control_vectors.without_first_layers`)"
        )
    with writing("a temporary file for a GGUF vector (TMPDIR says where)"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string("controlvector.model_hint", model_hint or vector.model or "unknown")
        writer.add_uint32("controlvector.layer_count", len(vector.layers))
        for name in ("model", "method", "scale"):
            if getattr(vector, name) is not None:
                writer.add_string(f"faststeer.{name}", getattr(vector, name))
        writer.add_string("faststeer.provenance", json.dumps(dict(vector.provenance), sort_keys=True))
        writer.add_string("faststeer.op", "add")
        writer.add_string("faststeer.at", "resid_post")
        for layer in vector.layers:
            direction = vector[layer].detach().to("cpu", torch.float32).contiguous()
            writer.add_tensor(f"direction.{layer - shift}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def without_first_layers(vector: SteeringVector) -> tuple[SteeringVector, list[int]]:
    """Return the vector without the layers that a control vector cannot hold (`resid_pre` of layers 0 and 1,
    `resid_post` of layer 0), and their numbers.

    Raises:
        ValueError: no other layer is left.
    """
    first = 2 if vector.at == "resid_pre" else 1
    directions = {layer: vector[layer] for layer in vector.layers if layer >= first}
    if not directions:
        raise ValueError(
            f"the vector has only layers {', '.join(map(str, vector.layers))} at {vector.at}: llama.cpp steers what "
            "leaves layers 1, 2, ..., so that a GGUF file cannot hold them; find the direction at a later layer"
        )
    left_out = [layer for layer in vector.layers if layer < first]
    return replace(vector, directions=directions, path=None, sha256=None) if left_out else vector, left_out


def _library() -> ModuleType:
    with needed_for("a control vector of llama.cpp", "gguf"):
        import gguf
    return gguf


# Reading --------------------------------------------------------------------------------------------------------------


class _HeaderCursor:
    """A cursor over a header that never leaves it."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.what, self.at, self.order = data, what, 4, "<"
        if (self.number("I") & 0xFFFF) == 0:
            self.order = ">"
        self.at = 4

    def skip(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise FormatError(f"{self.what} ends inside its header: it is truncated or damaged; copy it again")
        start, self.at = self.at, end
        return self.data[start:end]

    def number(self, kind: str) -> int:
        return int(struct.unpack(self.order + kind, self.skip(struct.calcsize(kind)))[0])

    def count(self, kind: str, name: str) -> int:
        if (n := self.number(kind)) > _MOST:
            raise FormatError(f"{self.what} claims {n} {name}: no control vector has so many; it is damaged")
        return n

    def text(self) -> bytes:
        return self.skip(self.number("Q"))

    def value(self, kind: int, *, inside: bool = False) -> bytes:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and not inside:
            element = self.number("I")
            for _ in range(self.count("Q", "elements of one array")):
                self.value(element, inside=True)
            return b""
        if kind not in _SIZES:
            raise FormatError(f"{self.what} has metadata of an unknown type ({kind}): it is damaged")
        return self.skip(_SIZES[kind])


def _walk(data: bytes, what: str) -> str | None:
    """Check that every count and length of the header stays inside the file; returns the architecture's name."""
    walk = _HeaderCursor(data, what)
    if (version := walk.number("I")) not in (2, 3):
        raise FormatError(f"{what} is GGUF version {version}: expected 2 or 3")
    n_tensors, n_values = walk.count("Q", "tensors"), walk.count("Q", "metadata values")
    architecture = None
    for _ in range(n_values):
        key = walk.text()
        kind = walk.number("I")
        value = walk.value(kind)
        if key == b"general.architecture" and kind == _STRING:
            architecture = value.decode(errors="replace")
    for _ in range(n_tensors if architecture == ARCHITECTURE else 0):
        walk.text()
        shape = [walk.number("Q") for _ in range(walk.count("I", "dimensions of a tensor"))]
        walk.number("I")
        walk.number("Q")
        if math.prod(shape) > len(data):
            raise FormatError(f"{what} has a tensor of shape {shape}, larger than the file: it is damaged")
    return architecture


def _read(data: bytes, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values and tensors by name, through the library."""
    gguf = _library()
    with writing("a temporary file for a GGUF vector (TMPDIR says where)"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        path.write_bytes(data)
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {tensor.name: _Copy(tensor) for tensor in reader.tensors}
        except Exception as error:  # whatever numpy says of bytes that make no sense
            raise FormatError(f"{what} cannot be read as GGUF ({error}): it is truncated or damaged") from error
    return fields, tensors


class _Copy:
    """A tensor of the file, which is gone after reading."""

    def __init__(self, tensor: Any) -> None:
        self.kind, self.data = tensor.tensor_type.name, np.array(tensor.data)


def _layer(name: str, what: str) -> int:
    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isascii() or not number.isdigit() or str(int(number[:9])) != number:
        raise FormatError(f"{what} holds a tensor {name!r}: a control vector holds only direction.<layer>")
    return int(number)


def _values(tensor: _Copy, name: str, what: str) -> Tensor:
    if tensor.kind not in ("F32", "F16", "F64"):
        raise FormatError(f"{what}: {name} is {tensor.kind}: expected F32 (what llama.cpp reads), F16 or F64")
    with np.errstate(over="ignore"):
        return torch.from_numpy(tensor.data.astype(np.float32))


def _op(fields: dict[str, Any], what: str, said: Said) -> str:
    """Control vectors are added, unless the file says something that is not known here."""
    unknown = [n for n in fields if n.startswith("controlvector.") and n not in SAYS_NOTHING]
    if unknown and said.op is None:
        listed = ", ".join(f"{name} = {str(fields[name])[:40]!r}" for name in unknown)
        raise FormatError(
            f"{what} says {listed}, which is not known here and may mean that its directions are not to be added: "
            'say op="add" if they are'
        )
    return "add"


def _ours(fields: dict[str, Any], what: str) -> dict[str, Any]:
    """What `to_bytes` adds for itself, if it is all there and well-formed."""
    ours = {n.removeprefix("faststeer."): v for n, v in fields.items() if n.startswith("faststeer.")}
    if ours.get("op", "add") != "add" or ours.get("at", "resid_post") != "resid_post":
        raise FormatError(f"{what} says op={ours.get('op')!r}, at={ours.get('at')!r}: a control vector has neither")
    try:
        if "provenance" in ours:
            ours["provenance"] = read_json(ours["provenance"])
            if not isinstance(ours["provenance"], dict):
                raise ValueError("not an object")
    except (TypeError, ValueError) as error:
        raise FormatError(f"{what}: its provenance cannot be read ({error})") from error
    for name in ("model", "method", "scale"):
        if not isinstance(ours.get(name, ""), str):
            raise FormatError(f"{what}: its {name} is no text")
    return ours
