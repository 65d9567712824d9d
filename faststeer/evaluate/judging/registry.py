"""The judges by name: one registry for behaviours, selections, sweeps and the command line. Whoever has a judge of
their own adds it, as `faststeer.demo` does."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from faststeer.evaluate.judging.formats import FORMATS, read_format
from faststeer.evaluate.judging.interface import Judge
from faststeer.evaluate.judging.measures import Length, Perplexity, Repetition
from faststeer.evaluate.judging.models import Classifier, LanguageModelJudge, RefusalScore
from faststeer.evaluate.judging.words import Function, Pattern, Refusal, Sentiment, no_loop, word_sentiment
from faststeer.evaluate.refusal import PHRASES


@dataclass(frozen=True)
class JudgeKind:
    """Judges of one name.

    Args:
        make: called with the name, what stands after the colon (""), the steered model's arguments and the options.
        options: that it takes.
        after: what must stand after the colon, in words; "" for nothing.
        variants: what may stand there, where it may be left out: texts, or None for anything.
    """

    make: Callable[[str, str, Mapping[str, Any], dict[str, Any]], Judge]
    options: tuple[str, ...] = ()
    after: str = ""
    variants: tuple[str, ...] | None = ()


JUDGES: dict[str, JudgeKind] = {}
# Names that older behaviours and commands have, each with the one that it has now.
RENAMED = {"vader": "sentiment", "demo-grammar": "demo-coherent"}


def register(name: str, factory: Callable[..., Judge], options: Iterable[str] = ()) -> None:
    """Add a judge under a name: `factory(**options)` returns it, asked for with options of these names.

    Raises:
        ValueError: the name holds a colon or is blank.
    """
    if ":" in name or not name.strip():
        raise ValueError(f"{name!r} is no name for a judge: expected a text without a colon that is not blank")
    JUDGES[name] = JudgeKind(lambda _name, _rest, _steered, values: factory(**values), tuple(options))


def judge_names() -> list[str]:
    """The names of the judges there are."""
    return list(JUDGES)


def check_name(text: str, options: Iterable[str] = ()) -> None:
    """Raise ValueError unless there is such a judge with such options, with the nearest name and all there are. Nothing
    is loaded."""
    name, _, rest = text.partition(":")
    if name not in JUDGES:
        near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, JUDGES, 1)
        hint = f"did you mean {near[0]!r}? There are" if near else "expected one of"
        demo = "; `import faststeer.demo` adds what belongs to the demo model" if name.startswith("demo") else ""
        raise ValueError(f"unknown judge {name!r}: {hint} {', '.join(JUDGES)}{demo}")
    kind = JUDGES[name]
    if kind.after and not rest:
        raise ValueError(f"the judge {name!r} needs {kind.after}: write {name}:...")
    if rest and not kind.after and kind.variants is not None and rest not in kind.variants:
        takes = f"{' or '.join(kind.variants)} after a colon" if kind.variants else "nothing after a colon"
        raise ValueError(f"the judge {name!r} takes {takes}, got {rest!r}")
    if unknown := set(options).difference(kind.options):
        raise ValueError(
            f"the judge {name!r} has no option {', '.join(map(repr, sorted(unknown)))}: it has "
            f"{', '.join(sorted(kind.options)) or 'none'}"
        )


def make(
    what: str | Mapping[str, Any] | Judge | Callable[..., Any],
    *,
    model: Any = None,
    tokenizer: Any = None,
    system: str | None = None,
    batch_size: int = 32,
) -> Judge:
    """Return the judge that a text names, or a mapping with the same under "judge" and its options beside it; a judge
    as it is; and of a Python function from an answer (or a prompt and an answer) to 1, -1 or 0 the judge that says so.

    | text | judge |
    |---|---|
    | `refusal`, `refusal:substrings` | refusal by words (`evaluate.is_refusal`), in two variants |
    | `sentiment`, `sentiment:words` | VADER; a small list of words. `sentiment:NAME`: a text classification model |
    | `no-loop` | whether an answer has words and does not repeat itself without end |
    | `length`, `repetition` | measures of the answer |
    | `refusal-score`, `perplexity` | of the steered model, which `model` and `tokenizer` are |
    | `classifier:NAME` | a text classification model |
    | `llamaguard:NAME`, `harmbench:NAME`, `strongreject:NAME`, `axbench:NAME` | a language model |
    | `regex:PATTERN`, `python:MODULE:FUNCTION` | |
    | `demo`, `demo-coherent`, `demo-tone` | of the demo model's grammar, once `faststeer.demo` is imported |

    Raises:
        ValueError: an unknown judge or option, something missing, nothing to be loaded.
    """
    if not isinstance(what, str | Mapping):
        if hasattr(what, "identity"):
            return cast(Judge, what)
        if not callable(what):
            raise ValueError(f"a judge is {what!r}: expected its name, an object with it, a judge or a function")
        return Function(_three_valued(what), name=getattr(what, "__name__", "function"), opposes=-1.0)
    options: dict[str, Any] = {"judge": what} if isinstance(what, str) else dict(what)
    text = options.pop("judge", None)
    if not isinstance(text, str):
        raise ValueError(f'a judge is {what!r}: expected a text such as "refusal", or an object with "judge"')
    check_name(text, options)
    name, _, rest = text.partition(":")
    steered = {"model": model, "tokenizer": tokenizer, "system": system, "batch_size": batch_size}
    return JUDGES[name].make(name, rest, steered, options)


def _three_valued(function: Callable[..., Any]) -> Callable[..., int]:
    @functools.wraps(function)
    def checked(*texts: Any) -> int:
        said = function(*texts)
        if said not in (-1, 0, 1):
            raise ValueError(f"the judge said {said!r} of {texts[-1][:40]!r}: expected 1, -1 or 0")
        return int(said)

    return checked


def _of_the_model(cls: Callable[..., Judge]) -> Callable[..., Judge]:
    def make_judge(name: str, _rest: str, steered: Mapping[str, Any], options: dict[str, Any]) -> Judge:
        if steered["model"] is None or steered["tokenizer"] is None:
            raise ValueError(f"the judge {name!r} looks at the steered model: give model= and tokenizer=")
        return cls(**steered, **options)

    return make_judge


def _classifier(name: str, rest: str, steered: Mapping[str, Any], options: dict[str, Any]) -> Judge:
    return Classifier(rest, name=name, batch_size=steered["batch_size"], **options)


def _language_model(name: str, rest: str, steered: Mapping[str, Any], options: dict[str, Any]) -> Judge:
    form = read_format(name, options.pop("template", None))
    return LanguageModelJudge(rest, form=form, name=name, batch_size=steered["batch_size"], **options)


def _sentiment(name: str, rest: str, steered: Mapping[str, Any], options: dict[str, Any]) -> Judge:
    if rest == "words":
        return Function(word_sentiment, name="sentiment:words", opposes=-1.0)
    return _classifier(name, rest, steered, options) if rest else Sentiment(**options)


JUDGES |= {
    "refusal": JudgeKind(
        lambda _name, rest, _steered, options: Refusal(variant=rest or "phrases", **options),
        ("phrases",),
        variants=tuple(PHRASES),
    ),
    "refusal-score": JudgeKind(_of_the_model(RefusalScore), ("token_ids",)),
    "sentiment": JudgeKind(_sentiment, ("labels",), variants=None),
    "classifier": JudgeKind(_classifier, ("labels", "with_prompt", "shows"), "a model"),
    **{name: JudgeKind(_language_model, ("template", "concept", "system"), "a model") for name in FORMATS},
    "regex": JudgeKind(lambda _name, rest, _steered, _options: Pattern(rest), after="a regular expression"),
    "python": JudgeKind(
        lambda _name, rest, _steered, options: Function.load(rest, **options),
        ("shows", "opposes", "labels"),
        "MODULE:FUNCTION",
    ),
    "perplexity": JudgeKind(_of_the_model(Perplexity)),
}
register("repetition", Repetition, ["n"])
register("length", Length)
register("no-loop", lambda: Function(no_loop, name="no-loop"))
