"""Measures of an answer as such: how long it is, how much it repeats itself, how likely the unsteered model finds it.

They have the judges' interface, and a score but no line above which something is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from faststeer.evaluate.judging.interface import AnswerPlans, BaseJudge, Prompts, Verdict
from faststeer.evaluate.likelihood import ContinuationRow, answer_ids, score_rows
from faststeer.hf.batching import encode, padding_id


def repetition(units: Sequence[Any], n: int = 4) -> float:
    """Return the share of n-grams that occurred before, 1 - distinct / all, 0 to 1; 0 for fewer than n + 1 units.

    Source: rep-n, Welleck et al. 2019 (arXiv 1908.04319).
    """
    if n < 1:
        raise ValueError(f"n is {n}: expected at least 1")
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Repetition(BaseJudge):
    """rep-n over the answer's words, split at white space: the share of n-grams that occurred before (`repetition`)."""

    name = "repetition"

    def __init__(self, n: int = 4) -> None:
        repetition([], n)
        self._n, self.identity = n, f"repetition/1 {n} words"

    def verdict(self, text: str) -> Verdict:
        return Verdict(None, repetition(text.split(), self._n))


class Length(BaseJudge):
    """Words of an answer, split at white space."""

    name, identity = "length", "length"

    def verdict(self, text: str) -> Verdict:
        return Verdict(None, float(len(text.split())))


class Perplexity(BaseJudge):
    """exp(mean negative log-probability) of the answer's tokens after its prompt, under the model without any plan.

    An empty answer has none, and neither has one that with its prompt is longer than the model has positions: those
    verdicts fail.

    Args:
        model, tokenizer: the steered ones (or another pair that is to read the answers).
    """

    name, reads_prompts = "perplexity", True

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None, batch_size: int = 32) -> None:
        self._model, self._tokenizer, self._system, self._batch_size = model, tokenizer, system, batch_size
        self.identity = f"perplexity/1 {system!r}"

    def __call__(self, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> list[Verdict]:
        contexts = encode(self._tokenizer, prompts, self._system)
        answers = [answer_ids(self._tokenizer, text) for text in completions]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        readable = [
            i for i, (c, a) in enumerate(zip(contexts, answers, strict=True)) if a and len(c) + len(a) <= positions
        ]
        verdicts = [Verdict(None, None) for _ in completions]
        rows = [ContinuationRow(contexts[i], answers[i]) for i in readable]
        scored = score_rows(self._model, rows, pad_id=padding_id(self._tokenizer), batch_size=self._batch_size)
        for i, score in zip(readable, scored, strict=True):
            verdicts[i] = Verdict(None, float((-score.log_probabilities.mean()).exp()))
        return verdicts
