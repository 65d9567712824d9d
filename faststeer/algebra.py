"""Algebra of steering vectors: lengths, angles, sums, and vectors of few coordinates.

Everything is per layer, in fp64, and gives a new vector that keeps hook point and model and says in its provenance what
was done; vectors of different models, hook points or layers are not mixed in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import orthonormal
from faststeer.sparse import SparseVector
from faststeer.vector import SteeringVector, check_direction, layers_text, whole_number, words_of

Rule = Literal["magnitude", "effect", "paper", "code", "random"]
RULES: tuple[Rule, ...] = ("magnitude", "effect", "paper", "code", "random")
Effect = SteeringVector | Mapping[int, Tensor] | Tensor


# Lengths and sums -----------------------------------------------------------------------------------------------------


def normalise(vector: SteeringVector, norm: float = 1.0) -> SteeringVector:
    """norm * v / |v| at every layer; scale "unit" where norm is 1.

    Raises:
        ValueError: a norm that is not positive and finite.
    """
    norm = _number(norm, "norm")
    if norm <= 0:
        raise ValueError(f"norm={norm!r}: expected a positive number")
    directions = {layer: norm * d / d.norm() for layer, d in _wide(vector).items()}
    return _made(vector, directions, {"normalise": norm}, scale="unit" if norm == 1 else "raw")


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Control: random directions, uniform on the sphere, with the norms, layers and hook point of `vector`.

    What this control achieves as well is the work of the perturbation's size alone. A layer's direction depends on
    `seed` and the layer, not on which other layers there are.

    Raises:
        ValueError: a seed that is negative or no whole number.
    """
    directions, number = {}, whole_number(seed)
    if number is None or number < 0:
        raise ValueError(f"seed={seed!r}: expected a whole number from 0 on")
    seed = number
    for layer in vector.layers:
        draw = torch.from_numpy(np.random.default_rng([seed, layer]).standard_normal(vector.hidden_size))
        length = vector[layer].detach().double().norm().cpu()
        directions[layer] = (draw / draw.norm() * length).to(vector[layer])
    words = {"method": "random", "provenance": {"seed": seed, "like": vector.method}, "op": None}
    return SteeringVector(directions, **words_of(vector) | words)


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
        elif check_direction(other, "`against`", subspace=True).shape[-1] != vector.hidden_size:
            raise ValueError(f"`against` has hidden size {other.shape[-1]}, the vector {vector.hidden_size}")
    directions = {}
    for layer, direction in _wide(vector).items():
        span = torch.cat([torch.atleast_2d(o[layer] if isinstance(o, SteeringVector) else o).double() for o in others])
        basis = orthonormal(span, f"what the vector is made orthogonal to at layer {layer}")
        remainder = direction - (direction @ basis.T) @ basis
        remainder = remainder - (remainder @ basis.T) @ basis  # twice is enough, once is not where little is left
        if remainder.norm() <= 1e-6 * direction.norm():
            raise ValueError(f"layer {layer}: the vector lies in what it is made orthogonal to: nothing is left")
        directions[layer] = remainder
    return _made(vector, directions, {"orthogonalise": [_name(other) for other in others]}, scale="raw")


def combine(vectors: Sequence[SteeringVector], coefficients: Sequence[float]) -> SteeringVector:
    """sum_i c_i v_i at every layer.

    Raises:
        ValueError: no vectors, another number of coefficients, different models, hook points, layers or hidden sizes,
            or a sum that is zero.
    """
    vectors = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    coefficients = [_number(c, "a coefficient") for c in coefficients]
    if not vectors or len(vectors) != len(coefficients):
        raise ValueError(f"{len(vectors)} vectors and {len(coefficients)} coefficients: expected as many, at least one")
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
    t = _number(t, "t")
    if path == "line":
        combined = combine([a, b], [1 - t, t])
    else:
        _same_place([a, b], layers=True)
        directions = {layer: _on_arc(x, _wide(b)[layer], t, layer) for layer, x in _wide(a).items()}
        combined = _made(a, directions, {}, scale="raw")
    return _made(
        combined, _wide(combined), {"interpolate": [_name(a), _name(b), t, path]}, scale="raw", method="combination"
    )


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
        """One layer's table, `{name: {name: cosine}}`. ValueError for a layer that is not among `layers`."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not compared: all vectors have the layers {layers_text(self.layers)}")
        rows = self.values[self.layers.index(layer)].tolist()
        return {name: dict(zip(self.names, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}

    def to_dict(self) -> dict[int, dict[str, dict[str, float]]]:
        return {layer: self.at(layer) for layer in self.layers}


def cosines(vectors: Mapping[str, SteeringVector]) -> Cosines:
    """The cosine of every pair of vectors at every layer that all of them have.

    Raises:
        ValueError: no vectors, different models, hook points or hidden sizes, or no layer in common.
    """
    if not isinstance(vectors, Mapping) or not vectors:
        raise ValueError(f"no vectors to compare in a {type(vectors).__name__}: expected {{name: vector}}")
    listed = list(vectors.values())
    _same_place(listed)
    layers = sorted(set.intersection(*(set(vector.layers) for vector in listed)))
    if not layers:
        raise ValueError("the vectors have no layer in common")
    units = torch.stack([torch.stack([d / d.norm() for d in map(_wide(v).__getitem__, layers)]) for v in listed], dim=1)
    return Cosines(tuple(vectors), tuple(layers), (units @ units.transpose(1, 2)).clamp(-1, 1))


# Few coordinates ------------------------------------------------------------------------------------------------------


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
        kept_values = s[columns] * (s.norm() / s[columns].norm() if rescale else 1.0)
        indices[layer], values[layer] = columns.to(torch.int32), kept_values.to(torch.float32)
    chosen = {"by": by, "keep": keep, "threshold": threshold, "rescale": rescale}
    chosen |= {"seed": seed} if by == "random" else {}
    like = _made(vector, vector.directions, {"sparsify": chosen}, scale=vector.scale if rescale else "raw")
    return SparseVector(indices, values, vector.hidden_size, **words_of(like))


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
        values = effect
    elif layer in effect:
        values = effect[layer]
    else:
        raise ValueError(f"the effect says nothing of layer {layer}")
    checked = check_direction(values, f"the effect at layer {layer}").detach().double().cpu()
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
    words = words_of(like) | {"method": method or like.method, "scale": scale, "provenance": provenance}
    return SteeringVector({layer: d.to(torch.float32) for layer, d in directions.items()}, **words)


def _number(value: Any, what: str) -> float:
    """A finite number of Python, NumPy or a tensor, as provenance can hold it."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise ValueError(f"{what} is {value!r}: expected a finite number")
    return number


def _name(vector: SteeringVector | Tensor) -> str:
    return (vector.method or "vector") if isinstance(vector, SteeringVector) else f"tensor {list(vector.shape)}"


def _same_place(vectors: Sequence[SteeringVector], *, layers: bool = False) -> None:
    """Refuse what is no vector, and vectors of different models, hook points, hidden sizes or (where asked) layers."""
    for vector in vectors:
        if not isinstance(vector, SteeringVector):
            raise TypeError(f"a {type(vector).__name__} among the vectors: expected SteeringVectors")
    for name, values in (
        ("hook points", {vector.at for vector in vectors}),
        ("hidden sizes", {vector.hidden_size for vector in vectors}),
        ("models", {vector.model for vector in vectors if vector.model is not None}),
        ("layers", {vector.layers for vector in vectors} if layers else set()),
    ):
        if len(values) > 1:
            raise ValueError(f"the vectors have different {name}: {', '.join(map(str, sorted(values, key=str)))}")
