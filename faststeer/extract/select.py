"""Choosing one direction among the candidates of all layers and positions, by what it does to refusal and to everything
else.

Every candidate is measured by steering with it, many of them as rows of the same batch; the whole table is kept.
Nothing is chosen in silence: when no candidate satisfies every constraint, the result says which one was given up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from faststeer.evaluate.divergence import kl_on
from faststeer.evaluate.refusal import refusal_tokens, score_on
from faststeer.extract.sweep import (
    CandidateTable,
    JsonFields,
    cells,
    check_coefficients,
    check_layers,
    choose,
    chosen_vector,
    fewest_first,
    violations,
)
from faststeer.hf.batching import Prompt, prompt_sets
from faststeer.vector import SteeringVector

Rule = Literal["steering", "arditi"]
# In the order in which they are given up. A threshold on the induced score suits models whose answers begin with the
# refusal; others never reach it, and are asked to come half way to their own refusals. What does not even do that comes
# last of all: a direction that changes nothing satisfies every other constraint.
CONSTRAINTS = ("induce", "kl", "layer")
LAST = "half way"


@dataclass(frozen=True)
class RefusalRow(JsonFields):
    """What one candidate does; scores are means of log(P_R / (1 - P_R)) over the prompts.

    Args:
        layer, position: where it was found, and the layer at which it is added.
        induce: score of harmless prompts with the direction added (+ coefficient).
        bypass: score of harmful prompts with the direction subtracted (- coefficient).
        ablate: score of harmful prompts with the direction ablated from `resid_pre`, `attn_out` and `mlp_out` of every
            layer.
        kl: mean KL in nats of the next token on harmless prompts, from unsteered to ablated.
        violated: the constraints it does not satisfy ("induce", "kl", "layer", "half way"), or "no direction", "not
            finite": such a candidate cannot be chosen at all.
        coefficient: with which it was added and subtracted.

    The numbers are NaN for a candidate without direction.
    """

    layer: int
    position: int | None
    induce: float
    bypass: float
    ablate: float
    kl: float
    violated: tuple[str, ...]
    coefficient: float = 1.0
    DERIVED: ClassVar[tuple[str, ...]] = ("admissible",)

    @property
    def admissible(self) -> bool:
        """Whether the candidate keeps all limits."""
        return not self.violated

    def objective(self, rule: Rule) -> float:
        """What `rule` minimises."""
        return self.bypass - self.induce if rule == "steering" else self.ablate


@dataclass(frozen=True, eq=False)
class Selection(JsonFields):
    """The chosen direction and the table it was chosen from.

    Args:
        vector: the chosen direction at its one layer, as it was found (not multiplied by the chosen coefficient).
        chosen: its row of the table.
        table: one row per candidate, positions in the order of the candidates, layers ascending within each,
            coefficients innermost.
        rule: "steering" or "arditi".
        relaxed: the constraints given up because no candidate satisfied all of them; empty when one did.
        limits: the thresholds: `induce_above`, `kl_below`, `layer_below` (a layer number) and `half_way_above`.
        unsteered: mean refusal scores of the unsteered model on the "harmful" and the "harmless" prompts.
        n_prompts: how many there are of both.
        refusal_tokens: ids whose probability is P_R.
    """

    vector: SteeringVector
    chosen: RefusalRow
    table: tuple[RefusalRow, ...]
    rule: Rule
    relaxed: tuple[str, ...]
    limits: dict[str, float]
    unsteered: dict[str, float]
    n_prompts: dict[str, int]
    refusal_tokens: tuple[int, ...]


def check_refusal(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    token_ids: Sequence[int] | None = None,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 64,
) -> tuple[tuple[int, ...], dict[str, float]]:
    """Return the refusal tokens and the unsteered model's mean refusal scores on the "harmful" and the "harmless"
    prompts: what `select` needs before it measures any candidate.

    Args: as in `select`.

    Raises:
        ValueError: no prompts, or default refusal tokens with which the model does not begin its answers to harmful
            prompts more often than those to harmless ones.
    """
    sets = prompt_sets(rendered, harmful=harmful, harmless=harmless)
    ids = tuple(refusal_tokens(tokenizer) if token_ids is None else token_ids)
    unsteered = {
        name: score_on(
            model, tokenizer, [None], prompts, token_ids=ids, system=system, batch_size=batch_size
        ).mean().item()
        for name, prompts in sets.items()
    }  # fmt: skip
    if token_ids is None and not unsteered["harmful"] > unsteered["harmless"]:
        words = ", ".join(repr(tokenizer.decode([token])) for token in ids)
        raise ValueError(
            f"selection by refusal scores cannot work here: the model begins answers to the first set of prompts no "
            f"more often with {words} than those to the second (scores {unsteered['harmful']:.2f} and "
            f"{unsteered['harmless']:.2f}). Select without refusal tokens: select_cosmic or select_by_judge (on the "
            "command line --select cosmic, or --select judge --judge NAME), or give the token_ids= it refuses with"
        )
    return ids, unsteered


def select(
    model: Any,
    tokenizer: Any,
    candidates: CandidateTable,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    rule: Rule = "steering",
    coefficients: Sequence[float] = (1.0,),
    layers: Iterable[int] | None = None,
    token_ids: Sequence[int] | None = None,
    induce_above: float = 0.0,
    kl_below: float = 0.1,
    depth_below: float = 0.8,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Selection:
    """Measure every candidate on validation prompts and choose one.

    Candidates must point from harmless to harmful. With L layers, a candidate of layer l is admissible when
    - "induce": score(harmless, +1) > `induce_above`,
    - "kl": mean KL(P || P_ablated) on harmless prompts < `kl_below`,
    - "layer": l < `depth_below` L,
    where +1 and -1 add the direction, times each of `coefficients`, at its own layer and hook point at every token.
    Among the admissible, the rule "steering" takes the lowest score(harmful, -1) - score(harmless, +1) (arXiv
    2604.08524), "arditi" the lowest score(harmful, ablated) (arXiv 2406.11717); ties go to the earlier layer, then to
    the earlier position, then to the smaller coefficient.

    If none is admissible, as few constraints as possible are given up; of equally many, "induce" goes before "kl" and
    "kl" before "layer". Without "induce" there is still "half way": score(harmless, +1) must be above the middle of the
    unsteered scores of harmful and harmless prompts (or above `induce_above`, where that is lower), which goes last.
    What was given up is warned about and recorded in `Selection.relaxed`.

    Scores are those of the next token. Where answers open with words common to refusal and compliance ("Let me see."),
    give validation chats that end in an assistant message with such an opener, so that the next token is where they
    part.

    Args:
        candidates: from `faststeer.extract.candidates`, or any method's table.
        harmful, harmless: validation prompts, not those the candidates were extracted from.
        coefficients, layers: which are tried (1; all layers).
        token_ids: the refusal tokens; by default `refusal_tokens(tokenizer)`, which must then tell the two sets apart.
        system, rendered, batch_size, progress: as in `candidates`; a batch mixes candidates.

    Raises:
        ValueError: no prompts, an unknown rule, candidates of another model, no candidate that has a direction and
            finite scores, or a model that does not begin its refusals with the default refusal tokens.
    """
    if rule not in ("steering", "arditi"):
        raise ValueError(f"unknown rule {rule!r}: expected 'steering' or 'arditi'")
    harmful, harmless = prompt_sets(rendered, harmful=harmful, harmless=harmless).values()
    layers = check_layers(model, candidates, layers)
    coefficients = check_coefficients(coefficients)
    scoring: dict[str, Any] = {"system": system, "batch_size": batch_size}
    ids, unsteered = check_refusal(model, tokenizer, harmful, harmless, token_ids=token_ids, **scoring)
    scoring["progress"] = progress

    tried = cells(candidates, coefficients, layers)
    ablations = {(cell.layer, cell.position): cell.ablate for cell in tried}
    bypass, ablate = score_on(
        model, tokenizer, [*(cell.subtract for cell in tried), *ablations.values()], harmful, token_ids=ids, **scoring
    ).mean(1).split([len(tried), len(ablations)])  # fmt: skip
    induce = score_on(
        model, tokenizer, [cell.add for cell in tried], harmless, token_ids=ids, **scoring
    ).mean(1)  # fmt: skip
    kl = kl_on(model, tokenizer, list(ablations.values()), harmless, **scoring).mean(1)

    limits = {
        "induce_above": induce_above,
        "kl_below": kl_below,
        "layer_below": depth_below * candidates.n_layers,
        "half_way_above": min(induce_above, sum(unsteered.values()) / 2),
    }
    ablated = dict(zip(ablations, torch.stack([ablate, kl], dim=1).tolist(), strict=True))
    measured = {
        cell[:3]: [*steered, *ablated[cell.layer, cell.position]]
        for cell, steered in zip(tried, torch.stack([induce, bypass], dim=1).tolist(), strict=True)
    }
    table = tuple(
        _row(layer, position, measured.get((layer, position, c)), limits, c)
        for position in candidates.positions
        for layer in layers
        for c in coefficients
    )
    chosen, relaxed = _choose(table, rule)
    if relaxed:
        warnings.warn(
            f"no candidate satisfies every constraint; given up: {', '.join(relaxed)} (limits {limits}; "
            f"the unsteered model scores {unsteered})",
            stacklevel=2,
        )
    n_prompts = {"harmful": len(harmful), "harmless": len(harmless)}
    how = {"rule": rule, "relaxed": list(relaxed), "limits": limits, "n_prompts": n_prompts}
    vector = chosen_vector(candidates, chosen, **how)
    return Selection(vector, chosen, table, rule, relaxed, limits, unsteered, n_prompts, ids)


def _row(
    layer: int, position: int | None, values: list[float] | None, limits: dict[str, float], coefficient: float = 1.0
) -> RefusalRow:
    induce, bypass, ablate, kl = values or [math.nan] * 4
    if values is None:
        violated: tuple[str, ...] = ("no direction",)
    else:
        satisfied = {
            "induce": induce > limits["induce_above"],
            "kl": kl < limits["kl_below"],
            "layer": layer < limits["layer_below"],
            LAST: induce > limits["half_way_above"],
        }
        violated = violations(values, satisfied)
    return RefusalRow(layer, position, induce, bypass, ablate, kl, violated, coefficient)


def _choose(table: Sequence[RefusalRow], rule: Rule) -> tuple[RefusalRow, tuple[str, ...]]:
    """Return the best row that violates no constraint but the fewest that must be given up, and those."""
    relaxations = fewest_first(CONSTRAINTS)
    return choose(
        table,
        [*relaxations, *((*some, LAST) for some in relaxations)],
        lambda row: (row.objective(rule), row.layer, row.position or 0, row.coefficient),
    )
