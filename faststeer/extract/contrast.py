"""The methods from contrast on one pass: difference in means, principal components, LAT, logistic probe, ACE.

`contrast` runs the model once over both sets; every method is then a formula on what was kept, for all layers and token
positions at once. Sums are fp64 and independent of the order of the prompts and of how they were batched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from faststeer.extract import linear
from faststeer.extract.activations import Activations
from faststeer.extract.dim import Candidates, check_cell, read_sets
from faststeer.extract.reading import SIDES
from faststeer.hf.batching import Prompt
from faststeer.intervention import Add, Clamp
from faststeer.plan import Plan
from faststeer.vector import HookPoint, SteeringVector, check_hook_point

Reference = Literal["negative", "mean"]


@dataclass(frozen=True, eq=False)
class Directions:
    """What a method found: a direction for each of several positions and all layers, or for some of them.

    Args:
        directions: `[positions, layers, hidden]` fp64; zero where there is none.
        positions: token positions counted from the prompt's end; None for a method that looks at no token.
        at: hook point.
        method, scale, model: as in SteeringVector.
        details: numbers that belong to each direction, `[positions, layers]`, which go into a vector's provenance.
        provenance: what belongs to all of them.

    Raises:
        ValueError: shapes that do not agree, NaN or infinity.
    """

    directions: Tensor
    positions: tuple[int | None, ...]
    at: HookPoint
    method: str
    scale: Literal["raw", "unit"]
    model: str | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_hook_point(self.at)
        shape = self.directions.shape
        if len(shape) != 3 or shape[0] != len(self.positions) or not self.directions.numel():
            raise ValueError(
                f"directions of shape {list(shape)} for {len(self.positions)} position(s): "
                "expected [positions, layers, hidden]"
            )
        if not bool(torch.isfinite(self.directions).all()):
            raise ValueError(f"the directions of {self.method} hold NaN or infinite values: extract them again")

    @property
    def n_layers(self) -> int:
        """How many layers the table of directions has."""
        return self.directions.shape[1]

    def exists(self) -> Tensor:
        """Return `[positions, layers]` bool: where there is a direction."""
        return self.directions.norm(dim=-1) > 0

    def vector(self, position: int | None, layer: int | None = None) -> SteeringVector:
        """Return the directions found at `position`: that of `layer`, or of every layer that has one, in fp32.

        Raises:
            ValueError: a position or layer there is not, no direction at that layer, or at none.
        """
        index, layers = check_cell(self.positions, self.n_layers, position, layer)
        exists = self.exists()[index]
        directions = {number: self.directions[index, number].float() for number in layers if exists[number]}
        if not directions:
            where = "any layer" if layer is None else f"layer {layer}"
            raise ValueError(f"{self.method} found no direction at {where}, position {position}")
        details = {name: {str(n): float(values[index, n]) for n in directions} for name, values in self.details.items()}
        provenance = {"position": position, **self.provenance, **details}
        return SteeringVector(
            directions, at=self.at, model=self.model, method=self.method, scale=self.scale, provenance=provenance
        )

    @classmethod
    def of_vector(cls, vector: SteeringVector, n_layers: int) -> Directions:
        """A SteeringVector's directions, as a table with one position: that in its provenance, or None."""
        if vector.layers[-1] >= n_layers:
            raise ValueError(f"the vector has a direction for layer {vector.layers[-1]}, the model {n_layers} layers")
        directions = torch.zeros(1, n_layers, vector.hidden_size, dtype=torch.float64, device="cpu")
        for layer in vector.layers:
            directions[0, layer] = vector[layer].detach().double().cpu()
        position = vector.provenance.get("position")
        rest = {name: value for name, value in vector.provenance.items() if name != "position"}
        return cls(
            directions, (position,), vector.at, vector.method or "unknown", vector.scale, vector.model, provenance=rest
        )

    def scaled_like(self, norms: Tensor) -> Directions:
        """The same directions with the lengths `norms` `[positions or 1, layers]`, as the paper compares methods (arXiv
        2604.08524); where a norm is 0 there is no direction."""
        own = self.directions.norm(dim=-1, keepdim=True)
        unit = torch.where(own > 0, self.directions / own.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        lengths = norms.to(torch.float64).expand(own.shape[:2]).unsqueeze(-1)
        return replace(self, directions=unit * lengths, scale="raw")


@dataclass(frozen=True, eq=False)
class Contrast:
    """One pass over two sets of prompts, ready for any method from contrast.

    Each method returns a table of directions over all positions and layers; `.vector(position)` makes a SteeringVector
    of it.

    Args:
        candidates: both means, which are also DIM.
        paired: whether positive[i] and negative[i] belong together.
        activations: every prompt's activations, if they were kept.
    """

    candidates: Candidates
    paired: bool
    activations: Activations | None = None

    def dim(self) -> Candidates:
        """Difference in means, raw (`faststeer.extract.dim`)."""
        return self.candidates

    def pca(self) -> Directions:
        """The first principal component of the pair differences, of unit length, pointing as the difference in means
        does.

        d_i = positive_i - negative_i. The component is the top eigenvector of the second moment E[d d^T] about ZERO.
        Centring the d_i first, as PCA of a library does, would take their mean away, which is the direction sought, and
        leave the top direction of what the pairs differ in otherwise. It is the same as an ordinary, centred PCA of the
        2n points that each pair makes about its own midpoint, +d_i / 2 and -d_i / 2, whose mean is zero.

        Sets that are no pairs have no d_i of their own: the expectation is then over all pairings of a positive with a
        negative prompt, Cov(positive) + Cov(negative) + delta delta^T with delta the difference in means, so that
        nothing depends on the order of the sets.

        `details["explained"]`: the eigenvalue's share of the trace. Source: representation engineering, arXiv
        2310.01405, whose reader it is with labelled pairs.

        Raises:
            ValueError: the activations were not kept.
        """
        return self._components("pca", self._pair_factor)

    def lat(self) -> Directions:
        """Linear artificial tomography: the first principal component of differences of prompts drawn without regard to
        their side, of unit length.

        The second moment of the difference of two prompts drawn from the union is twice the covariance of the union, so
        this is its top eigenvector, with no draw to depend on. Labels give the sign alone, that of the difference in
        means: where the sides are not what the prompts differ in most, this is another direction. Source: arXiv
        2310.01405.

        Raises:
            ValueError: the activations were not kept.
        """
        return self._components("lat", self._total_factor)

    def probe(self, c: float = 1.0) -> Directions:
        """The normal of a logistic regression of the side on the activation, of unit length, pointing to the positive.

        min over w, b of |w|^2 / 2 + c sum_i log(1 + exp(-y_i (w . x_i + b))), y = +1 positive, -1 negative, where x is
        the activation divided by the root mean square distance from the mean, so that `c` means the same at every
        layer. Solved to the optimum by Newton's method in fp64. `details["accuracy"]`: on the prompts it was fitted on.

        Keeps what the method needs: every prompt's activation, `prompts x positions x layers x hidden` numbers in the
        model's dtype.

        Raises:
            ValueError: the activations were not kept, or c is not positive.
        """
        activations = self._activations_for("a probe is fitted to the prompts themselves")
        if not c > 0:
            raise ValueError(f"c is {c}: expected a positive strength of the fit against the penalty")

        def fit(position: int, layer: int) -> tuple[Tensor, float]:
            sides = [activations.cell(side, position, layer) for side in SIDES]
            weight, accuracy = linear.logistic(sides[0], sides[1], c)
            return weight / weight.norm(), accuracy

        return self._each("probe", fit, "accuracy", {"c": c})

    def ace(self, reference: Reference = "negative") -> Directions:
        """Affine concept editing: the difference in means r with a reference point, the projection p on r / |r| that
        stands for "without the behaviour".

        `ace_plan(vector, a)` sets the projection to p + a |r|. `details["reference"]` is p:
        - "negative": of the negative mean (arXiv 2411.09003), so that a = 0 stands for negative and a = 1 for positive
          prompts;
        - "mean": of the mean of both means. a = 0 is then the orthogonal form of LEACE (arXiv 2306.03819) for classes
          of equal weight: both class means coincide there, so that no linear readout tells the classes apart better
          than a constant.

        Raises:
            ValueError: another reference.
        """
        if reference not in ("negative", "mean"):
            raise ValueError(f"unknown reference {reference!r}: expected 'negative' or 'mean'")
        means = self.candidates
        r = torch.where(means.exists().unsqueeze(-1), means.directions, 0.0)
        at = means.negative_mean if reference == "negative" else (means.positive_mean + means.negative_mean) / 2
        norm = r.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        details = {"reference": (at * r).sum(-1) / norm}
        return self._table("ace", "raw", r, details, {"reference_of": reference})

    # What the methods are made of

    def _table(
        self,
        method: str,
        scale: Literal["raw", "unit"],
        directions: Tensor,
        details: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> Directions:
        means = self.candidates
        provenance = {"n_positive": means.n_positive, "n_negative": means.n_negative, **provenance}
        return Directions(directions, means.positions, means.at, method, scale, means.model, details, provenance)

    @cached_property
    def _delta(self) -> Tensor:
        return self.candidates.directions

    def _activations_for(self, why: str) -> Activations:
        if self.activations is None:
            raise ValueError(f"{why}, and they were not kept: call contrast(..., keep=True)")
        return self.activations

    def _pair_factor(self, activations: Activations, position: int, layer: int) -> Tensor:
        positive, negative = (activations.cell(side, position, layer) for side in SIDES)
        if self.paired:
            return (positive - negative) / len(positive) ** 0.5
        parts = [(x - x.mean(0)) / len(x) ** 0.5 for x in (positive, negative)]
        return torch.cat([*parts, self._delta[position, layer].unsqueeze(0)])

    def _total_factor(self, activations: Activations, position: int, layer: int) -> Tensor:
        both = torch.cat([activations.cell(side, position, layer) for side in SIDES])
        return (both - both.mean(0)) / len(both) ** 0.5

    def _components(self, method: str, factor: Callable[[Activations, int, int], Tensor]) -> Directions:
        activations = self._activations_for(f"{method} is made of the prompts' activations")

        def top(position: int, layer: int) -> tuple[Tensor, float]:
            direction, share = linear.top_of_factor(factor(activations, position, layer))
            # Where the component is orthogonal to the difference in means, its sign means nothing.
            return (-direction if direction @ self._delta[position, layer] < 0 else direction), share

        return self._each(method, top, "explained", {"paired": self.paired})

    def _each(
        self, method: str, find: Callable[[int, int], tuple[Tensor, float]], detail: str, provenance: dict[str, Any]
    ) -> Directions:
        """Apply `find` wherever the means differ: elsewhere all prompts have one activation."""
        means = self.candidates
        directions, details = torch.zeros_like(self._delta), torch.zeros_like(self._delta[..., 0])
        for position, layer in means.exists().nonzero().tolist():
            directions[position, layer], details[position, layer] = find(position, layer)
        return self._table(method, "unit", directions, {detail: details}, provenance)


def contrast(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    paired: bool = False,
    keep: bool = False,
    **options: Any,
) -> Contrast:
    """Run both sets through the model once and keep what the methods from contrast need, for all layers and positions.

    Always kept are the means: `2 x positions x layers x hidden` fp64.

    Args:
        positive, negative: texts or chat message lists; directions point from the negative to the positive.
        paired: positive[i] and negative[i] differ in the behaviour alone (the same question under two system prompts);
            both pass in one batch.
        keep: also keep every prompt's activations, for `pca`, `lat` and `probe`: `prompts x positions x layers x
            hidden` in the model's dtype. They can be saved and read back (`Activations`).
        options: `at`, `positions`, `system`, `rendered`, `batch_size`, `progress`, as in `candidates`.

    Raises:
        ValueError: as `candidates`; with `paired`, sides of different length.
    """
    sets = {"positive": positive, "negative": negative}
    means, activations = read_sets(model, tokenizer, sets, paired=paired, keep=keep, **options)
    return Contrast(means, paired, activations)


def of_activations(activations: Activations) -> Contrast:
    """The contrast of activations that were kept before (`Activations.load`): no model needed.

    Raises:
        ValueError: fewer than two prompts a side.
    """
    if min(len(activations.positive), len(activations.negative)) < 2:
        raise ValueError("the activations are of fewer than two prompts a side: a contrast needs at least two")
    means = [getattr(activations, side).double().mean(0) for side in SIDES]
    counts = len(activations.positive), len(activations.negative)
    candidates = Candidates(means[0], means[1], activations.positions, activations.at, *counts, activations.model)
    return Contrast(candidates, activations.paired, activations)


def ace_plan(vector: SteeringVector, coefficient: float, layer: int | None = None) -> Plan:
    """Return the plan of affine concept editing: h - r^ r^T h + r^ r^T reference + coefficient r at the vector's hook
    point, every token.

    Args:
        vector: from `Contrast.ace`, which keeps its reference points in the provenance.
        coefficient: 0 sets the projection to the reference, 1 moves it on by the vector's length.
        layer: one of the vector's layers, by default all.

    Raises:
        ValueError: a vector without reference points, or a layer it lacks.
    """
    references = vector.provenance.get("reference")
    if not isinstance(references, Mapping):
        raise ValueError(
            f"this vector (method {vector.method!r}) has no reference points: ace_plan takes one from Contrast.ace"
        )
    interventions: list[Any] = []
    for number in vector.layers if layer is None else (layer,):
        if number not in vector or str(number) not in references:
            raise ValueError(f"the vector has no direction with a reference point at layer {number}")
        p = float(references[str(number)])
        interventions.append(Clamp(vector, p, p, layers=number))
        if coefficient:
            interventions.append(Add(vector, coefficient, layers=number))
    return Plan(interventions)


def pca(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: int = -1,
    **options: Any,
) -> SteeringVector:
    """Return `Contrast.pca` at one token position, a unit direction per layer. Options and errors as `contrast`."""
    return _contrast_at(model, tokenizer, positive, negative, position, options).pca().vector(position)


def lat(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: int = -1,
    **options: Any,
) -> SteeringVector:
    """Return `Contrast.lat` at one token position, a unit direction per layer. Options and errors as `contrast`."""
    return _contrast_at(model, tokenizer, positive, negative, position, options).lat().vector(position)


def probe(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: int = -1,
    c: float = 1.0,
    **options: Any,
) -> SteeringVector:
    """Return `Contrast.probe` at one token position, a unit direction for every layer. Options and errors as
    `contrast`."""
    return _contrast_at(model, tokenizer, positive, negative, position, options).probe(c).vector(position)


def ace(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: int = -1,
    reference: Reference = "negative",
    **options: Any,
) -> SteeringVector:
    """Return `Contrast.ace` at one token position, for `ace_plan`. Options and errors as `contrast`."""
    table = contrast(model, tokenizer, positive, negative, positions=[position], **options).ace(reference)
    return table.vector(position)


def _contrast_at(
    model: Any, tokenizer: Any, positive: Sequence[Prompt], negative: Sequence[Prompt], position: int, options: Any
) -> Contrast:
    return contrast(model, tokenizer, positive, negative, positions=[position], keep=True, **options)
