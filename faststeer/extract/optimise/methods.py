"""Steering vectors by optimisation: `ntp`, `po`, `reps`, `bipo`. Each function says its loss, its source, and where its
settings differ from the source's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from faststeer.extract.optimise.objectives import Bidirectional, NextToken, Preference, Suppression
from faststeer.extract.optimise.training import Layers, Training, TrainingSettings, train
from faststeer.extract.pairs import Pair
from faststeer.vector import HookPoint

FACTORS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)


def ntp(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    layers: Layers,
    at: HookPoint = "resid_post",
    coefficient: float | Sequence[float] = 1.0,
    factors: Sequence[float] = FACTORS,
    steps: int | None = None,
    lr: float = 0.01,
    batch_size: int = 12,
    seed: int | Sequence[int] = 0,
    held_out: Sequence[Pair] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    length_normalised: bool = True,
    settings: TrainingSettings | None = None,
) -> Training:
    """Train vectors on the next-token-prediction loss of chosen completions.

    Loss of a pair: -(1/|y|) sum_i log p(y_i | prompt, y_<i), y the chosen completion, while sign x coefficient x factor
    x v is added at every token of prompt and completion; the factor is drawn anew for every pair at every step.

    Source: arXiv 2604.08524 (10 epochs of AdamW without weight decay, linear decay, gradient norm clipped at 1, first
    64 tokens, factors 2, 4, ..., 20, start 0.01 N(0, I), lr 0.01 or 0.04, batches of 6 or 12). Its formula sums over
    tokens, its code takes the mean, as is done here; `length_normalised=False` sums. Its learning rate falls once per
    epoch, here at every step. Its learning rate and start are absolute, here in units of the residual stream's size
    (`TrainingSettings.unit`), so that one default suits all models. It rescales the vector to the norm of the
    difference in means at the end; here it comes scaled to the middle of the strengths it was trained at
    (`Run.vector`).

    Args:
        model: any causal language model that `steer` takes, in eval mode; its weights are left as they are. The vector
            is fp32 whatever the model's dtype.
        pairs: with prompts, chosen completions and signs.
        layers: one, several, or "all"; a vector is trained for each.
        at: hook point.
        coefficient: one, or several: a vector is trained for each.
        factors: multiples of the coefficient to draw from; (1,) for none.
        steps: optimizer steps; by default those of 10 epochs.
        lr: of AdamW, at its highest, in `TrainingSettings.unit`s.
        batch_size: pairs per step and vector.
        seed: one, or several: a vector is trained for each. It decides start, order of pairs, factors and signs.
        held_out: pairs on which the loss is watched: the vector is that of the step at which it was lowest
            (settings `every`, `patience`); the factor is then the mean factor.
        checkpoint: file to keep the state in, every `TrainingSettings.every` steps; if it exists, training goes on from
            there, to the same vector bit for bit on the same machine.
        progress: show a progress bar on stderr.
        settings: what is seldom changed.

    Returns:
        A `Training`: `.vector`, `.runs` with losses, `.best`.

    Raises:
        ValueError: pairs, numbers, layers or a checkpoint that cannot be used; nothing was trained then.
        TrainingDiverged: a loss or gradient that is not finite, with the step; the last checkpoint is kept.
    """
    return train(
        model,
        tokenizer,
        pairs,
        NextToken(length_normalised),
        layers=layers,
        at=at,
        coefficient=coefficient,
        factors=factors,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        held_out=held_out,
        checkpoint=checkpoint,
        progress=progress,
        settings=settings or TrainingSettings(),
    )


def po(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    layers: Layers,
    at: HookPoint = "resid_post",
    coefficient: float | Sequence[float] = 1.0,
    factors: Sequence[float] = FACTORS,
    steps: int | None = None,
    lr: float = 0.01,
    batch_size: int = 12,
    seed: int | Sequence[int] = 0,
    held_out: Sequence[Pair] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    phi: float = 0.02,
    settings: TrainingSettings | None = None,
) -> Training:
    """Train vectors by preference optimisation: RePS in one direction.

    Loss of a pair: -log sigma(D), D = (b/|w|) log p(w) - (1/|l|) log p(l), w and l the chosen and the rejected
    completion, both under sign x coefficient x factor x v; b = max((log p_0(l) - log p_0(w)) phi, 1) with p_0 the
    unsteered model. Means over tokens, but b takes sums, as in the source.

    Source: arXiv 2604.08524, phi 0.02 or 1e-5 (b = 1 for nearly all pairs); settings and what differs as in `ntp`.

    A preference is also won by making both completions unlikely, the rejected one more so: the loss goes on falling as
    the vector grows, past the size at which answers break, and the held-out loss does not show it. Scale the vector to
    the length of the difference in means, as the source does (`faststeer.algebra.normalise`), or take fewer steps. The
    same holds of `reps` and `bipo`.

    Args:
        pairs: each with a rejected completion.
        phi: how much an unlikely chosen completion is weighted up.

    Other arguments, result and errors: `ntp`.
    """
    return train(
        model,
        tokenizer,
        pairs,
        Preference(_not_negative("phi", phi)),
        layers=layers,
        at=at,
        coefficient=coefficient,
        factors=factors,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        held_out=held_out,
        checkpoint=checkpoint,
        progress=progress,
        settings=settings or TrainingSettings(),
    )


def reps(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    layers: Layers,
    at: HookPoint = "resid_post",
    coefficient: float | Sequence[float] = 1.0,
    factors: Sequence[float] = FACTORS,
    steps: int | None = None,
    lr: float = 0.04,
    batch_size: int = 6,
    seed: int | Sequence[int] = 0,
    held_out: Sequence[Pair] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    phi: float = 1.0,
    suppression: Suppression = "null",
    settings: TrainingSettings | None = None,
) -> Training:
    """Train vectors by reference-free preference steering in both directions.

    Loss of a pair: -log sigma(D+) - log sigma(D-). D+ as in `po` with the positive completion winning, while
    coefficient x factor x v is added; D- with the negative one winning, while v is suppressed. Suppression "null": h
    becomes h - relu(h . q) q, q = v / |v|; "subtract": coefficient x factor x v is subtracted. Every pair takes part in
    both directions whatever its sign.

    Source: arXiv 2505.20809 and its code (factors 2, 4, ..., 20, batches of 6 pairs, phi 1, AdamW without weight decay,
    lr 0.04 for 2B models, linear decay). What differs: the code divides by the length of prompt and completion, here,
    as in the paper, by that of the completion; the code draws a factor each for winner and loser, here, as in the
    paper's formula, both are under the same; the code's bias beside the factor and its dropout are left out; learning
    rate and start as in `ntp`.

    Args:
        pairs: each with a rejected completion.
        phi: as in `po`.
        suppression: "null" (the paper's) or "subtract". Only the second trains for being subtracted.

    Other arguments, result and errors: `ntp`.
    """
    if suppression not in ("null", "subtract"):
        raise ValueError(f"unknown suppression {suppression!r}: expected 'null' or 'subtract'")
    if suppression == "null" and settings is not None and settings.start == 0:
        raise ValueError("start is 0.0: a zero vector has no direction to take out; start elsewhere, or 'subtract'")
    return train(
        model,
        tokenizer,
        pairs,
        Preference(_not_negative("phi", phi), suppression),
        layers=layers,
        at=at,
        coefficient=coefficient,
        factors=factors,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        held_out=held_out,
        checkpoint=checkpoint,
        progress=progress,
        settings=settings or TrainingSettings(),
    )


def bipo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    layers: Layers,
    at: HookPoint = "resid_post",
    coefficient: float | Sequence[float] = 1.0,
    factors: Sequence[float] = (1.0,),
    steps: int | None = None,
    lr: float = 0.01,
    batch_size: int = 4,
    seed: int | Sequence[int] = 0,
    held_out: Sequence[Pair] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    beta: float = 0.1,
    settings: TrainingSettings | None = None,
) -> Training:
    """Train vectors by bi-directional preference optimisation.

    Loss of a pair: -log sigma(d beta (log p(positive)/p_0(positive) - log p(negative)/p_0(negative))), d = +1 or -1
    drawn once per step, while d x coefficient x factor x v is added; p_0 is the unsteered model, log p the sum over
    tokens. Every pair takes part whatever its sign.

    Source: arXiv 2406.00045 and its code: beta 0.1, batches of 4, AdamW with lr 5e-4 (weight decay 0.05 is declared
    there and never passed on), cosine decay after 100 steps of warm-up, start at zero, 20 to 100 epochs. What differs:
    the learning rate is in other units and another (`TrainingSettings.unit`); 10 epochs unless `steps` says otherwise;
    completions are cut at `TrainingSettings.max_tokens`.

    Args:
        pairs: each with a rejected completion.
        beta: temperature of the preference.
        settings: by default cosine decay, a warm-up of 100 steps (a tenth of all, where that is less) and a start at
            zero.

    Other arguments, result and errors: `ntp`.
    """
    if settings is None:
        many = steps if isinstance(steps, int) else 10 * len(pairs) // max(1, min(batch_size, len(pairs)))
        settings = TrainingSettings(schedule="cosine", warmup=max(0, min(100, many // 10)), start=0.0)
    return train(
        model,
        tokenizer,
        pairs,
        Bidirectional(_not_negative("beta", beta)),
        layers=layers,
        at=at,
        coefficient=coefficient,
        factors=factors,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        held_out=held_out,
        checkpoint=checkpoint,
        progress=progress,
        settings=settings,
    )


def _not_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value!r}: expected a finite number that is not negative")
    return float(value)
