"""safetensors files with checksums: what all files of tensors that faststeer writes have in common.

Beside its own words, the header of such a file holds

- `sha256.tensors`: JSON, the SHA-256 of each tensor (its dtype and shape as text, then its bytes) by name;
- `sha256`: that of all other words of the header, `sha256.tensors` among them.

So a tensor can be checked when it is read, without reading the others. A file without them is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from faststeer.file_kinds import expect
from faststeer.files import read_json

OF_WORDS, OF_TENSORS = "sha256", "sha256.tensors"
MAX_HEADER = 100_000_000  # bytes; safetensors reads no larger one


def to_bytes(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> bytes:
    """A safetensors file in memory with `words` as metadata and checksums. Equal content is equal bytes: the header's
    keys are in order, which safetensors does not promise for metadata."""
    sums = {name: _of_tensor(tensor) for name, tensor in tensors.items()}
    words = {**words, OF_TENSORS: json.dumps(sums, sort_keys=True)}
    data = to_safetensors(dict(tensors), {**words, OF_WORDS: _of_words(words)})
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


class TensorFile:
    """A safetensors file or its bytes, read tensor by tensor.

    Attributes:
        words: the header's metadata, without the checksums.
        names: of its tensors.

    Every method may raise what safetensors does, and ValueError where a checksum differs: use it inside
    `files.reading`, which says which file it was.
    """

    def __init__(self, source: bytes | Path) -> None:
        if isinstance(source, bytes) or source.is_file():
            expect(source, "safetensors")
        self._source = source
        self.words = file_words(source)
        expected, sums = self.words.pop(OF_WORDS, None), self.words.get(OF_TENSORS)
        if (expected or sums) and (not sums or _of_words(self.words) != expected):
            raise ValueError(f"its header is not the one that was written: {OF_WORDS} differs")
        self._sums = read_json(self.words.pop(OF_TENSORS)) if sums else {}
        if isinstance(source, bytes):
            self._tensors = from_safetensors(source)
            self.names = tuple(self._tensors)
        else:
            with safe_open(source, framework="pt") as file:
                self.names = tuple(file.keys())
        if sums and set(self._sums) != set(self.names):
            raise ValueError(f"its tensors are not those that were written: {OF_TENSORS} names others")

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name (KeyError: there is none)."""
        return self.tensors((name,))[name]

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of those names; by default all."""
        names = self.names if names is None else tuple(names)
        for name in names:
            if name not in self.names:
                raise KeyError(name)
        if isinstance(self._source, bytes):
            tensors = {name: self._tensors[name] for name in names}
        else:
            with safe_open(self._source, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        for name, tensor in tensors.items():
            if name in self._sums and _of_tensor(tensor) != self._sums[name]:
                raise ValueError(f"the values of {name!r} are not those that were written: their SHA-256 differs")
        return tensors


def file_words(source: bytes | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file or its bytes: an 8-byte little-endian length, then JSON."""
    if isinstance(source, bytes):
        header = source[8 : 8 + _length(source[:8])]
    else:
        if source.is_dir():
            raise ValueError("it is a folder")
        with open(source, "rb") as file:
            header = file.read(_length(file.read(8)))
    data = read_json(header)
    words = data.get("__metadata__") if isinstance(data, dict) else None
    if not isinstance(words, dict | None) or not all(isinstance(word, str) for word in (words or {}).values()):
        raise ValueError("its header is no object of texts")
    return dict(words or {})


def _length(first: bytes) -> int:
    if len(first) < 8 or (length := int.from_bytes(first, "little")) > MAX_HEADER:
        raise ValueError("it does not begin with the length of a header")
    return length


def _of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_words(words: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(words), sort_keys=True).encode()).hexdigest()
