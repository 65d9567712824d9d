"""How long choosing among candidates will take, from timing a small part of the work before anything else is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from faststeer.evaluate.generate import seconds_per_answer, seconds_per_row
from faststeer.hf import find_hook_points
from faststeer.hf.batching import Prompt, encode, padding_id, prompt_sets
from faststeer.hf.last_tokens import find_common
from faststeer.intervention import Add
from faststeer.plan import Plan


def selection_seconds(
    model: Any,
    tokenizer: Any,
    rule: Literal["refusal", "cosmic", "judge"],
    induce: Sequence[Prompt],
    suppress: Sequence[Prompt],
    n_candidates: int,
    n_coefficients: int = 1,
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 64,
) -> float:
    """Return the seconds that a selection will take.

    Unsteered prompts are timed: one forward pass or, for a judge, a few tokens of one batch of answers. Answers count
    with their longest length, so that a judge's selection may end earlier.

    Args:
        rule: "refusal" for `select`, "cosmic" for `select_cosmic`, "judge" for `select_by_judge`.
        induce, suppress: the validation prompts, to be steered towards the behaviour and away from it.
        n_candidates: layers times positions that are tried, each with `n_coefficients` coefficients.
        layers: whose candidates are tried (all): rows of late ones take less where the layers in front of them are run
            once for each prompt.
        max_new_tokens, system, rendered, batch_size: as in the selection.

    Raises:
        ValueError: no prompts, or what is no prompt.
    """
    sets = list(prompt_sets(rendered, induce=induce, suppress=suppress).values())
    n_induce, n_suppress = map(len, sets)
    n_steered = n_candidates * n_coefficients
    if rule == "judge":
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system, "batch_size": batch_size}
        n_answers = (n_steered + 1) * (n_induce + n_suppress)  # the unsteered ones are judged, too
        return n_answers * seconds_per_answer(model, tokenizer, [*sets[0], *sets[1]], n_answers, **settings)
    # Both measure an addition on one side and an ablation on the other, and the ablation's KL. By refusal scores, a
    # subtraction is measured, too.
    points, pad_id = find_hook_points(model), padding_id(tokenizer)
    layers = range(points.n_layers) if layers is None else list(layers)
    at = [layer for layer in layers if points.has("resid_pre", layer)] or [0]
    unit = torch.ones(points.hidden_size)
    added = [Plan([Add(unit, layers=at[number % len(at)], at="resid_pre")]) for number in range(n_steered)]
    ablated = [Plan([Add(unit, layers=0, at="resid_pre")]) for _ in range(n_candidates)]
    n_rows, n_whole = 0, 0.0
    for prompts, plans in ((sets[0], added + ablated), (sets[1], (added if rule == "refusal" else []) + ablated)):
        encoded = encode(tokenizer, prompts, system)
        rows = [(prompt, plan) for plan in plans for prompt in range(len(encoded))]
        n_rows += len(rows)
        n_whole += len(rows) * find_common(model, encoded, rows, (), pad_id, batch_size).part
    encoded = encode(tokenizer, [*sets[0], *sets[1]], system)
    return n_whole * seconds_per_row(model, encoded, pad_id, batch_size, n_rows)
