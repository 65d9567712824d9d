"""The demonstration on a real model: a vector for a cheerful tone, by difference in means, added and subtracted.

The layer is chosen on questions that are not measured on. Every coefficient is measured next to random vectors of the
same norm. A coefficient of 1 adds the raw difference of the means, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faststeer import behaviours, extract
from faststeer.demo import plots
from faststeer.evaluate.generate import complete
from faststeer.evaluate.judging import make, no_loop
from faststeer.evaluate.statistics import mean_interval, paired_bootstrap, rank_correlation
from faststeer.files import write_atomically
from faststeer.hf.batching import encode
from faststeer.intervention import Add
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the layers to choose from, in shares of the model's depth
CHOOSING = 8  # questions, of the validation split
MAX_NEW_TOKENS = 32
MAX_BATCH = 64
COHERENT = 0.9  # share of answers without loops that a layer must leave at both signs, to be chosen


@dataclass
class AnsweredQuestions:
    """Questions, each answered under its plan: texts, and VADER's compound score of each, -1 to 1."""

    questions: Sequence[Any]
    plans: Sequence[Plan | None]
    texts: Sequence[str] = ()
    scores: Sequence[float] = ()

    @property
    def coherent(self) -> float:
        return sum(map(no_loop, self.texts)) / len(self.texts)


def measure(
    model: Any,
    tokenizer: Any,
    out: Path,
    seed: int,
    step: Callable[[str], None],
    *,
    questions: int = 64,
    choosing: int = CHOOSING,
) -> dict[str, Any]:
    """Find the tone vector, choose its layer, measure every coefficient; return the figures.

    Args:
        out: folder for tone.safetensors, tone_dose_response.png and tone_layers.png.
        seed: of the random control vectors.
        step: called with what is done next.
        questions: held-out questions per coefficient, at most.
        choosing: validation questions per layer and sign.

    Raises:
        ValueError: the judge's package vaderSentiment is not installed.
    """
    behaviour = behaviours.load("tone")
    judge = make("sentiment")
    step("Finding the tone vector")
    sides = behaviour.train.positive, behaviour.train.negative
    candidates = extract.candidates(model, tokenizer, *sides, positions=(-1,))
    vectors = candidates.vector(-1)
    asked, held_out = behaviour.validation.induce[:choosing], behaviour.test.induce[:questions]
    depth = model.config.num_hidden_layers
    layers = sorted({round(share * depth) for share in DEPTHS} & set(vectors.layers))

    step(f"Choosing among {len(layers)} layers")
    grid = {
        (layer, sign): AnsweredQuestions(asked, [_plan(vectors, layer, sign)] * len(asked))
        for layer in layers
        for sign in (-1.0, 1.0)
    }
    unsteered = AnsweredQuestions(asked, [None] * len(asked))
    answer(model, tokenizer, [unsteered, *grid.values()], judge)
    points = [_layer(layer, grid[layer, -1.0], grid[layer, 1.0]) for layer in layers]
    layer = choose(points)

    step(f"Measuring {len(COEFFICIENTS)} coefficients, and random vectors")
    vector = candidates.vector(-1, layer)
    # One random vector has effects of its own, so that each question gets another.
    controls = [extract.random_like(vector, seed + number) for number in range(len(held_out))]
    steered = {c: AnsweredQuestions(held_out, [_plan(vector, layer, c)] * len(held_out)) for c in COEFFICIENTS}
    random = {
        c: AnsweredQuestions(held_out, [_plan(control, layer, c) for control in controls]) for c in COEFFICIENTS if c
    }
    answer(model, tokenizer, [*steered.values(), *random.values()], judge)
    random[0.0] = steered[0.0]
    perplexities = perplexity(model, tokenizer, list(steered.values()))
    entries = [
        _entry(c, steered[c], random[c], steered[0.0], value)
        for c, value in zip(COEFFICIENTS, perplexities, strict=True)
    ]
    before = mean_interval(unsteered.scores).mean
    result = {
        "tone": entries,
        "tone_model": vectors.model,
        "tone_layer": layer,
        "tone_layers": points,
        "tone_unsteered_choosing": before,
        "tone_rank_correlation": rank_correlation(COEFFICIENTS, [e["score"] for e in entries]),
        "tone_relative_norm": relative_norm(model, tokenizer, vector, held_out),
        "tone_examples": _examples(steered),
    }
    vector.save(out / "tone.safetensors")
    write_atomically(out / "tone_dose_response.png", plots.tone_dose_response(entries, layer))
    write_atomically(out / "tone_layers.png", plots.tone_layers(points, layer, before))
    return result


