"""What long work keeps on disk: parts that are known by a digest of everything they depend on, the model's weights
included. A part whose digest is there is read, any other is made; parts of another model or setting are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from faststeer.files import read_json, write_atomically

T = TypeVar("T")
SAMPLED = 64  # numbers of each weight that are in a fingerprint one by one
# What adapters (peft's layers) hold beside their weights: it decides which of them act, and how strongly.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


class Kept(Protocol):
    """What a store keeps as a file: a SteeringVector, `tensor_files.TensorRecord`s."""

    def save(self, path: str | os.PathLike[str]) -> Any: ...

    @classmethod
    def load(cls, path: Path) -> Any: ...


K = TypeVar("K", bound=Kept)


def fingerprint(model: nn.Module) -> str:
    """A digest of a model: its configuration, and of every entry of its state (parameters, buffers, quantised weights,
    adapters) the name, shape, dtype, SAMPLED numbers spread evenly over it, and the sum of its bytes, taken as 64-bit
    numbers modulo 2^64; of adapters also which are active, disabled or merged, and their scaling.

    So training, quantising, folding, an adapter or a single changed number make it another one. It cannot see numbers
    of a weight that only change places, none of them being sampled; functions that were replaced; and buffers that
    are not saved (`persistent=False`). The weights are read once.

    Raises:
        ValueError: weights without values (on the meta device), whose model could not be told from another.
    """
    config = getattr(model, "config", None)
    hashed = hashlib.sha256(b"" if config is None else config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        hashed.update(f"{name}\n".encode())
        for piece in _pieces(name, value):
            hashed.update(piece)
    for name, module in model.named_modules():
        state = {key: getattr(module, key) for key in ADAPTER_STATE if hasattr(module, key)}
        if "active_adapters" in state:  # no other module's `scaling` matters: its configuration has that
            hashed.update(f"{name} {state!r}\n".encode())
    return hashed.hexdigest()


def _pieces(name: str, value: Any) -> Iterator[bytes]:
    """What of one entry of a state is hashed."""
    if isinstance(value, tuple | list):  # what PyTorch's quantised modules save
        for number, part in enumerate(value):
            yield from _pieces(f"{name}.{number}", part)
        return
    if not isinstance(value, Tensor):  # the state of a module that saves something else
        yield pickle.dumps(value)
        return
    value = value.detach()
    yield f"{tuple(value.shape)} {value.dtype}\n".encode()
    if value.is_meta:
        raise ValueError(
            f"the weight {name} has no values here (meta device), so that nothing kept could be told from another "
            "model's: load the model whole, without offloading"
        )
    if hasattr(value, "__tensor_flatten__"):  # quantised and distributed weights are made of several tensors
        inner, rest = value.__tensor_flatten__()
        yield repr(rest).encode()
        for part in inner:
            yield from _pieces(f"{name}.{part}", getattr(value, part))
    elif value.is_quantized:
        yield repr(value.qscheme()).encode() + repr(value.dequantize().sum().item()).encode()
        yield from _pieces(name, value.int_repr())
    elif value.numel():
        raw = value.contiguous().reshape(-1)
        places = torch.linspace(0, len(raw) - 1, min(SAMPLED, len(raw)), dtype=torch.float64).long()
        size, raw = raw.element_size(), raw.view(torch.uint8)
        columns = places[:, None] * size + torch.arange(size)
        yield raw[columns.flatten().to(raw.device)].cpu().numpy().tobytes()
        whole = len(raw) // 8 * 8
        if raw.storage_offset() % 8:
            raw = raw.clone()
        yield str(int(raw[:whole].view(torch.int64).sum())).encode() + raw[whole:].cpu().numpy().tobytes()


def digest(*values: Any) -> str:
    """A SHA-256 of numbers, texts, lists, mappings, tensors and what has `to_bytes` (vectors, records, sparse vectors).

    Raises:
        TypeError: something else.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous()
        raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(values.dtype), list(values.shape), hashlib.sha256(raw).hexdigest()]
    if hasattr(value, "to_bytes"):
        return hashlib.sha256(value.to_bytes()).hexdigest()
    raise TypeError(f"{type(value).__name__} has no digest")


class ArtefactStore:
    """Parts in `folder`, a file each: `<name>-<digest>.<suffix>`, written atomically, so that what was interrupted or
    killed goes on with the parts there are.

    Args:
        folder: made when the first part is.
        base: what all parts depend on (`digest`).

    Attributes:
        key: the digest of `base`.
        made: names of the parts that were not there yet.
    """

    def __init__(self, folder: str | os.PathLike[str], *base: Any) -> None:
        self.folder, self.made = Path(folder), cast(list[str], [])
        self.key = digest(*base)

    def path(self, name: str, depends: Any, suffix: str) -> Path:
        """Where a part is kept, or work of its own keeps its state (a training its checkpoint)."""
        return self.folder / f"{name}-{digest(self.key, name, depends)[:20]}{suffix}"

    def json(self, name: str, depends: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, as JSON gives it back: read where it is there, else made and written."""
        path = self.path(name, depends, ".json")
        return self._part(
            name,
            path,
            lambda: read_json(path.read_text(encoding="utf-8")),
            lambda: write_atomically(path, json.dumps(make())),
        )

    def record(self, kind: type[K], name: str, depends: Any, make: Callable[[], K]) -> K:
        """The same for what is saved as a file of tensors: a SteeringVector, patching's Scores."""
        path = self.path(name, depends, ".safetensors")
        return self._part(name, path, lambda: kind.load(path), lambda: make().save(path))

    def _part(self, name: str, path: Path, read: Callable[[], T], write: Callable[[], object]) -> T:
        if path.is_file():
            try:
                return read()
            except ValueError:
                pass  # damaged since it was written: made again
        write()
        self.made.append(name)
        return read()
