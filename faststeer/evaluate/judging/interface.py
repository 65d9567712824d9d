"""What a judge is, and what it says.

Nothing here reads an answer; that is what the judges are for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from faststeer.evaluate.statistics import Rate
from faststeer.hf.batching import Prompt
from faststeer.plan import Plan

Prompts = Sequence[Prompt]
AnswerPlans = Sequence[Plan | None] | None  # under which plan each answer was given; None: not told


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Args:
        label: one of the judge's words ("refusal", "unsafe", "yes", ...); None where it has none, or none was read.
        score: how much the answer shows what the judge looks for; its range is the judge's. None: a parse failure.
        parts: scores it is made of, by name.
        raw: what a judging model wrote, where one did.
    """

    label: str | None
    score: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    raw: str | None = None

    def __post_init__(self) -> None:
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(
                f"a verdict's score is {self.score}: expected a finite number, or None for a parse failure"
            )

    @property
    def failed(self) -> bool:
        """Whether the judge's answer could not be read."""
        return self.score is None


class Judge(Protocol):
    """A judge: called with prompts and completions of the same number, it returns a verdict for each, in order.

    Attributes:
        name: short, for tables.
        shows: the smallest score that counts as showing the behaviour; None for a measure that has no such line.
        identity: everything that its verdicts depend on, as text: verdicts of judges that differ in it are never mixed.

    Beside these a judge may have (`BaseJudge` does)

        opposes: the largest score that counts as showing the opposite; None, or no such attribute: every answer that
            was read and does not show the behaviour shows its opposite.
        reads_prompts: whether it looks at the prompts; without the attribute it does.
    """

    @property
    def name(self) -> str: ...

    @property
    def shows(self) -> float | None: ...

    @property
    def identity(self) -> str: ...

    def __call__(self, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> list[Verdict]: ...


class BaseJudge:
    """What judges of words have unless they say otherwise. Most read each answer by itself, in `verdict`."""

    name: str = ""
    identity: str = ""
    shows: float | None = None
    opposes: float | None = None
    reads_prompts: bool = False

    def __call__(self, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> list[Verdict]:
        return [self.verdict(text) for text in completions]

    def verdict(self, text: str) -> Verdict:
        """What the judge says of one answer."""
        raise NotImplementedError


class Verdicts(Sequence[Verdict]):
    """Verdicts of one judge on several answers, and what they come to."""

    def __init__(self, verdicts: Sequence[Verdict], shows: float | None) -> None:
        self._verdicts, self._shows = list(verdicts), shows

    def __len__(self) -> int:
        return len(self._verdicts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._verdicts[index]

    @property
    def scores(self) -> list[float]:
        """Scores of the answers that were judged, in order; parse failures left out."""
        return [verdict.score for verdict in self._verdicts if verdict.score is not None]

    @property
    def failures(self) -> int:
        """How many verdicts could not be read."""
        return sum(verdict.failed for verdict in self._verdicts)

    @property
    def mean(self) -> float | None:
        """Mean score; None where nothing could be read."""
        scores = self.scores
        return math.fsum(scores) / len(scores) if scores else None

    @property
    def rate(self) -> Rate | None:
        """Share of the judged answers that show the behaviour, with Wilson's interval; None for a judge that draws no
        line, or where nothing could be read."""
        scores, line = self.scores, self._shows
        return Rate(sum(score >= line for score in scores), len(scores)) if scores and line is not None else None

    @property
    def labels(self) -> dict[str, int]:
        """How often each label was given, most frequent first."""
        counts = Counter(verdict.label for verdict in self._verdicts if verdict.label is not None)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self) -> dict[str, object]:
        """Return what they come to, ready for JSON."""
        rate = self.rate
        return {
            "n": len(self),
            "failures": self.failures,
            "mean": self.mean,
            "rate": rate and rate.to_dict(),
            "labels": self.labels,
        }


def judged(judge: Judge, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> Verdicts:
    """Ask a judge about answers.

    Args:
        plans: under which plan each answer was given; only a judge that looks at the model itself needs it.

    Raises:
        ValueError: no answers, another number of prompts than of completions (or plans); a judge that returns another
            number of verdicts.
        TypeError: a completion that is no text.
    """
    if isinstance(completions, str) or not len(completions) or len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: expected the same number, not 0")
    if plans is not None and len(plans) != len(prompts):
        raise ValueError(f"{len(plans)} plans for {len(prompts)} prompts: expected one (or None) for each")
    for index, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise TypeError(f"completions[{index}] is a {type(completion).__name__}: expected a text")
    verdicts = judge(prompts, completions, plans)
    if len(verdicts) != len(prompts):
        raise ValueError(f"the judge {judge.name!r} gave {len(verdicts)} verdicts on {len(prompts)} answers")
    return Verdicts(verdicts, judge.shows)


def last_user_text(prompt: Prompt) -> str:
    """What was asked: a text, or a chat's last message by the user."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])


def check_line(judge: Judge) -> Judge:
    """The judge, if it says of an answer whether it shows something, else ValueError."""
    if judge.shows is None:
        raise ValueError(
            f"the judge {judge.name!r} measures answers and draws no line above which one shows a behaviour: name "
            "another judge"
        )
    return judge


def signs(judge: Judge, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> list[int]:
    """1 for each answer that shows the behaviour (score >= `judge.shows`), -1 for each that shows its opposite
    (`judge.opposes`), 0 for neither, which is also what could not be read.

    Raises:
        ValueError: a judge that draws no line; what `judged` refuses.
    """
    line, other = check_line(judge).shows, getattr(judge, "opposes", None)
    assert line is not None

    def sign(score: float | None) -> int:
        if score is None:
            return 0
        return 1 if score >= line else -1 if other is None or score <= other else 0

    return [sign(verdict.score) for verdict in judged(judge, prompts, completions, plans)]
