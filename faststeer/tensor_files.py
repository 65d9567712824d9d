"""safetensors files with checksums: what all files of tensors that faststeer writes have in common.

Beside its own words, the header of such a file holds

- `sha256.tensors`: JSON, the SHA-256 of each tensor (its dtype and shape as text, then its bytes) by name;
- `sha256`: that of all other words of the header, `sha256.tensors` among them.

So a tensor can be checked when it is read, without reading the others. A file without them is read unchecked.

A class whose values are kept as one such file is a `TensorRecord`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from faststeer.file_kinds import expect
from faststeer.files import read_json, reading, write_atomically

R = TypeVar("R", bound="TensorRecord")
OF_WORDS, OF_TENSORS = "sha256", "sha256.tensors"
MAX_HEADER = 100_000_000  # bytes; safetensors reads no larger one
TEXTS = ("str", "str | None", "HookPoint")  # types of fields whose words are the texts themselves, not JSON


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

    def exactly(self, *names: str) -> dict[str, Tensor]:
        """All tensors, if these are their names, else ValueError."""
        if set(self.names) != set(names):
            raise ValueError(f"it holds {', '.join(sorted(self.names))}, expected {', '.join(names)}")
        return self.tensors(names)

    def json(self, word: str) -> Any:
        """What a word of the header says in JSON (KeyError: there is none)."""
        return read_json(self.words[word])

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


@contextmanager
def opened(source: bytes | Path, format: str, fault: str, mend: str) -> Iterator[TensorFile]:
    """A file of `format`, or its bytes. Whatever is wrong with it, also inside the block, is a FormatError
    "<fault> (<reason>): <mend>"."""
    with reading(fault, mend):
        file = TensorFile(source)
        if (format_here := file.words.get("format")) != format:
            raise ValueError(f"its format is {format_here!r}, expected {format!r}")
        yield file


class TensorRecord:
    """A value that is kept as one file of tensors. A class says its `FORMAT`, what such a file holds (`HOLDS`, for
    errors), how to get another (`MEND`), and turns itself into tensors and words and back.

    Words that are None are left out; those that are no texts are written as JSON.
    """

    FORMAT: ClassVar[str]
    HOLDS: ClassVar[str]
    MEND: ClassVar[str]

    def _content(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and words; of a dataclass, all its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return tensors, {name: value for name, value in values.items() if name not in tensors}

    @classmethod
    def _read(cls: type[R], file: TensorFile) -> R:
        """May raise whatever `files.UNREADABLE` names."""
        kinds = {field.name: str(field.type) for field in fields(cls)}  # type: ignore[arg-type]
        tensors = file.exactly(*(name for name, kind in kinds.items() if kind == "Tensor"))
        words = {name: kind for name, kind in kinds.items() if name in file.words and name not in tensors}
        return cls(**tensors, **{n: file.words[n] if kind in TEXTS else file.json(n) for n, kind in words.items()})

    def to_bytes(self) -> bytes:
        """The file in memory; equal content is equal bytes."""
        tensors, words = self._content()
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items() if v is not None}
        return to_bytes({name: t.contiguous() for name, t in tensors.items()}, {"format": self.FORMAT} | texts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to `path` as safetensors, atomically. Raises OSError where that fails."""
        write_atomically(path, self.to_bytes())
        return Path(path)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FormatError (a ValueError): the file is truncated, damaged, or holds something else.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no {cls.HOLDS} at {path}: no such file")
        return cls._open(path, str(path))

    @classmethod
    def from_bytes(cls: type[R], data: bytes, what: str = "the data") -> R:
        """Read what `to_bytes` made; `what` names it in errors (FormatError)."""
        return cls._open(data, what)

    @classmethod
    def _open(cls: type[R], source: bytes | Path, what: str) -> R:
        with opened(source, cls.FORMAT, f"{what} holds no {cls.HOLDS}", cls.MEND) as file:
            return cls._read(file)


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
