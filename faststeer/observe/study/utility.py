"""What steering costs on text that has nothing to do with the behaviour, and whether it comes back when part of the
steering is withheld: next-token loss on neutral texts, and questions of common knowledge by the likelihood of their
answers. One suspect is attention that looks elsewhere under steering (arXiv 2605.06342); with its patterns frozen it
cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from faststeer.evaluate.likelihood import ContinuationRow, score_rows
from faststeer.evaluate.multiple_choice import Accuracy, load_questions, multiple_choice
from faststeer.evaluate.side_effects import text_ids
from faststeer.evaluate.statistics import Rate, mean_interval, paired_bootstrap
from faststeer.hf.batching import padding_id
from faststeer.observe.study.answers import CONTEXTS
from faststeer.observe.study.job import SIDES, Job
from faststeer.vector import SteeringVector

DATA = files("faststeer.evaluate") / "data"


class Utility:
    """Losses and right answers under every vector in every context, one part each."""

    def __init__(self, job: Job) -> None:
        self.job, n = job, job.settings.n_utility
        self.texts = (DATA / "neutral.txt").read_text(encoding="utf-8").splitlines()[:n]
        self.questions = load_questions(str(DATA / "knowledge.jsonl"))[:n]

    def table(
        self, vectors: Mapping[str, SteeringVector], control: SteeringVector, skipped: Collection[str]
    ) -> list[dict[str, Any]]:
        """Rows of (vector, context, side): `loss`, the mean over texts of -log P(next token) in nats, and `right`, the
        share of questions whose likeliest answer is the right one, with intervals; `loss_change`, `right_change`: mean
        differences to the steered model on the same texts and questions. `skipped`: the contexts that the architecture
        does not allow (`StudyAnswers` says why)."""
        base = self._of_sides("none", "unsteered", None)
        rows = self._rows("none", "unsteered", base, {})
        rows += self._rows("random", "steered", self._of_sides("random", "steered", control), {})
        for name, vector in vectors.items():
            steered = self._of_sides(name, "steered", vector)
            rows += self._rows(name, "unsteered", base, steered)
            for context in CONTEXTS:
                if context not in skipped:
                    rows += self._rows(name, context, self._of_sides(name, context, vector), steered)
        return rows

    def _rows(self, name: str, context: str, sides: Any, steered: Any) -> list[dict[str, Any]]:
        rows, seed = [], self.job.settings.seed
        for side in SIDES:
            losses, right = sides[side]
            row: dict[str, Any] = {
                "vector": name,
                "context": context,
                "side": side,
                "loss": mean_interval(losses, seed=seed).to_dict(),
                "right": Rate(sum(right), len(right)).to_dict(),
            }
            compared = bool(steered) and context != "steered"
            for key, number in (("loss_change", 0), ("right_change", 1)):
                change = paired_bootstrap(sides[side][number], steered[side][number], seed=seed) if compared else None
                row[key] = None if change is None else change.to_dict()
            rows.append(row)
        return rows

    def _of_sides(self, name: str, context: str, vector: SteeringVector | None) -> dict[str, Any]:
        """By side: (the loss of every text, whether every question is answered rightly)."""
        depends = [vector, context, self.job.settings.coefficient, self.texts, [repr(q) for q in self.questions]]
        return self.job.parts.json(f"utility-{name}-{context}", depends, lambda: self._measure(context, vector))

    def _measure(self, context: str, vector: SteeringVector | None) -> dict[str, Any]:
        sides: dict[str, Any] = {}
        for side in SIDES:
            if vector is None and sides:  # the unsteered model has no sides
                sides[side] = next(iter(sides.values()))
                continue
            plan = None if vector is None else self.job.plan(vector, side)
            options: dict[str, Any] = {**self.job.passing, "within": CONTEXTS.get(context, CONTEXTS["steered"])}
            rows = [ContinuationRow(ids[:1], ids[1:], plan) for ids in text_ids(self.job.tokenizer, self.texts)]
            scored = score_rows(self.job.model, rows, pad_id=padding_id(self.job.tokenizer), **options)
            answers = multiple_choice(self.job.model, self.job.tokenizer, self.questions, plan, **options)
            assert isinstance(answers, Accuracy)  # of one plan
            right = [choice.chosen == q.answer for choice, q in zip(answers.choices, self.questions, strict=True)]
            sides[side] = [-float(one.log_probabilities.mean()) for one in scored], right
        return sides
