"""Algebra of steering vectors: lengths, angles, sums, and vectors of few coordinates.

Everything is per layer, in fp64, and gives a new vector that keeps hook point and model and says in its provenance what
was done; vectors of different models, hook points or layers are not mixed in silence.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from faststeer import tensor_files
from faststeer.files import reading, write_atomically
from faststeer.intervention import orthonormal
from faststeer.ops import sparse_add_
from faststeer.vector import (
    LAYER_CONVENTION,
    HookPoint,
    SteeringVector,
    check_direction,
    check_words,
    layer_of_tensor,
)

SPARSE_FORMAT = "faststeer.sparse_vector/1"
MAX_ELEMENTS = 2**25  # of a sparse file's dense form, which a small file may claim: 1,000 layers of 32,768 columns
Rule = Literal["magnitude", "effect", "paper", "code", "random"]
RULES: tuple[Rule, ...] = ("magnitude", "effect", "paper", "code", "random")
Effect = SteeringVector | Mapping[int, Tensor] | Tensor


# Lengths and sums -----------------------------------------------------------------------------------------------------


def normalise(vector: SteeringVector, norm: float = 1.0) -> SteeringVector:
    """norm * v / |v| at every layer; scale "unit" where norm is 1.

    Raises:
        ValueError: a norm that is not positive and finite.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"norm={norm!r}: expected a positive number")
    directions = {layer: norm * d / d.norm() for layer, d in _wide(vector).items()}
    return _made(vector, directions, {"normalise": norm}, scale="unit" if norm == 1 else "raw")


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Control: random directions, uniform on the sphere, with the norms, layers and hook point of `vector`.

    What this control achieves as well is the work of the perturbation's size alone. A layer's direction depends on
    `seed` and the layer, not on which other layers there are.

    Raises:
        ValueError: a negative seed.
    """
    directions = {}
    for layer in vector.layers:
        draw = torch.from_numpy(np.random.default_rng([seed, layer]).standard_normal(vector.hidden_size))
        length = vector[layer].detach().double().norm().cpu()
        directions[layer] = (draw / draw.norm() * length).to(vector[layer])
    provenance = {"seed": seed, "like": vector.method}
    return SteeringVector(
        directions, at=vector.at, model=vector.model, method="random", scale=vector.scale, provenance=provenance
    )


def orthogonalise(
    vector: SteeringVector, against: SteeringVector | Tensor | Sequence[SteeringVector]
) -> SteeringVector:
    """v - sum_k (v . q_k) q_k at every layer, q an orthonormal basis of what `against` spans there.

    Args:
        against: one vector, several, or a tensor `[hidden]` or `[k, hidden]` for every layer.

    Raises:
        ValueError: different hook points or hidden sizes, a layer that `against` lacks, dependent directions, or
            nothing left of v (to 1e-6 of its length).
    """
    others = [against] if isinstance(against, (SteeringVector, Tensor)) else list(against)
    if not others:
        raise ValueError("orthogonalise against nothing: give at least one direction")
    for other in others:
        if isinstance(other, SteeringVector):
            _same_place([vector, other])
        elif other.shape[-1] != vector.hidden_size:
            raise ValueError(f"`against` has hidden size {other.shape[-1]}, the vector {vector.hidden_size}")
    directions = {}
    for layer, direction in _wide(vector).items():
        span = torch.cat([torch.atleast_2d(o[layer] if isinstance(o, SteeringVector) else o).double() for o in others])
        basis = orthonormal(span, f"what the vector is made orthogonal to at layer {layer}")
        left = direction - (direction @ basis.T) @ basis
        left = left - (left @ basis.T) @ basis  # twice is enough, once is not where little is left
        if left.norm() <= 1e-6 * direction.norm():
            raise ValueError(f"layer {layer}: the vector lies in what it is made orthogonal to: nothing is left")
        directions[layer] = left
    return _made(vector, directions, {"orthogonalise": [_name(other) for other in others]}, scale="raw")


def combine(vectors: Sequence[SteeringVector], coefficients: Sequence[float]) -> SteeringVector:
    """sum_i c_i v_i at every layer.

    Raises:
        ValueError: no vectors, another number of coefficients, different models, hook points, layers or hidden sizes,
            or a sum that is zero.
    """
    if not vectors or len(vectors) != len(coefficients):
        raise ValueError(f"{len(vectors)} vectors and {len(coefficients)} coefficients: expected as many, at least one")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"coefficients {list(coefficients)}: expected finite numbers")
    _same_place(vectors, layers=True)
    wide = [_wide(vector) for vector in vectors]
    directions = {
        layer: torch.stack([c * each[layer] for c, each in zip(coefficients, wide, strict=True)]).sum(0)
        for layer in vectors[0].layers
    }
    done = {"combine": [[float(c), _name(v)] for c, v in zip(coefficients, vectors, strict=True)]}
    return _made(vectors[0], directions, done, scale="raw", method="combination")


def interpolate(
    a: SteeringVector, b: SteeringVector, t: float, path: Literal["line", "arc"] = "line"
) -> SteeringVector:
    """From a (t = 0) to b (t = 1).

    "line": (1 - t) a + t b. "arc": the direction turns at constant speed on the great circle from a to b (spherical
    interpolation), the length goes from |a| to |b| on a line.

    Raises:
        ValueError: different models, hook points or layers; for "arc", directions that are opposite (to 1e-6 radians):
            every great circle joins them.
    """
    if path not in ("line", "arc"):
        raise ValueError(f"unknown path {path!r}: expected 'line' or 'arc'")
    if path == "line":
        made = combine([a, b], [1 - t, t])
    else:
        _same_place([a, b], layers=True)
        directions = {layer: _on_arc(x, _wide(b)[layer], t, layer) for layer, x in _wide(a).items()}
        made = _made(a, directions, {}, scale="raw")
    return _made(made, _wide(made), {"interpolate": [_name(a), _name(b), t, path]}, scale="raw", method="combination")


def _on_arc(a: Tensor, b: Tensor, t: float, layer: int) -> Tensor:
    x, y = a / a.norm(), b / b.norm()
    # Exact for small and for large angles, unlike the arc cosine of the dot product.
    angle = 2 * torch.atan2((x - y).norm(), (x + y).norm())
    if angle > math.pi - 1e-6:
        raise ValueError(f"layer {layer}: the directions are opposite, so that no arc between them is the shortest")
    length = (1 - t) * a.norm() + t * b.norm()
    if angle < 1e-9:
        return length * x
    return length * (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


# Angles ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosines:
    """Cosines between vectors: `values[i, j, k]` is that of `names[j]` and `names[k]` at `layers[i]`, fp64."""

    names: tuple[str, ...]
    layers: tuple[int, ...]
    values: Tensor

    def at(self, layer: int) -> dict[str, dict[str, float]]:
        """One layer's table, `{name: {name: cosine}}`."""
        rows = self.values[self.layers.index(layer)].tolist()
        return {name: dict(zip(self.names, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}

    def to_dict(self) -> dict[int, dict[str, dict[str, float]]]:
        return {layer: self.at(layer) for layer in self.layers}


def cosines(vectors: Mapping[str, SteeringVector]) -> Cosines:
    """The cosine of every pair of vectors at every layer that all of them have.

    Raises:
        ValueError: no vectors, different models, hook points or hidden sizes, or no layer in common.
    """
    if not vectors:
        raise ValueError("no vectors to compare")
    listed = list(vectors.values())
    _same_place(listed)
    layers = sorted(set.intersection(*(set(vector.layers) for vector in listed)))
    if not layers:
        raise ValueError("the vectors have no layer in common")
    units = torch.stack([torch.stack([d / d.norm() for d in map(_wide(v).__getitem__, layers)]) for v in listed], dim=1)
    return Cosines(tuple(vectors), tuple(layers), (units @ units.transpose(1, 2)).clamp(-1, 1))


# Few coordinates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SparseVector:
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
        SteeringVector(dict.fromkeys(self.indices, torch.ones(1)), **self._words())  # checks layers and words

    def _words(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("at", "model", "method", "scale", "provenance", "op")}

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
        return SteeringVector(directions, **self._words())

    def to(self, device: torch.device | str) -> SparseVector:
        """The same on another device."""
        moved = [{layer: t.to(device) for layer, t in each.items()} for each in (self.indices, self.values)]
        return SparseVector(moved[0], moved[1], self.hidden_size, **self._words())

    def add_(self, x: Tensor, coefficient: float | Tensor = 1.0, layer: int | None = None) -> Tensor:
        """Add coefficient * v to the rows of x in place, touching v's columns only (`ops.sparse_add_`); returns x.

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
        n = rows.shape[0]
        each = torch.as_tensor(coefficient, dtype=torch.float32, device=x.device).reshape(-1).expand(n).contiguous()
        indices, values = self.indices[layer].to(x.device), self.values[layer].to(x.device)
        offsets = torch.tensor([0, len(indices)], dtype=torch.int32, device=x.device)
        chosen = torch.zeros(n, dtype=torch.int32, device=x.device).masked_fill_(each == 0, -1)
        sparse_add_(rows, indices, values, offsets, chosen, each)
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

    def to_bytes(self) -> bytes:
        """As a safetensors file in memory: `layers.<n>.indices` int32 and `layers.<n>.values` fp32."""
        words = self._words() | {"provenance": json.dumps(dict(self.provenance), sort_keys=True)}
        metadata = {
            "format": SPARSE_FORMAT,
            "layer_convention": LAYER_CONVENTION,
            "hidden_size": str(self.hidden_size),
            **{name: value for name, value in words.items() if value is not None},
        }
        tensors = {f"layers.{n}.indices": self.indices[n].cpu().contiguous().clone() for n in self.layers}
        tensors |= {f"layers.{n}.values": self.values[n].cpu().float().contiguous().clone() for n in self.layers}
        return tensor_files.to_bytes(tensors, metadata)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it atomically; `SteeringVector.load` reads it too, as a dense vector."""
        write_atomically(path, self.to_bytes())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseVector:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FormatError: damaged, or no sparse vector.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no steering vector at {path}: no such file")
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "the data") -> SparseVector:
        """Read what `to_bytes` made; `what` names it in errors (FormatError)."""
        with reading(f"{what} is not a valid sparse vector", "copy or extract it again"):
            file = tensor_files.TensorFile(data)
            tensors, metadata = file.tensors(), file.words
            if metadata.get("format") != SPARSE_FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {SPARSE_FORMAT!r}")
            hidden_size = int(metadata.get("hidden_size", ""))
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
            provenance = check_words(metadata)
            names = ("at", "scale", "model", "method", "op")
            words: dict[str, Any] = {name: metadata[name] for name in names if name in metadata}
            if "at" not in words:
                raise ValueError("it does not say at which hook point")
            return cls(parts["indices"], parts["values"], hidden_size, provenance=provenance, **words)


def is_sparse_file(data: bytes) -> bool:
    """Whether safetensors bytes say that they hold a sparse vector."""
    try:
        return tensor_files.file_words(data).get("format") == SPARSE_FORMAT
    except ValueError:
        return False


def sparsify(
    vector: SteeringVector,
    by: Rule = "magnitude",
    *,
    keep: float | None = None,
    threshold: float | None = None,
    effect: Effect | None = None,
    rescale: bool = False,
    seed: int = 0,
) -> SparseVector:
    """Keep few coordinates of a vector. Per layer, with s the direction and e its effect:

    | by | a coordinate's score | |
    |---|---|---|
    | "magnitude" | abs(s_i) | |
    | "effect" | abs(e_i) | |
    | "paper" | e_i / s_i | the paper's rule (r_i >= tau) |
    | "code" | (abs(e_i) / norm(e)) / (abs(s_i) / norm(s)) | its code's rule; the code rescales too |
    | "random" | random | the control: as many coordinates, at random |

    Coordinates where s_i = 0 are never kept.

    Args:
        keep: the share of the coordinates to keep, the best ones: ceil(keep * hidden). Or
        threshold: tau, keep where the score is >= it (not for "random").
        effect: `[hidden]` per layer: the indirect effect of each coordinate of the steering node on a metric,
            e_i = s_i times the mean gradient of the metric with respect to coordinate i along the path from the
            unsteered to the steered run (integrated gradients). For "effect", "paper" and "code".
        rescale: afterwards to the length that v has.
        seed: for "random".

    Raises:
        ValueError: neither or both of keep and threshold, effect missing or not needed, of other layers or sizes or not
            finite, nothing kept.

    Source: arXiv 2604.08524; its text and its code differ as the table shows.
    """
    _check_sparsify(by, keep, threshold, effect)
    indices, values = {}, {}
    for layer, s in _wide(vector).items():
        e = None if effect is None else _effect_at(effect, vector, layer)
        score = _score(by, s, e, seed, layer)
        score[s == 0] = -math.inf
        if threshold is None:
            columns = score.topk(math.ceil((keep or 0) * len(s))).indices
            columns = columns[score[columns] > -math.inf].sort().values
        else:
            columns = (score >= threshold).nonzero().squeeze(1)
        if not len(columns):
            raise ValueError(f"layer {layer}: no coordinate scores {threshold} or more; the best: {score.max():.4g}")
        kept = s[columns] * (s.norm() / s[columns].norm() if rescale else 1.0)
        indices[layer], values[layer] = columns.to(torch.int32), kept.to(torch.float32)
    chosen = {"by": by, "keep": keep, "threshold": threshold, "rescale": rescale}
    chosen |= {"seed": seed} if by == "random" else {}
    like = _made(vector, vector.directions, {"sparsify": chosen}, scale=vector.scale if rescale else "raw")
    words = {name: getattr(like, name) for name in ("at", "model", "method", "scale", "provenance", "op")}
    return SparseVector(indices, values, vector.hidden_size, **words)


def _check_sparsify(by: str, keep: float | None, threshold: float | None, effect: Effect | None) -> None:
    if by not in RULES:
        raise ValueError(f"unknown rule by={by!r}: expected one of {', '.join(RULES)}")
    if (keep is None) == (threshold is None):
        raise ValueError("say keep= (a share of the coordinates) or threshold=, one of them")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r}: expected a share, above 0 and at most 1")
    if threshold is not None and (by == "random" or not math.isfinite(threshold)):
        raise ValueError(
            f"threshold={threshold!r}: expected a finite number, and a rule with scores (random has keep=)"
        )
    if (effect is not None) != (by in ("effect", "paper", "code")):
        raise ValueError(f"by={by!r} {'needs effect=' if effect is None else 'uses no effect: leave it out'}")


