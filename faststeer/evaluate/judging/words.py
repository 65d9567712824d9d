"""Judges that read words: refusal by phrases, a regular expression, sentiment, loops, a Python function.

Refusal and sentiment know English alone: a refusal in another language is a known miss.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from faststeer.evaluate.judging.interface import AnswerPlans, BaseJudge, Prompts, Verdict
from faststeer.evaluate.refusal import APOSTROPHES, PHRASES, is_refusal

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Refusal(BaseJudge):
    """Refusal by words: label "refusal" (score 1) or "answer" (score 0).

    Args:
        phrases: what counts, instead of the English phrases that the variant knows.
        variant: "phrases" or "substrings", see `evaluate.is_refusal`.

    Raises:
        ValueError: another variant; no phrases, or a blank one.
    """

    shows = 1.0

    def __init__(self, phrases: Sequence[str] | None = None, *, variant: Any = "phrases") -> None:
        is_refusal("", variant)
        if phrases is not None and (
            isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases)
        ):
            raise ValueError(f"phrases is {phrases!r}: expected a list of phrases that are not blank")
        self.variant, self.phrases = variant, tuple(phrases or PHRASES[variant])
        self.name = "refusal" if variant == "phrases" else f"refusal:{variant}"
        self.identity = f"{self.name}/1 {self.phrases!r}"

    def verdict(self, text: str) -> Verdict:
        return _yes_no(is_refusal(text, self.variant, self.phrases), "refusal", "answer")


def _yes_no(shown: bool, yes: str, no: str) -> Verdict:
    return Verdict(yes if shown else no, float(shown))


class Pattern(BaseJudge):
    """A regular expression: label "match" (score 1) where it is found anywhere in the answer, else "none" (score 0).

    Raises:
        ValueError: not a valid regular expression of Python's `re`; with where it is wrong.
    """

    shows = 1.0

    def __init__(self, pattern: str, *, name: str | None = None) -> None:
        try:
            self._pattern = re.compile(pattern)
        except (re.error, TypeError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        self.name, self.identity = name or f"regex:{pattern}", f"regex/1 {pattern}"

    def verdict(self, text: str) -> Verdict:
        return _yes_no(self._pattern.search(text) is not None, "match", "none")


class Sentiment(BaseJudge):
    """VADER's compound score, -1 to 1, of the English text (Hutto and Gilbert 2014, package vaderSentiment).

    Label "positive" from `line`, "negative" below -`line`, else "neutral"; `line` is 0.05, its authors' choice.

    Raises:
        ValueError: vaderSentiment is not installed.
    """

    name = "sentiment"

    def __init__(self, line: float = 0.05) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ValueError(
                "the judge 'sentiment' needs the package vaderSentiment: pip install vaderSentiment, or name a text "
                "classification model (sentiment:FOLDER)"
            ) from error
        self._analyzer, self.shows, self.opposes = SentimentIntensityAnalyzer(), line, -line
        self.identity = f"vaderSentiment {version('vaderSentiment')} {line}"

    def verdict(self, text: str) -> Verdict:
        # VADER's lists have straight apostrophes: "isn’t" would not negate.
        score = self._analyzer.polarity_scores(text.translate(APOSTROPHES))["compound"]
        line = self.shows or 0.0
        return Verdict("positive" if score >= line else "negative" if score <= -line else "neutral", score)


class Function(BaseJudge):
    """A Python function of (prompt, completion), or of the completion alone, that returns a bool, a number, a label, a
    Verdict, or None where it cannot tell (a parse failure).

    Args:
        shows: the smallest number that counts as showing the behaviour; a bool is 0 or 1, a label scores 1 if it is in
            `labels`, else 0.
        opposes: the largest number that counts as showing the opposite; None: whatever does not show the behaviour.
        labels: the labels that show the behaviour.

    Raises:
        TypeError: not callable, or it returns something else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        shows: float | None = 1.0,
        opposes: float | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        if not callable(function):
            raise TypeError(f"{function!r} is no function")
        self._function, self.shows, self.opposes, self._labels = function, shows, opposes, tuple(labels)
        self.name = name or str(getattr(function, "__name__", "function"))
        self.reads_prompts = _takes_two(function)
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            source = repr(function)
        digest, line = hashlib.sha256(source.encode()).hexdigest(), "" if opposes is None else f" {opposes}"
        self.identity = f"function {self.name} {digest} {shows}{line} {self._labels!r}"

    @classmethod
    def load(cls, where: str, **options: Any) -> Function:
        """Import `module:function`. Raises ValueError where there is none; `options` as of the class."""
        module, _, function = where.partition(":")
        try:
            judge: Any = importlib.import_module(module)
            for part in function.split("."):
                judge = getattr(judge, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"no judge at python:{where}: {error}; expected python:MODULE:FUNCTION") from error
        return cls(judge, name=where, **options)

    def __call__(self, prompts: Prompts, completions: Sequence[str], plans: AnswerPlans = None) -> list[Verdict]:
        pairs = zip(prompts, completions, strict=True)
        return [self._verdict(self._function(*(pair if self.reads_prompts else pair[1:]))) for pair in pairs]

    def _verdict(self, said: Any) -> Verdict:
        if isinstance(said, Verdict):
            return said
        if said is None:
            return Verdict(None, None)
        if isinstance(said, str):
            return Verdict(said, float(said in self._labels))
        if isinstance(said, bool):
            return _yes_no(said, "yes", "no")
        if isinstance(said, int | float):
            return Verdict(None, float(said))
        raise TypeError(
            f"the judge {self.name!r} returned {said!r}: expected a bool, a number, a label, a Verdict or None"
        )


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have none
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) >= 2


@functools.cache
def _sentiment_words() -> dict[str, frozenset[str]]:
    text = (files("faststeer.evaluate") / "data" / "sentiment_words.json").read_text(encoding="utf-8")
    return {name: frozenset(words) for name, words in json.loads(text).items()}


def word_sentiment(text: str) -> int:
    """1 if an answer has more words of a small list of pleasant ones than of unpleasant ones, -1 if fewer, else 0; a
    word within two of a negation counts for the other side."""
    known = _sentiment_words()
    words = WORD.findall(text.lower().replace("\u2019", "'"))
    total = 0
    for place, word in enumerate(words):
        value = (word in known["pleasant"]) - (word in known["unpleasant"])
        total += -value if known["negations"].intersection(words[max(place - 2, 0) : place]) else value
    return (total > 0) - (total < 0)


def no_loop(text: str) -> bool:
    """Whether an answer has words and does not repeat itself without end: no run of three words makes up a fifth of all
    such runs, unless it occurs at most twice. Broken steering mostly shows as such loops, never fully."""
    words = WORD.findall(text.lower())
    if not words:
        return False
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    return not runs or max(runs.values()) <= max(2, sum(runs.values()) / 5)
