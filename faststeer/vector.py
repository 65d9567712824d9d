"""Steering vectors: what was found in a model, with the words needed to use it elsewhere.

A vector knows its hook point, layers, scale and origin, and keeps them in its file (safetensors, never a pickle), so
that it cannot be applied one layer off or at another scale without somebody saying so. This module never touches a
model.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from faststeer import tensor_files
from faststeer.file_kinds import READERS
from faststeer.files import FormatError, read_json, reading, write_atomically
from faststeer.ops.dispatch import has_tangent

HookPoint = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
HOOK_POINTS: tuple[HookPoint, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
FORMAT = "faststeer.vector/1"
LAYER_CONVENTION = "decoder layers counted from 0; the hook point is that layer's own"
OPS = ("add", "ablate", "project", "clamp", "rotate")
OTHERS_ENDINGS = (".gguf", ".pt", ".pth", ".npy", ".npz", ".json", ".svec", ".pkl")  # of what is no safetensors file
MAX_LAYERS = 10_000  # the deepest models have a few hundred: a larger number is a mistake, or made to cost memory


def check_hook_point(at: object) -> HookPoint:
    """Return `at` if it names a hook point, else raise ValueError with the names there are."""
    if at not in HOOK_POINTS:
        raise ValueError(f"unknown hook point {at!r}: expected one of {', '.join(HOOK_POINTS)}")
    return at


def whole_number(value: object) -> int | None:
    """`value` as an int, also one of NumPy or a tensor; None for what is no whole number (a bool is none)."""
    if isinstance(value, Tensor):
        whole = value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        return int(value) if whole else None
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def check_direction(direction: object, what: str, *, subspace: bool = False) -> Tensor:
    """Return `direction` as a floating tensor `[hidden]` (or `[k, hidden]` where `subspace`), refusing NaN, infinity
    and wrong shapes by name."""
    if not isinstance(direction, Tensor):
        try:
            if isinstance(direction, np.ndarray):  # torch takes no reversed one, and none of the other byte order
                direction = np.array(direction, dtype=direction.dtype.newbyteorder("="), order="C")
            direction = torch.as_tensor(direction)
        except (TypeError, ValueError, RuntimeError):
            kind = " of ".join(map(str, (type(direction).__name__, *filter(None, [getattr(direction, "dtype", None)]))))
            raise TypeError(f"{what} is a {kind}: expected a tensor of shape [hidden] or a SteeringVector") from None
    if direction.is_complex() or direction.layout != torch.strided or direction.is_quantized or direction.is_nested:
        kind = f"{direction.dtype}, {'nested' if direction.is_nested else direction.layout}"
        raise ValueError(
            f"{what} is {kind}: expected real numbers in a dense tensor (.real, .to_dense(), .dequantize())"
        )
    if direction.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        direction = direction.float()
    allowed = (1, 2) if subspace else (1,)
    if direction.ndim not in allowed or direction.numel() == 0:
        expected = "[hidden] or [k, hidden]" if subspace else "[hidden]"
        raise ValueError(f"{what} has shape {list(direction.shape)}: expected a direction of shape {expected}")
    if direction.is_meta:
        raise ValueError(f"{what} is on the meta device and holds no values: load it first")
    # As the tables will hold it: what overflows there would steer with infinity.
    finite = torch.isfinite(in_tables(direction))
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{what} has {bad} NaN or infinite value(s): a direction must be finite; was it extracted from a model "
            "that overflowed (try bfloat16 or float32)?"
        )
    return direction


def is_trained(values: Tensor) -> bool:
    """Whether a derivative by these values is asked for: a gradient, or one along their tangent."""
    return values.requires_grad or has_tangent(values)


def in_tables(direction: Tensor) -> Tensor:
    """The values that a program's tables and a vector's file hold: fp32."""
    return direction.detach().float()


def check_ending(path: Path) -> None:
    """Refuse a name by which others would take a vector's file for one of another kind."""
    if path.suffix.lower() in OTHERS_ENDINGS:
        raise ValueError(
            f"{path}: save() writes safetensors: name it .safetensors; faststeer.formats.save(vector, path) writes a "
            "GGUF file"
        )


