"""Reading and writing vectors' files: what a file is, is told by its content."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from faststeer.file_kinds import kind_of
from faststeer.files import FormatError, write_atomically
from faststeer.formats import arrays, control_vectors, torch_files
from faststeer.formats.conventions import Said
from faststeer.sparse import SparseVector, is_sparse_file
from faststeer.vector import SteeringVector, check_ending

Written = Literal["faststeer", "gguf"]  # formats that are written
MAX_BYTES = 2**30  # a direction for each of 1,000 layers of 16,384 columns in fp64 is an eighth of that


def load(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    at: str | None = None,
    layer: int | None = None,
    position: int | None = None,
    op: str | None = None,
    model: str | None = None,
    scale: str | None = None,
) -> SteeringVector:
    """Read a steering vector of this or another project (docs/vectors.md has the table).

    Args:
        path: the file; its content says what it is, its name is looked at only where CAA and refusal_direction keep the
            layer there.
        format, at, layer, position, op, model, scale: what the file does not say, see `faststeer.formats.Said`. What
            it does say may be repeated, not contradicted.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: damaged, something else, or something left unsaid.
        ImportError: a GGUF file, and the gguf library is not installed.
    """
    path = Path(path)
    said = Said(format, at, layer, position, op, model, scale)  # type: ignore[arg-type]
    if not path.is_file():
        raise FileNotFoundError(f"no steering vector at {path}: {'a folder' if path.is_dir() else 'no such file'}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise FormatError(f"{path} has {size:,} bytes: no steering vector is so large; is it a model?")
    data = path.read_bytes()
    vector = from_bytes(data, str(path), said, path)
    if said == Said():  # a plan may then name the file instead of holding the values
        vector.belongs_to(path, data)
    return vector


def from_bytes(
    data: bytes, what: str = "the data", said: Said | None = None, path: Path | None = None
) -> SteeringVector:
    """Read a file's content; `what` names it in errors, `path` is where it lay."""
    said = said or Said()
    kind = kind_of(data)
    form = kind.name if kind is not None else "safetensors"  # what is no known kind is left for safetensors to refuse
    if form == "gguf":
        _only(said, what, "gguf")
        return _scaled(control_vectors.read(data, what, said), what, said)
    if form == "torch":
        if said.format in ("faststeer", "gguf"):
            raise FormatError(f"{what} was written by torch.save: it is no {said.format} file")
        return _scaled(torch_files.read(data, what, said, path), what, said)
    if form in NUMBERS:
        return _scaled(NUMBERS[form](data, what, said), what, said)
    if kind is not None and form != "safetensors":
        raise FormatError(f"{what} is {kind.words}, and no steering vector: {kind.remedy}")
    if arrays.is_foreign(data):
        return _scaled(arrays.read_safetensors(data, what, said), what, said)
    _only(said, what, "faststeer")
    return _ours(data, what, said)


NUMBERS = {"npy": arrays.read_npy, "npz": arrays.read_npz, "json": arrays.read_json_vector}


def _scaled(vector: SteeringVector, what: str, said: Said) -> SteeringVector:
    """A vector whose file says nothing of its scale, at that which the caller says."""
    if said.scale in (None, vector.scale):
        return vector
    for layer, direction in vector.directions.items():
        if abs((length := float(direction.double().norm())) - 1) > 1e-2:
            raise FormatError(f"{what}: the direction of layer {layer} has length {length:.3g}: leave scale='unit' out")
    return replace(vector, scale=said.scale)


def _only(said: Said, what: str, reading: str) -> None:
    if said.format not in (None, reading):
        raise FormatError(f"{what} is no file of {said.format}: by its content it is {reading}")


def _ours(data: bytes, what: str, said: Said) -> SteeringVector:
    sparse = is_sparse_file(data)
    vector = SparseVector.from_bytes(data, what).dense() if sparse else SteeringVector.from_bytes(data, what)
    said.unused(what, "position")
    said.known("at", vector.at, what)
    said.known("scale", vector.scale, what)
    for name in ("op", "model"):
        if getattr(vector, name) is not None:
            said.known(name, getattr(vector, name), what)
    chosen = said.kept(vector.directions, what)
    changes: dict[str, Any] = {"op": vector.op or said.op, "model": vector.model or said.model}
    if chosen is vector.directions and all(getattr(vector, name) == value for name, value in changes.items()):
        return vector
    return SteeringVector(
        chosen, at=vector.at, method=vector.method, scale=vector.scale, provenance=vector.provenance, **changes
    )


def save(
    vector: SteeringVector,
    path: str | os.PathLike[str],
    format: Written | None = None,
    model_hint: str | None = None,
) -> Path:
    """Write a vector atomically: ours, or a GGUF control vector.

    Args:
        format: None: gguf where the path ends in .gguf, else ours, if it does not end as another kind of file does.
        model_hint: for gguf, see `faststeer.formats.control_vectors.to_bytes`.

    Raises:
        ValueError: an unknown format, or a vector that the format cannot express (see `control_vectors.to_bytes`).
    """
    path, data = Path(path), to_bytes(vector, str(path), format, model_hint)
    write_atomically(path, data)
    if not data.startswith(
        control_vectors.MAGIC
    ):  # the other may read back at another hook point: no plan is to name it
        vector.belongs_to(path, data)
    return path


def to_bytes(vector: SteeringVector, name: str, format: Written | None = None, model_hint: str | None = None) -> bytes:
    """What `save` writes to a file of this name. Errors as there."""
    if format is None and not (name := name.lower()).endswith(".gguf"):
        check_ending(Path(name))
    format = format or ("gguf" if name.endswith(".gguf") else "faststeer")
    if format == "gguf":
        return control_vectors.to_bytes(vector, model_hint)
    if format != "faststeer":
        raise ValueError(f"cannot write format {format!r}: expected 'faststeer' or 'gguf'")
    if model_hint is not None:
        raise ValueError("model_hint is a field of GGUF: leave it out")
    return vector.to_bytes()
