"""Settings are answered under and measured, many of them as rows of the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faststeer.behaviours.job import BehaviourJob
from faststeer.behaviours.search.record import digest
from faststeer.behaviours.search.settings import Budget, SearchSettings
from faststeer.evaluate.generate import generator
from faststeer.evaluate.judging import make, signs
from faststeer.evaluate.refusal import is_refusal
from faststeer.evaluate.side_effects import NEUTRAL_TEXT, text_effects
from faststeer.evaluate.statistics import paired_bootstrap
from faststeer.generator import SamplingParams
from faststeer.hf.batching import Prompt, encode
from faststeer.plan import Plan


@dataclass
class Bench(BehaviourJob):
    """Answers and measures settings."""

    settings: SearchSettings
    budget: Budget
    advance: Callable[[], None] = field(init=False, default=lambda: None)

    def __post_init__(self) -> None:
        side = "induce" if self.settings.goal == "more" else "suppress"
        self.validation = self.prompts("validation", side)
        self.test = self.prompts("test", side, self.budget.test)
        self._perplexity = make("perplexity", model=self.model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        self._repetition = make("repetition")
        asked = [*self.validation, *self.test]
        self._ids = {repr(p): ids for p, ids in zip(asked, encode(self.tokenizer, asked), strict=True)}
        longest = max(map(len, self._ids.values())) + self.settings.max_new_tokens
        self._generator = generator(self.model, self.tokenizer, max_batch=self.batch_size, max_length=longest)

    def answer(self, work: Sequence[tuple[Sequence[Prompt], Plan | None]]) -> list[list[tuple[str, bool]]]:
        """Answers to lists of prompts, each under its own plan, in mixed batches: texts, and whether each is whole."""
        prompts = [self._ids[repr(prompt)] for listed, _ in work for prompt in listed]
        if not prompts:
            return [[] for _ in work]
        plans = [plan for listed, plan in work for _ in listed]
        told: dict[int, tuple[str, bool]] = {}
        sampling = SamplingParams(self.settings.max_new_tokens)
        for completion in self._generator.complete(prompts, plans, sampling):
            told[completion.index] = completion.text, completion.error is None
            self.advance()
        ordered = iter([told[index] for index in range(len(prompts))])
        return [[next(ordered) for _ in listed] for listed, _ in work]

    def measure(self, prompts: Sequence[Prompt], answers: Sequence[tuple[str, bool]]) -> dict[str, list[Any]]:
        """What answers come to, one number each: "scores", the judge's in the goal's direction, -1 to 1, -1 for one
        that is not coherent; "log_perplexities", None for an empty one; "repetitions"; "refused", left out where
        refusing is the behaviour."""
        texts = [text for text, _ in answers]
        if not texts:
            return {}
        sign = 1.0 if self.settings.goal == "more" else -1.0
        assert self.reader.coherence is not None
        sound = signs(self.reader.coherence, prompts, texts)
        scores = [
            sign * score if whole and coherent == 1 else -1.0
            for score, coherent, (_, whole) in zip(self._scores(prompts, texts), sound, answers, strict=True)
        ]
        perplexities = [verdict.score for verdict in self._perplexity(prompts, texts)]
        refuses = self.behaviour.judge.partition(":")[0] == "refusal"
        refused = {} if refuses else {"refused": [is_refusal(text, "phrases") for text in texts]}
        return refused | {
            "scores": scores,
            "log_perplexities": [None if p is None else math.log(max(p, 1.0)) for p in perplexities],
            "repetitions": [verdict.score for verdict in self._repetition(prompts, texts)],
        }

    def _scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """A judge's scores, -1..1, where its scale has two ends: the share of cheerful answers hardly rises where most
        are. Else 1 for an answer that shows the behaviour, -1 for one that does not."""
        if getattr(self.reader.judge, "opposes", None) is None:
            return [float(sign) for sign in signs(self.reader.judge, prompts, texts)]
        return [min(max(verdict.score or 0.0, -1.0), 1.0) for verdict in self.reader.judge(prompts, texts)]

    def unsteered(self) -> dict[str, Any]:
        """The same of the unsteered model, on all validation prompts that are used."""
        prompts = self.validation[: self.budget.prompts + self.budget.confirm]
        (answers,) = self.answer([(prompts, None)])
        return self.measure(prompts, answers)

    def round(
        self, settings: Sequence[dict[str, Any]], plans: Sequence[Plan | None], base: Mapping[str, Any],
        before: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Measure a round of settings, all in the same batches; give up what is too dear, weak or beaten."""
        trials: list[dict[str, Any]] = [
            {"setting": dict(setting), "pruned": None if plan else "there is no direction", "kl": None}
            for setting, plan in zip(settings, plans, strict=True)
        ]
        tried = [plan for i in self._going(trials) if (plan := plans[i]) is not None]
        for i, effect in zip(self._going(trials), self._kl(tried), strict=True):
            trials[i]["kl"] = effect if math.isfinite(effect) else None
            if not effect <= self.settings.max_kl:
                trials[i]["pruned"] = f"the KL is above {self.settings.max_kl:g}"
        first, budget = self.budget.first, self.budget
        self._answered(trials, plans, self.validation[:first])
        for i in self._going(trials):
            gain = self._gain(trials[i], base, first)
            beaten = any(
                other["kl"] <= trials[i]["kl"] and self._gain(other, base, first) >= gain
                for other in before
                if other["pruned"] is None
            )
            if gain <= 0 or beaten:
                trials[i]["pruned"] = "it gains nothing" if gain <= 0 else "one that costs less KL does as much"
        going = self._going(trials)
        self._answered(trials, plans, self.validation[first : budget.prompts])
        for i in going:
            if not any(value is not None for value in trials[i]["log_perplexities"]):
                trials[i]["pruned"] = "its answers are empty"
        return trials

    def _kl(self, plans: Sequence[Plan]) -> list[float]:
        """Nats per token of neutral text, from unsteered to each plan."""
        if not plans:
            return []
        effects = text_effects(self.model, self.tokenizer, plans, NEUTRAL_TEXT, batch_size=self.batch_size)
        return [float(effect.to_dict()["kl"]) for effect in effects]

    @staticmethod
    def _going(trials: Sequence[Mapping[str, Any]]) -> list[int]:
        return [i for i, trial in enumerate(trials) if trial["pruned"] is None]

    @staticmethod
    def _gain(trial: Mapping[str, Any], base: Mapping[str, Any], n: int) -> float:
        return math.fsum(trial["scores"][:n]) / n - math.fsum(base["scores"][:n]) / n

    def _answered(self, trials: list[dict[str, Any]], plans: Sequence[Plan | None], prompts: Sequence[Prompt]) -> None:
        """Add what the answers to more prompts come to, to trials that are not given up."""
        going = self._going(trials)
        for i, answers in zip(going, self.answer([(prompts, plans[i]) for i in going]), strict=True):
            for name, values in self.measure(prompts, answers).items():
                trials[i][name] = [*trials[i].get(name, []), *values]

    def tested(self, plan: Plan) -> dict[str, Any]:
        """The chosen setting beside the unsteered model, on the test prompts."""
        plain, steered = self.answer([(self.test, None), (self.test, plan)])
        measured = {"unsteered": self.measure(self.test, plain), "steered": self.measure(self.test, steered)}
        change = paired_bootstrap(measured["steered"]["scores"], measured["unsteered"]["scores"])
        (kl,) = self._kl([plan])
        both = [text for text, _ in (*plain, *steered)]
        examples = [
            {"prompt": str(prompt), "unsteered": a, "steered": b}
            for prompt, (a, _), (b, _) in zip(self.test[:4], plain, steered, strict=False)
        ]
        return measured | {
            "gain": change.to_dict(),
            "kl": kl,
            "answers_sha256": digest(both),
            "examples": examples,
        }
