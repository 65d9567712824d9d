"""What is searched, and how a budget of answers is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Goal = Literal["more", "less"]
METHODS = ("dim", "pca", "lat", "probe")
# The strengths that are tried, by op: lengths of the difference in means that are added; the share of the projection
# that is removed at every layer (2 reflects); where the projection is held, 0 at one side's mean and 1 at the other's.
STRENGTHS = {"add": (0.25, 3.0), "ablate": (0.25, 2.0), "clamp": (0.25, 3.0)}
TESTED = 32  # test prompts, at most


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and for how much.

    Args:
        answers: the budget: answers that are generated at most, everything included.
        goal: "more": vectors are added, and the projection is kept from falling below its place; "less": subtracted,
            and kept from rising above.
        methods: some of "dim", "pca", "lat", "probe". ops: some of "add", "ablate", "clamp".
        layers, positions: which are tried (all; the tokens after the instruction).
        max_kl: nats per token of neutral text, KL(unsteered || steered), that a setting may cost.
        max_perplexity: how many times the unsteered answers' perplexity a setting's answers may have.
        max_repetition, max_over_refusal: how much may be added to the unsteered answers' share of repeated 4-grams, and
            to the share of them that refuses (of behaviours other than refusal itself).
        share: of the largest gain that is good enough: the cheapest such setting is chosen.
        prompts: validation prompts of a setting, the first half of which decides whether it gets the others.
        finalists: settings that are measured on more prompts.
        train: training prompts a side that vectors are found on, at most (all).
        max_new_tokens: longest answer.
        batch: rows that run together.
        seed: of the proposals.

    Raises:
        ValueError: an unknown goal, method or op, nothing to try, numbers out of range.
    """

    answers: int = 600
    goal: Goal = "more"
    methods: tuple[str, ...] = ("dim", "pca", "probe")
    ops: tuple[str, ...] = ("add", "ablate", "clamp")
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    max_kl: float = 0.5
    max_perplexity: float = 2.0
    max_repetition: float = 0.1
    max_over_refusal: float = 0.1
    share: float = 0.9
    prompts: int = 8
    finalists: int = 6
    train: int | None = None
    max_new_tokens: int = 32
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal not in ("more", "less"):
            raise ValueError(f"goal is {self.goal!r}: expected 'more' or 'less'")
        for name, known in (("methods", METHODS), ("ops", tuple(STRENGTHS))):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or (unknown := [v for v in values if v not in known]):
                said = f"unknown {unknown[0]!r}" if values and len(set(values)) == len(values) else "none, or one twice"
                raise ValueError(f"{name} are {list(values)} ({said}): expected some of {', '.join(known)}")
        for name in ("answers", "prompts", "finalists", "max_new_tokens", "batch"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a whole number, at least 1")
        if self.train is not None and self.train < 2:
            raise ValueError(f"train is {self.train}: expected at least 2 prompts a side")
        for name, low, high in (
            ("max_kl", 0.0, math.inf), ("max_perplexity", 1.0, math.inf), ("max_repetition", 0.0, 1.0),
            ("max_over_refusal", 0.0, 1.0), ("share", 0.0, 1.0),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected {low:g} to {high:g}")


@dataclass(frozen=True)
class Budget:
    """How the answers are spent.

    Args:
        prompts: validation prompts of a setting; first: of these, those that decide whether it is given up.
        confirm: more validation prompts, of each finalist. test: of the unsteered model and of the chosen setting.
        search: answers for settings that are tried.
    """

    prompts: int
    first: int
    confirm: int
    test: int
    search: int

    @classmethod
    def of(cls, settings: SearchSettings, n_validation: int, n_test: int) -> Budget:
        """A twelfth of the budget tests each of two, a quarter confirms, the rest is searched.

        Raises:
            ValueError: it is not enough for one setting.
        """
        budget = cls._of(settings, settings.answers, n_validation, n_test)
        if budget.search < budget.prompts:
            need = settings.answers
            while (more := cls._of(settings, need, n_validation, n_test)).search < more.prompts:
                need += 1
            raise ValueError(
                f"{settings.answers} answers are too few to try one setting on {budget.prompts} prompts: give at least "
                f"{need}, or fewer prompts= a setting"
            )
        return budget

    @classmethod
    def _of(cls, settings: SearchSettings, answers: int, n_validation: int, n_test: int) -> Budget:
        prompts = min(settings.prompts, n_validation)
        test = max(min(TESTED, n_test, answers // 12), 1)
        confirm = min(3 * prompts, n_validation - prompts, answers // (4 * settings.finalists))
        spent = prompts + confirm + settings.finalists * confirm + 2 * test
        return cls(prompts, max(prompts // 2, 1), confirm, test, answers - spent)