def check_text(text: object, what: str) -> None:
    """Refuse what is neither None nor a text that a file can hold."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}: expected a text, or None where it is not known")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no valid Unicode text: {error.reason}") from error


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction per decoder layer.

    Args:
        directions: `{layer: [hidden]}`, layers counted from 0, all of one hidden size, finite and not zero (a tensor
            that requires a gradient may be zero: it is being trained).
        at: hook point where the directions were found and are to be used (see docs/design.md).
        model: name of the model they were found in.
        method: how they were found, such as "dim".
        scale: "raw" if the length has a meaning (a difference in means), "unit" if only the direction has.
        provenance: any other information, JSON-serialisable.
        op: the intervention it is for, if known: "add", "ablate", "project", "clamp" or "rotate".

    `v[14]` is the direction of layer 14, `v.layers` lists its layers, and `14 in v` tells whether it has layer 14.

    Raises:
        TypeError: directions that are no `{layer: direction}`, a provenance that is no object of JSON.
        ValueError: no layers, negative layers, different hidden sizes, NaN or infinity, a direction that is zero in
            fp32, an unknown hook point or scale, a layer from 10,000 on, a model or method that is no text.
    """

    directions: Mapping[int, Tensor]
    at: HookPoint = "resid_post"
    model: str | None = None
    method: str | None = None
    scale: Literal["raw", "unit"] = "raw"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    op: Literal["add", "ablate", "project", "clamp", "rotate"] | None = None
    path: Path | None = field(default=None, repr=False)  # the file it was last read from or written to
    sha256: str | None = field(default=None, repr=False)  # of that file's content then
    _in_file: str | None = field(default=None, repr=False)  # SHA-256 of `to_bytes()` then

    def __post_init__(self) -> None:
        check_hook_point(self.at)
        if self.scale not in ("raw", "unit"):
            raise ValueError(f"unknown scale {self.scale!r}: expected 'raw' or 'unit'")
        if self.op is not None and self.op not in OPS:
            raise ValueError(f"unknown op {self.op!r}: expected one of {', '.join(OPS)}, or None where it is open")
        for name in ("model", "method"):
            check_text(getattr(self, name), f"the vector's {name}")
        _check_provenance(self.provenance)
        if not isinstance(self.directions, Mapping):
            kind = type(self.directions).__name__
            raise TypeError(f"directions is a {kind}: expected {{layer: direction of shape [hidden]}}")
        if not self.directions:
            raise ValueError("a SteeringVector needs at least one layer: {layer: direction of shape [hidden]}")
        checked: dict[int, Tensor] = {}
        for key, values in self.directions.items():
            layer = whole_number(key)
            if layer is None or layer < 0:
                raise ValueError(f"layer {key!r}: a SteeringVector's layers are integers counted from 0")
            if layer >= MAX_LAYERS:
                raise ValueError(f"layer {layer}: expected a number below {MAX_LAYERS:,}, layers counted from 0")
            if layer in checked:
                raise ValueError(f"layer {layer} is named twice, as {key!r} and otherwise")
            direction = check_direction(values, f"the direction of layer {layer}")
            if not is_trained(direction) and not bool(in_tables(direction).any()):
                raise ValueError(
                    f"the direction of layer {layer} is zero: it points nowhere; was the extraction given the same "
                    "prompts twice?"
                )
            checked[layer] = direction
        sizes = {d.shape[0] for d in checked.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"the directions have different hidden sizes {sorted(sizes)}: all layers of one model have the same"
            )
        object.__setattr__(self, "directions", dict(sorted(checked.items())))

    def __getitem__(self, layer: int) -> Tensor:
        try:
            return self.directions[layer]
        except KeyError:
            raise KeyError(
                f"this vector has no direction for layer {layer}; it has {layers_text(self.layers)}"
            ) from None

    def __contains__(self, layer: object) -> bool:
        return layer in self.directions

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, in ascending order."""
        return tuple(self.directions)

    @property
    def hidden_size(self) -> int:
        """The length of a direction: the width of the residual stream."""
        return next(iter(self.directions.values())).shape[0]

    def __repr__(self) -> str:
        return (
            f"SteeringVector(layers {layers_text(self.layers)}, hidden {self.hidden_size}, at={self.at!r}, "
            f"scale={self.scale!r}, "
            f"method={self.method!r}, model={self.model!r})"
        )

    def to_bytes(self) -> bytes:
        """The vector as a safetensors file in memory: fp32 tensors `layers.<n>`, the rest as metadata, with checksums
        (`tensor_files`)."""
        tensors = {
            f"layers.{layer}": d.detach().to("cpu", torch.float32).contiguous().clone()
            for layer, d in self.directions.items()
        }
        return tensor_files.to_bytes(tensors, header_of(self, FORMAT))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vector to `path` as safetensors, atomically: a reader sees the old file or the whole new one.

        Raises:
            ValueError: a name that ends as those of another kind of vector's file do (.gguf, .pt, .npz, .json, ...);
                `faststeer.formats.save` writes llama.cpp's format.
        """
        path, data = Path(path), self.to_bytes()
        check_ending(path)
        write_atomically(path, data)
        self.belongs_to(path, data)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], **said: Any) -> SteeringVector:
        """Read a vector's file, whatever its name: one written by `save`, a GGUF control vector of llama.cpp or repeng,
        or a `.pt` file of steering-vectors, CAA or refusal_direction.

        Args:
            said: what the file leaves unsaid, see `faststeer.formats.load`: `at`, `layer`, `position`, `op`, `model`,
                `format`. Files written by `save` leave nothing unsaid.

        Raises:
            FileNotFoundError: there is no such file.
            FormatError (a ValueError): the file is damaged, holds something else, or its hook point, layer or op
                cannot be known from it.
        """
        return READERS["vector"](path, **said)

    def belongs_to(self, path: Path, data: bytes) -> None:
        """Note the file that holds this vector, for plans that name it instead of holding the values."""
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "sha256", hashlib.sha256(data).hexdigest())
        object.__setattr__(self, "_in_file", hashlib.sha256(self.to_bytes()).hexdigest())

    @property
    def is_in_file(self) -> bool:
        """Whether the vector is still what `path` held when it was read or written: its values may have been changed in
        place since, and `dataclasses.replace` keeps the path."""
        return self._in_file is not None and self._in_file == hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "the data") -> SteeringVector:
        """Read what `to_bytes` made; `what` names it in errors (FormatError)."""
        with reading(
            f"{what} cannot be read as safetensors",
            "is it truncated, damaged or another kind of file? Copy or extract it again",
        ):
            file = tensor_files.TensorFile(data)
            tensors, words = file.tensors(), file.words
        if words.get("format") != FORMAT:
            raise FormatError(
                f"{what} is safetensors but no faststeer vector (format {words.get('format')!r}, expected "
                f"{FORMAT!r}): build one with SteeringVector({{layer: direction}}, at=...).save(path)"
            )
        with reading(f"{what} is not a valid steering vector", "copy or extract it again"):
            said = check_words(words)
            layers = [layer_of_tensor(name) for name in tensors]
            if len(set(layers)) < len(layers):
                raise ValueError(f"it holds a layer twice: {', '.join(tensors)}")
            return cls(dict(zip(layers, tensors.values(), strict=True)), **said)


