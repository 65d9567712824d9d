"""COSMIC: choosing a direction by what it does to activations, without refusal tokens, answers or a judge."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from faststeer.evaluate.divergence import kl_on
from faststeer.extract.sweep import (
    CandidateTable,
    JsonFields,
    cells,
    check_layers,
    choose,
    chosen_vector,
    fewest_first,
    violations,
)
from faststeer.hf.batching import Prompt, check_evaluating, encode, padding_id, prompt_sets
from faststeer.hf.last_tokens import last_tokens
from faststeer.plan import Plan
from faststeer.vector import SteeringVector


@dataclass(frozen=True)
class CosmicRow(JsonFields):
    """What one candidate does to activations.

    Args:
        layer, position, coefficient: the candidate.
        suppress: cosine of ablated positive with unsteered negative prompts.
        induce: cosine of negative prompts with the direction added with unsteered positive prompts.
        kl: mean KL in nats of the next token on negative prompts, from unsteered to ablated.
        violated: the constraints it does not satisfy ("kl", "layer"), or "not finite".
    """

    layer: int
    position: int | None
    coefficient: float
    suppress: float
    induce: float
    kl: float
    violated: tuple[str, ...]
    DERIVED: ClassVar[tuple[str, ...]] = ("score",)

    @property
    def score(self) -> float:
        return self.suppress + self.induce


@dataclass(frozen=True, eq=False)
class CosmicSelection(JsonFields):
    """The chosen direction at its one layer, its row, the whole table, the layers at which activations were compared,
    and the constraints given up because no candidate satisfied all of them."""

    vector: SteeringVector
    chosen: CosmicRow
    table: tuple[CosmicRow, ...]
    layers: tuple[int, ...]
    relaxed: tuple[str, ...]
    rule: str = "cosmic"


def select_cosmic(
    model: Any,
    tokenizer: Any,
    candidates: CandidateTable,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    coefficients: Sequence[float] = (1.0,),
    layers: Iterable[int] | None = None,
    share: float = 0.1,
    kl_below: float = 0.1,
    depth_below: float = 0.8,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> CosmicSelection:
    """Choose the candidate whose steering turns activations of one side into those of the other most nearly.

    Let m(prompts, plan) be the mean activation at the last prompt token after each of the chosen layers (`resid_post`,
    as steering leaves it), concatenated. The chosen layers are the `share` of all (at least one) at which the unsteered
    means of the two sides have the lowest cosine, where the behaviour is told apart best. Chosen is the largest

        cos(m(positive, ablated), m(negative)) + cos(m(negative, added), m(positive))

    among candidates of layers below `depth_below` of the depth whose ablation moves the next token on negative prompts
    by less than `kl_below` nats on average; where there is none, KL is given up first, then the depth, with a warning.
    Ties go to the earlier layer, then position. Source: arXiv 2506.00085.

    Args:
        candidates: a table whose directions point from negative to positive.
        positive, negative: validation prompts, not those the candidates were extracted from.
        coefficients: with which a direction is added.
        layers: whose candidates are tried (all).
        system, rendered, batch_size, progress: as in `candidates`; a batch mixes candidates.

    Raises:
        ValueError: no prompts, candidates of another model or without direction, a share outside (0, 1], or no
            candidate with finite scores.
    """
    check_evaluating(model)
    tried_layers, n_layers = check_layers(model, candidates, layers), candidates.n_layers
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: expected a part of the layers, above 0 and at most 1")
    sets = prompt_sets(rendered, positive=positive, negative=negative)
    sides = [encode(tokenizer, prompts, system, what=name) for name, prompts in sets.items()]
    settings: dict[str, Any] = {"pad_id": padding_id(tokenizer), "batch_size": batch_size, "progress": progress}
    tried = cells(candidates, coefficients, tried_layers)
    plain = [_means(model, encoded, [None], range(n_layers), **settings)[0] for encoded in sides]  # [layers, hidden]
    cosines = torch.cosine_similarity(plain[0], plain[1], dim=-1)
    chosen_layers = sorted(cosines.argsort()[: max(round(share * n_layers), 1)].tolist())
    base = [means[chosen_layers].flatten() for means in plain]
    ablations = {(cell.layer, cell.position): cell.ablate for cell in tried}
    plans = list(ablations.values())
    ablated = _means(model, sides[0], plans, chosen_layers, **settings)
    added = _means(model, sides[1], [cell.add for cell in tried], chosen_layers, **settings)
    options: dict[str, Any] = {"system": system, "batch_size": batch_size, "progress": progress}
    divergences = kl_on(model, tokenizer, plans, sets["negative"], **options).mean(1).tolist()
    of_ablation = dict(zip(ablations, zip(ablated, divergences, strict=True), strict=True))
    table = []
    for cell, means in zip(tried, added, strict=True):
        ablated_means, kl = of_ablation[cell.layer, cell.position]
        suppress = torch.cosine_similarity(ablated_means.flatten(), base[1], dim=0).item()
        induce = torch.cosine_similarity(means.flatten(), base[0], dim=0).item()
        limits = {"kl": kl < kl_below, "layer": cell.layer < depth_below * n_layers}
        violated = violations((suppress, induce, kl), limits)
        table.append(CosmicRow(cell.layer, cell.position, cell.coefficient, suppress, induce, kl, violated))
    best, relaxed = choose(table, fewest_first(("kl", "layer")), lambda row: (-row.score, row.layer, row.position or 0))
    if relaxed:
        warnings.warn(f"no candidate satisfies every constraint; given up: {', '.join(relaxed)}", stacklevel=2)
    vector = chosen_vector(candidates, best, rule="cosmic", relaxed=list(relaxed), layers=chosen_layers)
    return CosmicSelection(vector, best, tuple(table), tuple(chosen_layers), relaxed)


def _means(
    model: Any, encoded: list[list[int]], plans: Sequence[Plan | None], layers: Sequence[int], **settings: Any
) -> Tensor:
    """`[plans, layers, hidden]` fp64: the mean over prompts of the activation after each layer at the last token."""
    rows = [(prompt, plan) for plan in plans for prompt in range(len(encoded))]
    total: Tensor | float = 0.0
    for numbers, _, activations in last_tokens(model, encoded, rows, layers=layers, **settings):
        # [rows, layers, hidden]
        values = torch.stack([activations[layer].cpu().double() for layer in layers], dim=1)
        of_plan = torch.tensor(numbers) // len(encoded)
        total = torch.zeros(len(plans), *values.shape[1:], dtype=torch.float64).index_add_(0, of_plan, values) + total
    return cast(Tensor, total) / len(encoded)
