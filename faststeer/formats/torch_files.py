"""`.pt` files of other projects: steering-vectors, CAA, refusal_direction. Read by torch's restricted unpickler, which
builds tensors and containers and calls nothing that a file names; never by pickle.

- steering-vectors: a pickled SteeringVector, or `{"layer_activations": {layer: [hidden]}, "layer_type": ...}`: added to
  what the module `layer_type` of a layer gives.
- CAA: `[hidden]` in `vec_layer_<layer>_<model>.pt`: added to what that layer gives, `resid_post`.
- refusal_direction: `[hidden]` in `direction.pt` beside `direction_metadata.json`: found in what enters that layer,
  `resid_pre`; and `[positions, layers, hidden]` (mean_diffs.pt), the same for every layer and the prompt's last tokens.
- Anything else, `{layer: [hidden]}`, `[layers, hidden]` or `[hidden]`: as the caller says.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faststeer.files import FormatError, read_json, read_text
from faststeer.formats.conventions import Said, as_said, built, one_row
from faststeer.vector import MAX_LAYERS, SteeringVector

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a protocol 2 pickle of a magic number
PICKLED = "steering_vectors.steering_vector.SteeringVector"


class _Pickled:
    """What stands for steering-vectors' class while reading: its fields, none of its code."""


def read(data: bytes, what: str, said: Said, path: Path | None = None) -> SteeringVector:
    """Read one of the layouts above; `path` is where the data comes from, whose name says the layer in CAA's and
    refusal_direction's folders.

    Raises:
        FormatError: damaged, no such layout, or something left unsaid that the caller does not say either.
    """
    content = _load(data, what)
    fields = vars(content) if isinstance(content, _Pickled) else content
    if isinstance(fields, Mapping) and "layer_activations" in fields:
        return _steering_vectors(fields, what, said, len(data))
    if said.format == "steering-vectors":
        raise FormatError(f"{what} has no layer_activations: it is no file of steering-vectors")
    if isinstance(content, Tensor):
        tensor = one_row(_tensor(content, what, "it", len(data)))
        if tensor.ndim == 1:
            return _single(tensor, what, said, path)
        if tensor.ndim == 3:
            return _mean_diffs(tensor, what, said)
        if tensor.ndim == 2:
            return as_said(dict(enumerate(tensor)), what, said, {"format": "torch"})
        shape = list(tensor.shape)
        raise FormatError(f"{what} holds a tensor of shape {shape}: expected [hidden] or [layers, hidden]")
    if isinstance(content, Mapping) and content:
        return as_said(_per_layer(content, what, len(data)), what, said, {"format": "torch"})
    raise FormatError(
        f"{what} holds a {type(content).__name__}: expected a tensor, {{layer: tensor}} or a SteeringVector of "
        "steering-vectors"
    )


