"""How few coordinates of a vector steer: the behaviour against sparsity, by the paper's rule and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from faststeer.algebra import RULES, Rule, sparsify
from faststeer.evaluate.statistics import Rate
from faststeer.extract.sweep import answer
from faststeer.hf.batching import Prompt, check_prompts
from faststeer.intervention import Add
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class SparsityPoint:
    """What a sparsified vector does.

    Attributes:
        rule: how coordinates were chosen; None: the unsteered model.
        sparsity: share of the coordinates that are zero, as asked for. kept: how many are not.
        seed: of the random rule.
        rate: answers that show the behaviour.
    """

    rule: Rule | None
    sparsity: float
    kept: int
    seed: int
    rate: Rate

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        place = {"rule": self.rule, "sparsity": self.sparsity, "kept": self.kept, "seed": self.seed}
        return {**place, **self.rate.to_dict()}


def sparsity_curves(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    vector: SteeringVector,
    effect: Tensor,
    judge: Callable[[str], bool],
    *,
    coefficient: float = 1.0,
    rules: Sequence[Rule] = RULES,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0,),
    rescale: Mapping[Rule, bool] | bool = False,
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
) -> list[SparsityPoint]:
    """Steer with the vector at every sparsity by every rule, and count the answers that show the behaviour.

    One sweep: each (rule, sparsity, prompt) is a row of a mixed batch under its own plan. Rules are those of
    `fs.sparsify`: "paper" and "code" (what the paper says and what its code does), the baselines "magnitude" and
    "effect" (the smallest abs(s_i), abs(e_i) go first) and "random". The first point is the unsteered model's; at
    sparsity 0, where all rules are the same, there is one point per rule from the same answers. Source: arXiv
    2604.08524.

    Args:
        vector: of one layer.
        effect: `[hidden]`, the effect of each of its coordinates: `Scores.dimensions`.
        judge: whether an answer shows the behaviour, such as `is_refusal`.
        coefficient: as in `Add`.
        sparsities: shares of zeros, in 0..1 (below 1); at least one coordinate is kept.
        seeds: of the random rule, a curve for each.
        rescale: whether a sparsified vector gets the length of the whole one, for all rules or by rule.
        system, max_new_tokens, batch_size, progress: as in `complete`.

    Raises:
        ValueError: a vector of several layers, an unknown rule, a sparsity outside 0..1, no seed, an effect of another
            size.
    """
    if len(vector.layers) != 1:
        raise ValueError(f"the vector has the layers {vector.layers}: give a SteeringVector of the one that is added")
    if not sparsities or not all(0 <= share < 1 for share in sparsities):
        raise ValueError(f"sparsities are {list(sparsities)}: expected shares of zeros, at least 0 and below 1")
    if not seeds:
        raise ValueError("no seeds: give at least one for the random rule")
    prompts = check_prompts(prompts)
    cells = [
        (rule, share, seed)
        for rule in rules
        for share in sparsities
        for seed in (seeds if rule == "random" else seeds[:1])
    ]
    sparse = [_sparse(vector, effect, *cell, rescale) for cell in cells]
    plans = {key: Plan([Add(made, coefficient)]) for key, made in sparse}  # what is the same vector is run once
    every: list[Plan | None] = [None, *plans.values()]
    how: dict[str, Any] = {"system": system, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = answer(model, tokenizer, [(prompts, plan) for plan in every], progress=progress, **how)
    rates = [Rate(sum(map(bool, map(judge, texts))), len(prompts)) for texts in answers]
    of_plan = dict(zip(plans, rates[1:], strict=True))
    points = [SparsityPoint(None, 1.0, 0, 0, rates[0])]
    for (rule, share, seed), (key, _) in zip(cells, sparse, strict=True):
        points.append(SparsityPoint(rule, share, len(key) - 1, seed, of_plan[key]))
    return points


def _sparse(
    vector: SteeringVector, effect: Tensor, rule: Rule, share: float, seed: int, rescale: Mapping[Rule, bool] | bool
) -> tuple[tuple[int, ...], SteeringVector]:
    """The vector with that share of zeros, and what tells it from others: whether rescaled, the columns left."""
    scaled = rescale if isinstance(rescale, bool) else rescale.get(rule, False)
    kept = max(1, round((1 - share) * vector.hidden_size))
    made = sparsify(
        vector,
        rule,
        keep=(kept - 0.5) / vector.hidden_size,  # rounded up there
        effect=effect if rule in ("effect", "paper", "code") else None,
        rescale=scaled,
        seed=seed,
    )
    return (int(scaled), *made.indices[vector.layers[0]].tolist()), made.dense()