def _check_provenance(provenance: object) -> None:
    if not isinstance(provenance, Mapping):
        raise TypeError(f"the vector's provenance is a {type(provenance).__name__}: expected an object of JSON, {{}}")
    try:
        json.dumps(dict(provenance), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"the vector's provenance is not JSON: {error}; give texts and numbers") from error


def words_of(vector: Any) -> dict[str, Any]:
    """What a vector, dense or sparse, says beside its directions."""
    return {name: getattr(vector, name) for name in ("at", "model", "method", "scale", "provenance", "op")}


def header_of(vector: Any, format: str) -> dict[str, str]:
    """The metadata of a vector's file."""
    words = words_of(vector) | {"provenance": json.dumps(dict(vector.provenance), sort_keys=True)}
    words |= {"format": format, "layer_convention": LAYER_CONVENTION}
    return {name: value for name, value in words.items() if value is not None}


def check_words(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata of a vector's file says as a vector's arguments, or raise ValueError if it names no hook
    point, holds no provenance, or counts its layers otherwise than here."""
    if (counted := metadata.get("layer_convention")) != LAYER_CONVENTION:
        raise ValueError(f"its layer convention is {counted!r}, expected {LAYER_CONVENTION!r}")
    provenance = read_json(metadata.get("provenance", "{}"))
    if not isinstance(provenance, dict):
        raise ValueError("its provenance is not an object")
    said = {name: metadata[name] for name in ("model", "method", "scale", "op") if name in metadata}
    return {**said, "at": check_hook_point(metadata.get("at")), "provenance": provenance}


def layer_of_tensor(name: str) -> int:
    """The layer of a tensor `layers.<number>`; ValueError for any other name."""
    prefix, _, number = name.partition(".")
    if prefix != "layers" or not number.isdecimal():
        raise ValueError(f"it holds a tensor {name!r}: a faststeer vector holds only tensors named layers.<number>")
    return int(number)


def layers_text(layers: tuple[int, ...]) -> str:
    if len(layers) > 3 and all(b == a + 1 for a, b in pairwise(layers)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers))
