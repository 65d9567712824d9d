"""What is left of a behaviour when part of the steering is withheld: answers to test prompts, read by its judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from faststeer.evaluate.statistics import Rate, paired_bootstrap
from faststeer.extract.sweep import answer
from faststeer.hf import steer
from faststeer.hf.freeze import freeze
from faststeer.observe.study.job import SIDES, Job
from faststeer.observe.svv import ablate
from faststeer.vector import SteeringVector

CONTEXTS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "steered": steer,
    "qk": partial(freeze, what="qk"),
    "ov": partial(freeze, what="ov"),
    "svv": partial(ablate, what="svv"),
    "mlp": partial(ablate, what="mlp"),
}


class StudyAnswers:
    """Answers of every vector in every context, one part each."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.settings
        self.prompts = {side: job.prompts("test", side, job.settings.n_test) for side in SIDES}

    def table(self, vectors: Mapping[str, SteeringVector], control: SteeringVector) -> dict[str, Any]:
        """Rows of (vector, context, side), and why a context could not be entered: `shown` is the share of answers with
        the behaviour ("induce") or its opposite ("suppress"), `change` the mean difference to the steered answers of
        the same prompts, with intervals."""
        rows = self._rows("none", "unsteered", None, {})
        rows += self._rows("random", "steered", control, {})
        skipped = {}
        for name, vector in vectors.items():
            steered = self._said(name, "steered", vector)
            for context in CONTEXTS:
                try:
                    rows += self._rows(name, context, vector, steered)
                except ValueError as error:  # an architecture whose attention cannot be exchanged or read
                    if context == "steered":
                        raise
                    skipped[context] = str(error)
        return {"rows": rows, "skipped": skipped}

    def _rows(self, name: str, context: str, vector: SteeringVector | None, steered: Any) -> list[dict[str, Any]]:
        said = self._said(name, context, vector)
        return [self._row(name, context, side, said[side], steered.get(side)) for side in SIDES]

    def _row(self, name: str, context: str, side: str, texts: list[str], steered: list[str] | None) -> dict[str, Any]:
        shown, sound = self._shown(side, texts), [self.job.coherent(text) for text in texts]
        change = None
        if steered is not None and context != "steered":
            change = paired_bootstrap(shown, self._shown(side, steered), seed=self.settings.seed).to_dict()
        rates = {"shown": Rate(sum(shown), len(shown)), "coherent": Rate(sum(sound), len(sound))}
        rates |= {"both": Rate(sum(a and b for a, b in zip(shown, sound, strict=True)), len(shown))}
        place = {"vector": name, "context": context, "side": side}
        return place | {key: rate.to_dict() for key, rate in rates.items()} | {"change": change, "example": texts[0]}

    def _shown(self, side: str, texts: list[str]) -> list[bool]:
        return [self.job.shown(side, text) for text in texts]

    def _said(self, name: str, context: str, vector: SteeringVector | None) -> dict[str, list[str]]:
        s = self.settings
        depends = [vector, context, s.coefficient, s.max_new_tokens, self.prompts]
        return self.job.parts.json(f"answers-{name}-{context}", depends, lambda: self._answer(context, vector))

    def _answer(self, context: str, vector: SteeringVector | None) -> dict[str, list[str]]:
        plans = {side: None if vector is None else self.job.plan(vector, side) for side in SIDES}
        texts = answer(
            self.job.model,
            self.job.tokenizer,
            [(self.prompts[side], plans[side]) for side in SIDES],
            max_new_tokens=self.settings.max_new_tokens,
            within=CONTEXTS.get(context, steer),
            **self.job.passing,
        )
        return dict(zip(SIDES, texts, strict=True))