def _effect_at(effect: Effect, vector: SteeringVector, layer: int) -> Tensor:
    if isinstance(effect, Tensor):
        if len(vector.layers) > 1:
            raise ValueError(f"one effect for {len(vector.layers)} layers: give {{layer: [hidden]}}")
        found = effect
    elif layer in effect:
        found = effect[layer]
    else:
        raise ValueError(f"the effect says nothing of layer {layer}")
    checked = check_direction(found, f"the effect at layer {layer}").detach().double().cpu()
    if checked.shape[0] != vector.hidden_size:
        raise ValueError(
            f"the effect at layer {layer} has {checked.shape[0]} coordinates, the vector {vector.hidden_size}"
        )
    return checked


def _score(by: Rule, s: Tensor, e: Tensor | None, seed: int, layer: int) -> Tensor:
    if by == "magnitude":
        return s.abs()
    if by == "random":
        return torch.from_numpy(np.random.default_rng([seed, layer]).random(len(s)))
    assert e is not None
    if by == "effect":
        return e.abs()
    safe = torch.where(s == 0, 1.0, s)
    return e / safe if by == "paper" else (e.abs() / e.norm().clamp_min(1e-300)) / (safe.abs() / s.norm())


# What all share -------------------------------------------------------------------------------------------------------


def _wide(vector: SteeringVector) -> dict[int, Tensor]:
    return {layer: d.detach().to("cpu", torch.float64) for layer, d in vector.directions.items()}


