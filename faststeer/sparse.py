"""Steering vectors of few coordinates, and their files, which `SteeringVector.load` reads, too, as dense vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from faststeer.tensor_files import TensorFile, TensorRecord, file_words
from faststeer.vector import (
    HookPoint,
    SteeringVector,
    check_direction,
    check_words,
    header_of,
    layer_of_tensor,
    words_of,
)

FORMAT = "faststeer.sparse_vector/1"
MAX_ELEMENTS = 2**25  # of a sparse file's dense form, which a small file may claim: 1,000 layers of 32,768 columns


@dataclass(frozen=True, eq=False)
class SparseVector(TensorRecord):
    """A steering vector of few coordinates: at each layer the columns that are not zero and their values.

    Adding it touches those columns only. In fused layers nothing is gained over `Add(sparse.dense())`, whose vector is
    read once for all rows; outside of them (a hook of one's own, rows with different vectors) `add_` is.

    Args:
        indices: `{layer: [n]}` int32, ascending.
        values: `{layer: [n]}` fp32.
        hidden_size: columns of the residual stream.
        at, model, method, scale, provenance, op: as of a SteeringVector.

    Raises:
        ValueError: different layers or lengths, columns out of range, unsorted or named twice, no column at all, and
            what a SteeringVector refuses.
    """

    FORMAT: ClassVar[str] = FORMAT
    HOLDS: ClassVar[str] = "sparse vector"
    MEND: ClassVar[str] = "copy or extract it again"

    indices: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    hidden_size: int
    at: HookPoint = "resid_post"
    model: str | None = None
    method: str | None = None
    scale: Literal["raw", "unit"] = "raw"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    op: Literal["add", "ablate", "project", "clamp", "rotate"] | None = None

    def __post_init__(self) -> None:
        if not self.indices or set(self.indices) != set(self.values):
            raise ValueError("a sparse vector needs indices and values for the same layers, at least one")
        for layer, columns in self.indices.items():
            values = check_direction(self.values[layer], f"the values of layer {layer}")
            if columns.dtype != torch.int32 or columns.shape != values.shape:
                raise ValueError(f"layer {layer}: expected int32 indices, as many as values")
            inside = int(columns[0]) >= 0 and int(columns[-1]) < self.hidden_size
            if not inside or not bool((columns.diff() > 0).all()):
                raise ValueError(f"layer {layer}: indices must ascend within 0..{self.hidden_size - 1}")
            if not bool(values.any()):
                raise ValueError(f"the values of layer {layer} are all zero")
        SteeringVector(dict.fromkeys(self.indices, torch.ones(1)), **words_of(self))  # checks layers and words

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.indices))

    @property
    def density(self) -> dict[int, float]:
        """The share of columns that are kept, per layer."""
        return {layer: len(self.indices[layer]) / self.hidden_size for layer in self.layers}

    def dense(self) -> SteeringVector:
        """The same vector with its zeros."""
        directions = {}
        for layer in self.layers:
            row = torch.zeros(self.hidden_size)
            row[self.indices[layer].long()] = self.values[layer].to("cpu", torch.float32)
            directions[layer] = row
        return SteeringVector(directions, **words_of(self))

    def to(self, device: torch.device | str) -> SparseVector:
        """The same on another device."""
        moved = [{layer: t.to(device) for layer, t in each.items()} for each in (self.indices, self.values)]
        return SparseVector(moved[0], moved[1], self.hidden_size, **words_of(self))

    def add_(self, x: Tensor, coefficient: float | Tensor = 1.0, layer: int | None = None) -> Tensor:
        """Add coefficient * v to the rows of x in place, touching v's columns only; returns x.

        Computed in fp32, the product rounded before the sum, rounded once.

        Args:
            x: `[..., hidden]`, contiguous rows; no gradient.
            coefficient: one, or `[rows]`; rows with 0 keep their bits.
            layer: whose direction; may be left out where there is one.

        Raises:
            ValueError, TypeError: another hidden size, a layer that is not there, x that cannot be written in place.
        """
        layer = self._layer(layer)
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has hidden size {x.shape[-1]}, the vector {self.hidden_size}")
        rows = x.view(-1, x.shape[-1])
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("SparseVector.add_ has no gradient: use dense() with Add, or torch.no_grad()")
        each = torch.as_tensor(coefficient, dtype=torch.float32, device=x.device).reshape(-1, 1)
        indices, values = self.indices[layer].to(x.device).long(), self.values[layer].to(x.device)
        before = rows[:, indices]
        rows[:, indices] = torch.where(each == 0, before, (before.float() + each * values).to(x.dtype))
        return x

    def hook(self, coefficient: float = 1.0, layer: int | None = None) -> Callable[..., Any]:
        """A forward hook that adds the vector to a module's output, for inference:
        `model.model.layers[14].register_forward_hook(sparse.hook(2.0, layer=14))`."""
        chosen = self._layer(layer)

        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return self.add_(output.clone(memory_format=torch.contiguous_format), coefficient, chosen)
            first = self.add_(output[0].clone(memory_format=torch.contiguous_format), coefficient, chosen)
            return (first, *output[1:])

        return add

    def _layer(self, layer: int | None) -> int:
        if layer is None and len(self.indices) == 1:
            return next(iter(self.indices))
        if layer is None or layer not in self.indices:
            raise ValueError(f"layer={layer}: the vector has layers {', '.join(map(str, self.layers))}; say which")
        return layer

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`layers.<n>.indices` int32 and `layers.<n>.values` fp32."""
        tensors = {f"layers.{n}.indices": self.indices[n].cpu().contiguous().clone() for n in self.layers}
        tensors |= {f"layers.{n}.values": self.values[n].cpu().float().contiguous().clone() for n in self.layers}
        return tensors, header_of(self, FORMAT) | {"hidden_size": self.hidden_size}

    @classmethod
    def _read(cls, file: TensorFile) -> SparseVector:
        tensors, hidden_size = file.tensors(), int(file.words.get("hidden_size", ""))
        if hidden_size < 1 or hidden_size * len(tensors) > MAX_ELEMENTS:
            raise ValueError(
                f"its hidden size is {hidden_size}, with {len(tensors)} tensors: expected at most {MAX_ELEMENTS:,} "
                "elements in all"
            )
        parts: dict[str, dict[int, Tensor]] = {"indices": {}, "values": {}}
        for name, tensor in tensors.items():
            stem, _, part = name.rpartition(".")
            if part not in parts:
                raise ValueError(f"it holds a tensor {name!r}")
            parts[part][layer_of_tensor(stem)] = tensor
        return cls(parts["indices"], parts["values"], hidden_size, **check_words(file.words))


def is_sparse_file(data: bytes) -> bool:
    """Whether safetensors bytes say that they hold a sparse vector."""
    try:
        return file_words(data).get("format") == FORMAT
    except ValueError:
        return False
