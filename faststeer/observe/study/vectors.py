"""The vectors that a study compares: found by several methods before one layer, all of one length."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

from faststeer.algebra import normalise
from faststeer.extract import Pair, Recipe, TrainingDiverged, select_by_judge, steered_pairs, train
from faststeer.extract.contrast import Contrast, contrast
from faststeer.extract.optimise import METHODS, RePS
from faststeer.observe.study.job import SIDES, Job
from faststeer.observe.study.settings import CONTRAST
from faststeer.vector import SteeringVector


class Finder:
    """Finds a behaviour's vectors; what is already among the parts is read."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.behaviour, self.parts = job, job.settings, job.behaviour, job.parts

    def find(self) -> tuple[dict[str, SteeringVector], dict[str, str]]:
        """The vectors by method, and why a method has none.

        Raises:
            ValueError: what extraction refuses; a layer or position without a direction.
        """
        vectors, skipped = {}, {}
        for method in self.settings.methods:
            try:
                vectors[method] = self.dim if method == "dim" else self._other(method)
            except (ValueError, TrainingDiverged) as error:
                if method == "dim":
                    raise
                skipped[method] = str(error)
        return vectors, skipped

    @cached_property
    def dim(self) -> SteeringVector:
        """The difference in means, at the layer and token asked for or chosen."""
        s, train = self.settings, self.behaviour.train
        depends = [train.positive, train.negative, self.behaviour.paired, s.layer, s.position]
        if s.layer is None or s.position is None:
            depends += [self.job.prompts("validation", side, s.n_select) for side in SIDES]
            depends += [self.behaviour.judge, self.behaviour.coherence, s.coefficient, s.max_new_tokens]
        return self.parts.record(SteeringVector, "dim", depends, self._dim)

    def _dim(self) -> SteeringVector:
        s = self.settings
        table = self._contrast.dim()
        if s.layer is not None and s.position is not None:
            return table.vector(s.position, s.layer)
        return select_by_judge(
            self.job.model,
            self.job.tokenizer,
            table,
            self.behaviour.judge,
            *(self.job.prompts("validation", side, s.n_select) for side in SIDES),
            coherent=self.behaviour.coherence,
            coefficients=[s.coefficient],
            layers=None if s.layer is None else [s.layer],
            max_new_tokens=s.max_new_tokens,
            **self.job.passing,
        ).vector

    @cached_property
    def _contrast(self) -> Contrast:
        train, s = self.behaviour.train, self.settings
        return contrast(
            self.job.model,
            self.job.tokenizer,
            train.positive,
            train.negative,
            at="resid_pre",
            positions=None if s.position is None else [s.position],
            paired=self.behaviour.paired,
            keep=any(method in CONTRAST[1:] for method in s.methods),
            **self.job.passing,
        )

    def _other(self, method: str) -> SteeringVector:
        depends: list[Any] = [self.dim, self.behaviour.train.positive, self.behaviour.train.negative]
        if method in METHODS:
            depends += [self.pairs, self.settings.steps, self.settings.seed]
        norm = float(self.dim[self.dim.layers[0]].double().norm())  # of one length, as the source compares methods
        return self.parts.record(
            SteeringVector, method, depends, lambda: normalise(self._vector(method, depends), norm)
        )

    def _vector(self, method: str, depends: Any) -> SteeringVector:
        (layer,) = self.dim.layers
        if method in CONTRAST:
            return getattr(self._contrast, method)().vector(self.dim.provenance["position"], layer)
        return train(
            self.job.model,
            self.job.tokenizer,
            [Pair(**pair) for pair in self.pairs],
            RePS(suppression="subtract") if method == "reps" else METHODS[method](),
            Recipe(layer, at="resid_pre", steps=self.settings.steps, seed=self.settings.seed),
            checkpoint=self.parts.path(f"{method}-training", depends, ".checkpoint"),
            progress=self.job.progress,
        ).vector

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Completions to train on: the behaviour's, else what the difference in means makes the model say."""
        train, s = self.behaviour.train, self.settings
        if train.pairs:
            return list(map(asdict, train.pairs))
        depends = [self.dim, train.induce, train.suppress, s.coefficient, self.behaviour.judge]
        return self.parts.json("pairs", depends, lambda: list(map(asdict, self._steered_pairs())))

    def _steered_pairs(self) -> list[Pair]:
        train = self.behaviour.train
        return steered_pairs(
            self.job.model,
            self.job.tokenizer,
            self.dim,
            train.induce,
            train.suppress,
            coefficient=self.settings.coefficient,
            judge=self.behaviour.judge,
            coherence=self.behaviour.coherence,
            **self.job.passing,
        )