def _made(
    like: SteeringVector,
    directions: Mapping[int, Tensor],
    done: Mapping[str, Any],
    *,
    scale: Literal["raw", "unit"],
    method: str | None = None,
) -> SteeringVector:
    """A vector in `like`'s place, fp32, whose provenance says what was done last."""
    steps = [*like.provenance.get("algebra", []), dict(done)] if done else like.provenance.get("algebra", [])
    provenance = {**like.provenance, **({"algebra": steps} if steps else {})}
    return SteeringVector(
        {layer: d.to(torch.float32) for layer, d in directions.items()},
        at=like.at,
        model=like.model,
        method=method or like.method,
        scale=scale,
        provenance=provenance,
        op=like.op,
    )


def _name(vector: SteeringVector | Tensor) -> str:
    return (vector.method or "vector") if isinstance(vector, SteeringVector) else f"tensor {list(vector.shape)}"


def _same_place(vectors: Sequence[SteeringVector], *, layers: bool = False) -> None:
    """Refuse vectors of different models, hook points, hidden sizes or (where asked) layers."""
    for name, values in (
        ("hook points", {vector.at for vector in vectors}),
        ("hidden sizes", {vector.hidden_size for vector in vectors}),
        ("models", {vector.model for vector in vectors if vector.model is not None}),
        ("layers", {vector.layers for vector in vectors} if layers else set()),
    ):
        if len(values) > 1:
            raise ValueError(f"the vectors have different {name}: {', '.join(map(str, sorted(values, key=str)))}")
