"""What the benchmarks on a real model share: SmolLM2-135M-Instruct, its prompts, and medians of ratios."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import faststeer as fs

MODEL = "smollm2"
LAYER = 20  # of 30; where the tone vector of this model acts best

SUBJECTS = (
    "making tea", "learning to swim", "the first day of school", "a long train ride", "growing tomatoes",
    "moving to a new town", "cleaning a kitchen", "rain in autumn", "cooking for six people", "a visit to the dentist",
    "walking a dog", "buying a used car", "writing a letter", "a quiet Sunday", "working from home", "old photographs",
)  # fmt: skip
QUESTIONS = ("Tell me about {}.", "What should I know about {}?", "How would you describe {}?", "Why does {} matter?")
TONES = ("Answer in a cheerful, delighted tone.", "Answer in a gloomy, hopeless tone.")


def load(dtype: str = "float32") -> tuple[Any, Any]:
    return fs.load(MODEL, dtype=dtype)


def prompts(count: int) -> list[str]:
    """Return `count` different questions, at most 64."""
    texts = [form.format(subject) for form, subject in itertools.product(QUESTIONS, SUBJECTS)]
    if not 1 <= count <= len(texts):
        raise ValueError(f"{count} prompts: expected 1 to {len(texts)}")
    return texts[:count]


def contrast(count: int) -> tuple[list[str], list[str]]:
    """Return `count` questions with an instruction to be cheerful, and the same with one to be gloomy."""
    cheerful, gloomy = ([f"{tone} {text}" for text in prompts(count)] for tone in TONES)
    return cheerful, gloomy


def ratios(rows: Iterable[Mapping[str, Any]], case: str, other: str, key: Sequence[str], value: str) -> list[float]:
    """Return value(case) / value(other) of every measurement `key` that has both: ratios within a repeat."""
    values: dict[str, dict[tuple[Any, ...], float]] = {case: {}, other: {}}
    for row in rows:
        if row["case"] in values:
            values[row["case"]][tuple(row[name] for name in key)] = float(row[value])
    return [values[case][at] / values[other][at] for at in values[case] if at in values[other]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (lowest to highest)"."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*numbers, d=digits)