def answer(model: Any, tokenizer: Any, cells: Sequence[AnsweredQuestions], judge: Any) -> None:
    """Answer the questions of all cells as rows of the same batches, each under its own plan, and score the answers."""
    prompts = [question for cell in cells for question in cell.questions]
    plans = [plan for cell in cells for plan in cell.plans]
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": MAX_BATCH, "progress": True}
    texts = iter(complete(model, tokenizer, prompts, plans, **options))
    for cell in cells:
        cell.texts = [next(texts) for _ in cell.questions]
        cell.scores = [verdict.score for verdict in judge(cell.questions, cell.texts)]


def choose(points: Sequence[dict[str, Any]]) -> int:
    """The layer with the largest difference between the mean scores at +1 and -1, of those that leave answers coherent
    at both (of all, where none does)."""
    coherent = [point for point in points if point["coherent"] >= COHERENT] or points
    return max(coherent, key=lambda point: point["added"] - point["subtracted"])["layer"]


def perplexity(model: Any, tokenizer: Any, cells: Sequence[AnsweredQuestions]) -> list[float]:
    """Per cell, the median perplexity of its answers under the unsteered model."""
    judge = make("perplexity", model=model, tokenizer=tokenizer, batch_size=MAX_BATCH)
    verdicts = iter(judge([q for c in cells for q in c.questions], [text for c in cells for text in c.texts]))
    scores = [[next(verdicts).score for _ in cell.questions] for cell in cells]
    return [float(torch.tensor([s for s in values if s is not None]).median()) for values in scores]


@torch.no_grad()
def relative_norm(model: Any, tokenizer: Any, vector: SteeringVector, questions: Sequence[Any]) -> float:
    """The vector's norm over the mean norm of the residual stream there, at the last token of eight questions."""
    (layer,) = vector.layers
    norms = []
    for ids in encode(tokenizer, list(questions[:8])):
        states = model(
            torch.tensor([ids], device=model.device), output_hidden_states=True, use_cache=False
        ).hidden_states
        norms.append(states[layer][0, -1].float().norm().item())
    return float(vector[layer].norm()) / (sum(norms) / len(norms))


def _plan(vector: SteeringVector, layer: int, coefficient: float) -> Plan | None:
    return Plan([Add(vector, coefficient, layers=layer)]) if coefficient else None


def _layer(layer: int, subtracted: AnsweredQuestions, added: AnsweredQuestions) -> dict[str, Any]:
    return {
        "layer": layer,
        "added": mean_interval(added.scores).mean,
        "subtracted": mean_interval(subtracted.scores).mean,
        "coherent": min(added.coherent, subtracted.coherent),
        "n": len(added.questions),
    }


def _entry(
    coefficient: float,
    steered: AnsweredQuestions,
    random: AnsweredQuestions,
    unsteered: AnsweredQuestions,
    perplexity: float,
) -> dict[str, Any]:
    score, change = mean_interval(steered.scores), paired_bootstrap(steered.scores, unsteered.scores)
    control = mean_interval(random.scores)
    return {
        "coefficient": coefficient,
        **{"score": score.mean, "low": score.low, "high": score.high, "n": score.n},
        **{"random_score": control.mean, "random_low": control.low, "random_high": control.high},
        **{"change": change.mean, "change_low": change.low, "change_high": change.high},
        "perplexity": perplexity,
        "coherent": steered.coherent,
    }


def _examples(steered: dict[float, AnsweredQuestions]) -> list[dict[str, str]]:
    """The first two questions, with their answers at -1, 0 and 1."""
    return [
        {
            "prompt": str(steered[0.0].questions[number]),
            "subtracted": steered[-1.0].texts[number],
            "unsteered": steered[0.0].texts[number],
            "added": steered[1.0].texts[number],
        }
        for number in range(min(2, len(steered[0.0].questions)))
    ]
