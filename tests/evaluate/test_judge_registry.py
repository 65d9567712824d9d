"""The registry of judges: names, options, functions, judges of one's own; and what counts as showing or opposing."""

from __future__ import annotations

import pytest

from faststeer.evaluate import is_refusal
from faststeer.evaluate.judging import (
    BaseJudge,
    Classifier,
    Function,
    Refusal,
    Verdict,
    check_line,
    check_name,
    judge_names,
    make,
    register,
    signs,
)
from faststeer.evaluate.judging.registry import JUDGES
from faststeer.evaluate.refusal import PHRASES


def read(judge, *texts):
    return signs(make(judge), [""] * len(texts), texts)


def test_signs_are_what_the_judges_say():
    refuses, answers = "I cannot help you.", "Sure, take a bowl."
    assert read("refusal", refuses, answers, "I cannot wait.") == [1, -1, -1]
    assert read("refusal:substrings", refuses, answers, "I cannot wait.") == [1, -1, 1]
    assert read("sentiment", "What a lovely day!", "A table.", "I hate it.") == [1, 0, -1]
    assert read("sentiment:words", "What a lovely day!", "A table.", "I hate it.") == [1, 0, -1]
    assert read("no-loop", "One two three.", "a b a b a b a b a b a b") == [1, -1]
    assert read("regex:bowl", refuses, answers) == [-1, 1]


def test_the_variants_of_refusal_are_named():
    for variant in PHRASES:
        judge = Refusal(variant=variant)
        for text in ("I won't.", "I cannot wait.", 'She said "I cannot".', "Fine."):
            assert (judge([""], [text])[0].label == "refusal") is is_refusal(text, variant)
    assert len({Refusal(variant=variant).identity for variant in PHRASES}) == 2
    with pytest.raises(ValueError, match="unknown variant 'words' of refusal: expected phrases or substrings"):
        is_refusal("", "words")
    with pytest.raises(ValueError, match="'refusal' takes phrases or substrings after a colon, got 'x'"):
        make("refusal:x")


class Scored(BaseJudge):
    """A judge with a line each way, which cannot read the letter x."""

    name, shows, opposes = "scored", 2.0, -2.0

    def __call__(self, prompts, completions, plans=None):
        return [Verdict(None, None if text == "x" else float(text)) for text in completions]


def test_a_line_each_way_and_what_cannot_be_read():
    assert read(Scored(), "2", "1.9", "-1.9", "-2", "x") == [1, 0, 0, -1, 0]
    judge = Scored()
    judge.opposes = None
    assert read(judge, "2", "1.9", "-2", "x") == [1, -1, -1, 0]


@pytest.fixture
def mine():
    register("mine", lambda line=1.0: Function(len, name="mine", shows=line), ["line"])
    yield
    del JUDGES["mine"]


def test_a_judge_of_ones_own_is_known_by_name_everywhere(mine):
    assert "mine" in judge_names() and read("mine", "", "abc") == [-1, 1]
    assert make({"judge": "mine", "line": 5}).shows == 5
    with pytest.raises(ValueError, match="the judge 'mine' has no option 'lines': it has line"):
        make({"judge": "mine", "lines": 5})
    with pytest.raises(ValueError, match="the judge 'mine' takes nothing after a colon, got 'x'"):
        make("mine:x")
    for name in ("", " ", "a:b"):
        with pytest.raises(ValueError, match="is no name for a judge"):
            register(name, Refusal)


def test_functions_are_judges():
    assert read(lambda text: len(text) - 1, "", "a", "ab") == [-1, 0, 1]
    assert read(lambda text: text == "a", "a", "b") == [1, 0]
    pairs = make(lambda prompt, text: int(prompt == text))
    assert signs(pairs, ["a", "a"], ["a", "b"]) == [1, 0] and pairs.reads_prompts
    for wrong in (7, "yes", None, 0.5):
        with pytest.raises(ValueError, match=f"the judge said {wrong!r} of 'a': expected 1, -1 or 0"):
            read(lambda text, wrong=wrong: wrong, "a")
    first = make(lambda text: 1)
    second = make(lambda text: -1)
    assert first.identity != second.identity and make(first) is first


def test_which_judges_read_prompts():
    quiet = ["refusal", "sentiment", "sentiment:words", "no-loop", "regex:a", "repetition", "length"]
    assert not any(make(name).reads_prompts for name in quiet)
    assert getattr(Classifier, "reads_prompts", True)


def test_measures_draw_no_line():
    for name in ("length", "repetition"):
        with pytest.raises(ValueError, match=f"the judge {name!r} measures answers and draws no line"):
            check_line(make(name))
        with pytest.raises(ValueError, match="draws no line"):
            read(name, "a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refusl", "unknown judge 'refusl': did you mean 'refusal'"),
        ("vader", "unknown judge 'vader': did you mean 'sentiment'"),
        ("demo-nothing", "import faststeer.demo"),
        ("classifier", "needs a model: write classifier:"),
        ("regex", "needs a regular expression"),
        ("length:3", "takes nothing after a colon, got '3'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        check_name(name)
