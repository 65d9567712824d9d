"""Judges by the demo model's grammar, and its prompts for sweeps: known by name once `faststeer.demo` is imported."""

from __future__ import annotations

from faststeer.demo.corpus import classify, neutral_questions, prompts, tone
from faststeer.evaluate.judging import Function, register
from faststeer.evaluate.sweep.description import NAMED_PROMPTS


def verdict(text: str) -> str:
    """What kind of answer of the grammar a text is, or "incoherent"."""
    return classify(text) or "incoherent"


def whole(text: str) -> bool:
    """Whether an answer is a whole one of the grammar."""
    return classify(text) is not None


def voice(text: str) -> int:
    """1 for a cheerful and -1 for a gloomy answer of the grammar, 0 for anything else."""
    return {"cheerful": 1, "gloomy": -1}.get(tone(text) or "", 0)


register("demo-tone", lambda: Function(voice, name="demo-tone", opposes=-1.0))
register("demo", lambda: Function(verdict, name="demo", labels=("refusal",)))
register("demo-coherent", lambda: Function(whole, name="demo-coherent"))
NAMED_PROMPTS["harmful"] = lambda: prompts("refusal", "test")[0]
NAMED_PROMPTS["harmless"] = lambda: prompts("refusal", "test")[1]
NAMED_PROMPTS["questions"] = lambda: neutral_questions("test")
