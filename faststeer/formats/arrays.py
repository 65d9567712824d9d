"""Vectors as bare numbers: `.npy`, `.npz`, others' safetensors, and JSON, IBM's `.svec` among it. Nothing pickled is
ever read.

| content | is |
|---|---|
| `[hidden]` | one direction, of the layer that the caller says |
| `[layers, hidden]` | a direction for every layer from 0 |
| arrays or lists by layer number | those layers' directions |
| JSON with `directions` by layer number (IBM's activation-steering) | the same, with `model_type` in the provenance |

None of them says at which hook point, and none whose model they belong to: the caller does.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faststeer.files import UNREADABLE, FormatError, read_json, reading
from faststeer.formats.conventions import Said, as_said, one_row, single
from faststeer.tensor_files import TensorFile, file_words
from faststeer.vector import MAX_LAYERS, SteeringVector

MAX_UNPACKED = 2**26  # bytes: of what is compressed, and of JSON's text
MAX_HEADER = 10_000  # characters of the text that says an array's shape
MEND = "write it with numpy.savez({str(layer): direction}), or with SteeringVector.save"


def read_npy(data: bytes, what: str, said: Said) -> SteeringVector:
    """The vector of a `.npy` file."""
    return _of_array(_array(data, what, "its array"), what, said, "npy")


def read_npz(data: bytes, what: str, said: Said) -> SteeringVector:
    """The vector of a `.npz` file."""
    with reading(f"{what} cannot be read as .npz", f"is it truncated or damaged? Copy it again, or {MEND}"):
        content = _unpacked(data)
    arrays = {name: _array(array, what, f"its array {name[:60]!r}") for name, array in content.items()}
    return _of_arrays(arrays, what, said, "npz")


def read_safetensors(data: bytes, what: str, said: Said) -> SteeringVector:
    """The vector of a safetensors file that another project wrote."""
    with reading(f"{what} cannot be read as safetensors", f"is it truncated or damaged? Copy it again, or {MEND}"):
        tensors = TensorFile(data).tensors()
        if other := [f"{name} of {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]:
            raise ValueError(f"it holds {other[0]}, expected floating numbers")
    return _of_arrays(tensors, what, said, "safetensors")


def is_foreign(data: bytes) -> bool:
    """Whether this is a safetensors file that faststeer did not write."""
    try:
        return not file_words(data).get("format", "").startswith("faststeer.")
    except UNREADABLE:
        return False


def _unpacked(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MAX_UNPACKED or len(entries) > MAX_LAYERS:
                raise ValueError(f"it has {len(entries):,} arrays, or more than {MAX_UNPACKED:,} bytes of them")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ValueError("it has two arrays of one name")
            return {entry.filename.removesuffix(".npy"): archive.read(entry) for entry in entries}
    except UNREADABLE:
        raise
    except Exception as error:  # zipfile and zlib have classes of their own
        raise ValueError(str(error) or type(error).__name__) from error


def read_json_vector(data: bytes, what: str, said: Said) -> SteeringVector:
    """The vector of a JSON file."""
    if len(data) > MAX_UNPACKED:
        raise FormatError(f"{what} has {len(data):,} bytes of JSON: no steering vector is so large")
    with reading(f"{what} is no JSON that can be read", f"is it truncated or damaged? Copy it again, or {MEND}"):
        content = read_json(data.decode("utf-8-sig"))
    provenance: dict[str, Any] = {}
    if isinstance(content, dict) and "directions" in content:
        if isinstance(content.get("model_type"), str):
            provenance["model_type"] = content["model_type"]
        content = content["directions"]
    if isinstance(content, dict):
        rows = {name: _numbers(values, what, f"{name[:60]!r}") for name, values in content.items()}
        return _of_layers(rows, what, said, "json", provenance)
    if isinstance(content, list) and content and all(isinstance(row, list) for row in content):
        if len(content) > MAX_LAYERS:
            raise FormatError(f"{what} has {len(content):,} rows: expected directions of up to {MAX_LAYERS:,} layers")
        rows = {str(n): _numbers(row, what, f"row {n}") for n, row in enumerate(content)}
        if len(rows) > 1:
            return _of_layers(rows, what, said, "json", provenance)
        content = content[0]
    return single(_numbers(content, what, "it"), what, said, {"format": "json"})


_NUMBER = re.compile(r"\d{1,6}", re.ASCII)


def _of_array(array: Tensor, what: str, said: Said, form: str) -> SteeringVector:
    array = one_row(array)
    if array.ndim == 1:
        return single(array, what, said, {"format": form})
    if array.ndim != 2 or array.shape[0] > MAX_LAYERS:
        raise FormatError(f"{what} holds an array of shape {list(array.shape)}: expected [hidden] or [layers, hidden]")
    return as_said(dict(enumerate(array)), what, said, {"format": form})


def _of_arrays(arrays: Mapping[str, Tensor], what: str, said: Said, form: str) -> SteeringVector:
    """One array by whatever name, or arrays by layer number."""
    if len(arrays) == 1 and not _NUMBER.fullmatch(next(iter(arrays))):
        return _of_array(next(iter(arrays.values())), what, said, form)
    return _of_layers(arrays, what, said, form)


def _of_layers(
    rows: Mapping[str, Tensor], what: str, said: Said, form: str, provenance: Mapping[str, Any] | None = None
) -> SteeringVector:
    directions: dict[int, Tensor] = {}
    for name, row in rows.items():
        if not _NUMBER.fullmatch(name) or int(name) in directions:
            raise FormatError(
                f"{what} holds {', '.join(repr(name[:40]) for name in list(rows)[:6])}: expected directions by layer "
                f"number, counted from 0 and each once; {MEND}"
            )
        directions[int(name)] = row
    if not directions:
        raise FormatError(f"{what} holds no directions: expected them by layer number; {MEND}")
    return as_said(directions, what, said, {"format": form, **(provenance or {})})


def _array(data: bytes, what: str, name: str) -> Tensor:
    """An array as NumPy writes it, from its header and its bytes; never more than the file holds."""
    with reading(f"{what}: {name} cannot be read as .npy", f"is it truncated or damaged? Copy it again, or {MEND}"):
        shape, fortran, dtype, start = _header(data)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"it holds {dtype}, expected floating numbers (what is pickled is never read)")
        rest = data[start:]
        if any(type(size) is not int or size < 1 for size in shape) or math.prod(shape) * dtype.itemsize != len(rest):
            raise ValueError(f"its shape is {list(shape)[:8]}, and it has {len(rest):,} bytes of numbers")
        array = np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(np.array(array, dtype=np.float64 if dtype.itemsize == 8 else np.float32, order="C"))


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns lie together, kind of number, and where the numbers begin."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format is not known")
    try:
        return (*readers[version](file, max_header_size=MAX_HEADER), file.tell())
    except UNREADABLE:
        raise
    except Exception as error:  # the parser of its text has classes of its own
        raise ValueError(f"its header is no description of an array: {error}") from error


def _numbers(values: Any, what: str, name: str) -> Tensor:
    numbers = values if isinstance(values, list) else []
    if not numbers or not all(type(number) in (int, float) for number in numbers):
        shown = json.dumps(values)[:60]
        raise FormatError(
            f"{what}: {name} is {shown}: expected a list of numbers, [hidden]; {MEND}; a plan is read by Plan.load"
        )
    with reading(f"{what}: {name} has a number that is too large", "mend the file"):
        array = np.fromiter(map(float, numbers), np.float64, len(numbers))
        with np.errstate(over="ignore"):  # what became infinite is refused by the vector
            return torch.from_numpy(array.astype(np.float32))
