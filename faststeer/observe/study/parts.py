"""What a study has finished, in a folder: every part in a file of its own, named by a digest of all it depends on. A
part whose digest is there is read, any other is made; nothing is ever mixed with parts of another model or setting."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from faststeer.files import read_json, write_atomically
from faststeer.observe.patching import Scores
from faststeer.vector import SteeringVector

T = TypeVar("T")


def digest(*things: Any) -> str:
    """A digest of numbers, texts, lists, mappings, tensors and vectors."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        values = thing.detach().cpu().contiguous()
        return [str(values.dtype), list(values.shape), hashlib.sha256(values.numpy().tobytes()).hexdigest()]
    if isinstance(thing, SteeringVector):
        return [thing.at, {str(layer): thing[layer].float() for layer in thing.layers}]
    if isinstance(thing, Scores):
        return [thing.edges, thing.nodes, thing.dimensions, thing.n_positions]
    raise TypeError(f"{type(thing).__name__} has no digest")


class Parts:
    """The parts of a study in `folder`; `base` is what all of them depend on."""

    def __init__(self, folder: str | os.PathLike[str], base: Any) -> None:
        self.folder = Path(folder)
        self._base = digest(base)
        self.made: list[str] = []  # names of the parts that were not there yet

    def path(self, name: str, depends: Any, suffix: str) -> Path:
        """Where a part is kept."""
        return self.folder / f"{name}-{digest(self._base, name, depends)[:20]}{suffix}"

    def json(self, name: str, depends: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, as JSON gives it back: read where it is there, else made and written."""
        path = self.path(name, depends, ".json")

        def write() -> None:
            write_atomically(path, json.dumps(make()))

        return self._part(name, path, lambda: read_json(path.read_text(encoding="utf-8")), write)

    def vector(self, name: str, depends: Any, make: Callable[[], SteeringVector]) -> SteeringVector:
        """The same for a vector."""
        path = self.path(name, depends, ".safetensors")
        return self._part(name, path, lambda: SteeringVector.load(path), lambda: make().save(path))

    def scores(self, name: str, depends: Any, make: Callable[[], Scores]) -> Scores:
        """The same for patching scores."""
        path = self.path(name, depends, ".safetensors")
        return self._part(name, path, lambda: Scores.load(path), lambda: make().save(path))

    def _part(self, name: str, path: Path, read: Callable[[], T], write: Callable[[], object]) -> T:
        if path.is_file():
            try:
                return read()
            except ValueError:
                pass  # damaged since it was written: made again
        write()
        self.made.append(name)
        return read()
