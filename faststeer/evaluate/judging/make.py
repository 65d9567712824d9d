"""Judges by a short text or a mapping, as the command line and sweeps name them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from faststeer.evaluate.judging.formats import FORMATS, read_format
from faststeer.evaluate.judging.interface import Judge, demo_hint
from faststeer.evaluate.judging.measures import Length, Perplexity, Repetition
from faststeer.evaluate.judging.models import Classifier, LanguageModelJudge, RefusalScore
from faststeer.evaluate.judging.words import Function, Pattern, Refusal, Sentiment

OPTIONS: dict[str, set[str]] = {
    "refusal": {"phrases"},
    "refusal-score": {"token_ids"},
    "sentiment": {"labels"},
    "classifier": {"labels", "with_prompt", "shows"},
    **{name: {"template", "concept", "system"} for name in FORMATS},
    "regex": set(),
    "python": {"shows", "labels"},
    "perplexity": set(),
    "repetition": {"n"},
    "length": set(),
}
NEEDS_MODEL = ("classifier", *FORMATS)
OF_THE_MODEL = ("refusal-score", "perplexity")
# Judges that need no model and nothing after a colon, by kind.
SIMPLE: dict[str, Any] = {"refusal": Refusal, "sentiment": Sentiment, "length": Length, "repetition": Repetition}


def register(kind: str, made: Callable[[], Judge]) -> None:
    """Let `make` know a kind of judge that needs no model and has no options: `made()` returns it."""
    OPTIONS[kind], SIMPLE[kind] = set(), made


def judge_names() -> list[str]:
    """The kinds of judges there are."""
    return list(OPTIONS)


def make(
    what: str | Mapping[str, Any],
    *,
    model: Any = None,
    tokenizer: Any = None,
    system: str | None = None,
    batch_size: int = 32,
) -> Judge:
    """Return the judge that a text names, or a mapping with the same under "judge" and its options beside it.

    | text | judge |
    |---|---|
    | `refusal`, `length`, `repetition` | of words |
    | `refusal-score`, `perplexity` | of the steered model, which `model` and `tokenizer` are |
    | `sentiment` | VADER; `sentiment:NAME` a text classification model by name or folder |
    | `classifier:NAME` | a text classification model |
    | `llamaguard:NAME`, `harmbench:NAME`, `strongreject:NAME`, `axbench:NAME` | a language model |
    | `regex:PATTERN`, `python:MODULE:FUNCTION` | |
    | `demo`, `demo-coherent` | refusal and coherence by the demo model's grammar, once `faststeer.demo` is imported |

    Raises:
        ValueError: an unknown judge or option, something missing, nothing to be loaded.
    """
    given = {"judge": what} if isinstance(what, str) else dict(what)
    text = given.pop("judge", None)
    if not isinstance(text, str):
        raise ValueError(f'a judge is {what!r}: expected a text such as "refusal", or an object with "judge"')
    kind, _, rest = text.partition(":")
    _check(kind, rest, given)
    if kind in OF_THE_MODEL:
        if model is None or tokenizer is None:
            raise ValueError(f"the judge {kind!r} looks at the steered model: give model= and tokenizer=")
        cls: Any = {"refusal-score": RefusalScore, "perplexity": Perplexity}[kind]
        return cls(model, tokenizer, system=system, batch_size=batch_size, **given)
    if kind in FORMATS:
        form = read_format(kind, given.pop("template", None))
        return LanguageModelJudge(rest, form=form, name=kind, batch_size=batch_size, **given)
    if kind == "classifier" or (kind == "sentiment" and rest):
        return Classifier(rest, name=kind, batch_size=batch_size, **given)
    if kind == "regex":
        return Pattern(rest)
    if kind == "python":
        return Function.load(rest, **given)
    return SIMPLE[kind](**given)


def _check(kind: str, rest: str, options: Mapping[str, Any]) -> None:
    if kind not in OPTIONS:
        near = difflib.get_close_matches(kind, OPTIONS, 1)
        hint = f"did you mean {near[0]!r}? There are" if near else "expected one of"
        raise ValueError(f"unknown judge {kind!r}: {hint} {', '.join(OPTIONS)}{demo_hint(kind)}")
    if kind in (*NEEDS_MODEL, "regex", "python") and not rest:
        what = "a regular expression" if kind == "regex" else "MODULE:FUNCTION" if kind == "python" else "a model"
        raise ValueError(f"the judge {kind!r} needs {what}: write {kind}:...")
    if rest and kind not in (*NEEDS_MODEL, "regex", "python", "sentiment"):
        raise ValueError(f"the judge {kind!r} takes nothing after a colon, got {rest!r}")
    if unknown := set(options) - OPTIONS[kind]:
        raise ValueError(
            f"the judge {kind!r} has no option {', '.join(map(repr, sorted(unknown)))}: it has "
            f"{', '.join(sorted(OPTIONS[kind])) or 'none'}"
        )
