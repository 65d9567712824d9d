"""Judges: refusal by words and by first token, divergence from the unsteered model, completions, and rates."""

from faststeer.evaluate.divergence import kl_divergence, kl_on
from faststeer.evaluate.generate import complete
from faststeer.evaluate.refusal import (
    REFUSAL_PHRASES,
    is_refusal,
    refusal_rate,
    refusal_score,
    refusal_tokens,
    score_on,
)
from faststeer.evaluate.statistics import Rate

__all__ = [
    "REFUSAL_PHRASES",
    "Rate",
    "complete",
    "is_refusal",
    "kl_divergence",
    "kl_on",
    "refusal_rate",
    "refusal_score",
    "refusal_tokens",
    "score_on",
]