def _load(data: bytes, what: str) -> Any:
    try:
        if data.startswith(ZIP):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
        with torch.serialization.safe_globals([(_Pickled, PICKLED)]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, which are refused or read
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and the unpickler raise what their own indexing gives
        reason = " ".join(str(error).split())[:300]
        raise FormatError(
            f"{what} cannot be read by torch.load(weights_only=True) ({type(error).__name__}: {reason}): it is "
            "truncated, damaged, or a pickle of code, which is never run, such as that of a NumPy array or a class: "
            "load it where you trust it, and save tensors"
        ) from error


def _tensor(value: Any, what: str, name: str, size: int) -> Tensor:
    """A dense tensor on the CPU whose elements the file can hold."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        raise FormatError(f"{what}: {name} is a {type(value).__name__}: expected a tensor")
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not dense or not value.is_floating_point():
        kind = f"{value.dtype} tensor on {value.device}"
        raise FormatError(f"{what}: {name} is a {kind}: expected dense floating numbers")
    if value.numel() * value.element_size() > size:
        raise FormatError(f"{what}: {name} has shape {list(value.shape)}, larger than the file: it is damaged")
    if value.numel() == 0 or max(value.shape[:-1], default=0) > MAX_LAYERS:
        shape = list(value.shape)
        raise FormatError(f"{what}: {name} has shape {shape}: expected directions of up to {MAX_LAYERS:,} layers")
    try:
        return value.detach().to(torch.float64 if value.dtype == torch.float64 else torch.float32).clone()
    except RuntimeError as error:
        raise FormatError(f"{what}: {name} cannot be read as numbers: {error}") from error


def _per_layer(content: Mapping[Any, Any], what: str, size: int) -> dict[int, Tensor]:
    directions = {_layer(key, what): _tensor(value, what, f"layer {key}", size) for key, value in content.items()}
    if len(directions) < len(content):
        raise FormatError(f"{what} names a layer twice")
    return directions


def _layer(key: Any, what: str) -> int:
    text = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise FormatError(
            f"{what} has the key {str(key)[:60]!r}: expected layer numbers counted from 0; make "
            "SteeringVector({layer: tensor}, at=...) of what it holds"
        )
    return int(text)


def _steering_vectors(fields: Mapping[str, Any], what: str, said: Said, size: int) -> SteeringVector:
    said.known("format", "steering-vectors", what) if said.format else None
    said.unused(what, "position")
    kind, activations = fields.get("layer_type", "decoder_block"), fields["layer_activations"]
    if not isinstance(activations, Mapping) or not activations:
        raise FormatError(f"{what}: its layer_activations are no {{layer: tensor}}")
    if kind == "decoder_block":
        at = said.known("at", "resid_post", what)
    elif kind in ("self_attn", "mlp"):
        point = "attn_out" if kind == "self_attn" else "mlp_out"
        why = (
            f"steers what the module {kind} gives: that is {point} in a model without norms after its branches "
            f"(at={point!r}), and no hook point in one that has them, such as Gemma 2"
        )
        at = said.needed("at", what, why)
    else:
        kind = str(kind)[:60]
        raise FormatError(f"{what} steers the module {kind!r}, whose output is no part of the residual stream")
    directions = said.kept(_per_layer(activations, what, size), what)
    return built(
        what, directions, at=at, op=said.op or "add", model=said.model, provenance={"format": "steering-vectors"}
    )


def _single(direction: Tensor, what: str, said: Said, path: Path | None) -> SteeringVector:
    """One direction: CAA's or refusal_direction's by where it lies, or as the caller says."""
    layer, model, at, method, provenance = said.layer, said.model, said.at, None, {"format": said.format or "torch"}
    named = re.fullmatch(r"vec_layer_(\d{1,6})_(.+)\.pt", path.name, re.ASCII) if path else None
    beside = _metadata_beside(path)
    if said.format == "caa" or (said.format is None and named):
        at, method, provenance = said.known("at", "resid_post", what), "caa", {"format": "caa"}
        if named:
            layer, model = said.known("layer", int(named[1]), what), said.model or named[2]
    elif said.format == "refusal_direction" or (said.format is None and beside):
        at, method, provenance = said.known("at", "resid_pre", what), "dim", {"format": "refusal_direction"}
        if beside:
            layer = said.known("layer", beside["layer"], what)
            provenance["position"] = said.known("position", beside["pos"], what)
    if at is None or layer is None:
        raise FormatError(
            f"{what} is one direction and does not say where it belongs: say layer= and at= (CAA: at='resid_post'; "
            "refusal_direction: at='resid_pre')"
        )
    if said.position is not None and "position" not in provenance:
        said.unused(what, "position")
    return built(what, {layer: direction}, at=at, op=said.op, model=model, method=method, provenance=provenance)


def _metadata_beside(path: Path | None) -> dict[str, int] | None:
    """Layer and position in refusal_direction's `direction_metadata.json`, if that is what lies beside the file."""
    if path is None or path.name != "direction.pt":
        return None
    beside = path.parent / "direction_metadata.json"
    text = read_text(beside) if beside.is_file() else ""
    try:
        content = read_json(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or set(content) != {"pos", "layer"}:
        return None
    layer, position = content["layer"], content["pos"]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (layer, position)) or layer < 0:
        return None
    return {"layer": layer, "pos": position}


def _mean_diffs(tensor: Tensor, what: str, said: Said) -> SteeringVector:
    """`[positions, layers, hidden]`; the positions are the last ones of the prompt."""
    if said.format not in (None, "refusal_direction"):
        raise FormatError(f"{what} holds a tensor of shape {list(tensor.shape)}: no file of {said.format}")
    why = f"holds directions of {tensor.shape[0]} tokens, {tensor.shape[1]} layers each"
    said.needed("format", what, why + ", which is refusal_direction's mean_diffs if it is known from there")
    position = said.needed("position", what, why)
    if position < -tensor.shape[0]:
        raise FormatError(f"{what} {why}: position={position} is not among them (-{tensor.shape[0]}..-1)")
    at = said.known("at", "resid_pre", what)
    directions = said.kept(dict(enumerate(tensor[position])), what)
    provenance = {"format": "refusal_direction", "position": position}
    return built(what, directions, at=at, op=said.op, model=said.model, method="dim", provenance=provenance)
