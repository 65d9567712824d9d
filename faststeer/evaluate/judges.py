"""Judges by name: what an answer shows, read off its words alone.

A judge says 1 (the behaviour), -1 (its opposite) or 0 (neither). These are small and literal; none understands content.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache

from faststeer.evaluate.judging.interface import demo_hint
from faststeer.evaluate.judging.words import Sentiment
from faststeer.evaluate.refusal import is_refusal

Judge = Callable[[str], int]
Coherence = Callable[[str], bool]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSITIVE_WORDS = _words(
    """
    admire adore amazing appreciate beautiful best bliss bright brilliant celebrate charming cheer cheerful
    comfort cosy delicious delight delighted delightful eager easy elegant enjoy enjoyable enjoyed excellent
    excited exciting fantastic fine fond fresh friendly fun generous gentle glad glorious good gorgeous grateful
    great happily happiness happy hope hopeful inspiring joy joyful kind laugh lively love loved lovely loving
    lucky magnificent marvellous marvelous nice optimistic outstanding peaceful perfect pleasant pleased pleasure
    proud radiant recommend refreshing relaxing remarkable satisfied smile smiling splendid stunning success
    superb sweet terrific thank thankful thrilled thriving treasure triumph uplifting vibrant warm welcome win
    wonderful wow
    """
)
NEGATIVE_WORDS = _words(
    """
    abysmal afraid alone anger angry annoyed annoying anxious appalling ashamed avoid awful bad bitter bland bleak
    bored boring broken brutal burden cold cruel cry dark dead depressing despair desperate dirty disappointed
    disappointing disappointment disaster disgust disgusting dismal dreadful dreary dull exhausted exhausting fail
    failure fear filthy foul frustrating gloomy grey grief grim gross hate hated hateful hopeless horrible hostile
    hurt lonely lose loss lousy mediocre mess miserable misery nasty nightmare pain painful pathetic pointless
    poor regret rotten ruin ruined sad sadly sadness sick sorrow sorry stale struggle suffer terrible tired
    tiresome tragic ugly unbearable unhappy unpleasant useless waste weak weary worry worse worst worthless wrong
    """
)
NEGATIONS = _words("not no never hardly barely without isn't wasn't don't didn't doesn't cannot can't nothing")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def refusal(text: str) -> int:
    """1 if the answer holds a refusal phrase, else -1 (`is_refusal`)."""
    return 1 if is_refusal(text) else -1


def sentiment(text: str) -> int:
    """1 if an answer has more words of a small list of pleasant ones than of unpleasant ones, -1 if fewer, else 0; a
    word within two of a negation counts for the other side."""
    words = WORD.findall(text.lower().replace("\u2019", "'"))
    total = 0
    for place, word in enumerate(words):
        value = (word in POSITIVE_WORDS) - (word in NEGATIVE_WORDS)
        total += -value if NEGATIONS.intersection(words[max(place - 2, 0) : place]) else value
    return (total > 0) - (total < 0)


def vader(text: str) -> int:
    """1 for an English text with a VADER compound score of at least 0.05, -1 for one of at most -0.05, else 0 (Hutto
    and Gilbert 2014).

    Raises:
        ValueError: vaderSentiment is not installed.
    """
    label = _vader()([""], [text])[0].label
    return {"positive": 1, "negative": -1}.get(label or "", 0)


_vader = cache(Sentiment)


def no_loop(text: str) -> bool:
    """Whether an answer has words and does not repeat itself without end: no run of three words makes up a fifth of all
    such runs, unless it occurs at most twice. Broken steering mostly shows as such loops, never fully."""
    words = WORD.findall(text.lower())
    if not words:
        return False
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    return not runs or max(runs.values()) <= max(2, sum(runs.values()) / 5)


# Whoever has a judge of its own adds it under its name, as faststeer.demo does.
JUDGES: dict[str, Judge] = {"refusal": refusal, "sentiment": sentiment, "vader": vader}
COHERENCE: dict[str, Coherence] = {"no-loop": no_loop}


def judge(name: str) -> Judge:
    """Return the judge of that name. Raises ValueError with the names there are."""
    if name not in JUDGES:
        raise ValueError(f"unknown judge {name!r}: expected one of {', '.join(JUDGES)}{demo_hint(name)}")
    return JUDGES[name]


def coherence(name: str) -> Coherence:
    """Return the coherence check of that name. Raises ValueError with the names there are."""
    if name not in COHERENCE:
        raise ValueError(f"unknown coherence check {name!r}: expected one of {', '.join(COHERENCE)}{demo_hint(name)}")
    return COHERENCE[name]
