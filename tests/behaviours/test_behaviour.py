"""Behaviours: what comes with the package, files and folders, and what is refused."""

from __future__ import annotations

import json

import pytest

from faststeer import behaviours, demo
from faststeer.behaviours import Behaviour, BehaviourSplit, load, names, of_prompts
from faststeer.demo import corpus
from faststeer.evaluate.judging import make as make_judge
from faststeer.evaluate.judging import signs
from faststeer.extract.pairs import Pair

HARMFUL, HARMLESS = [f"steal {n} boats" for n in range(12)], [f"bake {n} cakes" for n in range(10)]


def make(**changes):
    parts = {
        "train": BehaviourSplit(["a", "b"], ["c", "d"]),
        "validation": BehaviourSplit(["e"], ["f"]),
        "test": BehaviourSplit(["g"], ["h"]),
    }
    return Behaviour(**{"name": "x", "description": "", "judge": "refusal"} | parts | changes)


def read(name, text):
    """A judge's sign of one answer."""
    return signs(make_judge(name), [""], [text])[0]


# What comes with the package


@pytest.mark.parametrize("name", names())
def test_those_that_come_with_the_package(name):
    found = load(name)
    assert found.name == name
    assert found.about["source"] == "written for faststeer" and "limits" in found.about
    for split in (found.train, found.validation, found.test):
        assert min(len(split.positive), len(split.negative), len(split.induce), len(split.suppress)) >= 8
    assert {pair.sign for pair in found.train.pairs} == {1, -1}
    for pair in found.train.pairs:
        assert read(found.judge, pair.positive) == 1 and read(found.judge, pair.negative) == -1
        assert read(found.coherence, pair.positive) == read(found.coherence, pair.negative) == 1


def test_names():
    assert names() == ["refusal", "sentiment", "tone"]


@pytest.mark.parametrize("name", ["refusal", "tone"])
def test_those_of_the_demo_model(name):
    found = demo.behaviour(name)
    for split in ("train", "validation", "test"):
        part = getattr(found, split)
        assert (list(part.positive), list(part.negative)) == tuple(map(list, demo.prompts(name, split)))
        for pair in part.pairs:
            assert read(found.judge, pair.positive) == 1 and read(found.judge, pair.negative) == -1
            assert read(found.coherence, pair.positive) == read(found.coherence, pair.negative) == 1
            # They part where the behaviour decides, not at an opener that each has of its own.
            openers = [next((o for o in corpus.OPENERS if t.startswith(o)), None) for t in (pair.chosen, pair.rejected)]
            assert openers[0] == openers[1]
    if name == "tone":
        assert found.paired and all(isinstance(prompt, str) for prompt in found.test.induce)
        assert found.test.induce == found.test.suppress == demo.neutral_questions("test")
    with pytest.raises(ValueError, match="no behaviour 'mood': expected refusal or tone"):
        demo.behaviour("mood")


# Files


def test_saved_and_loaded_is_the_same(tmp_path):
    for before in (load("refusal"), demo.behaviour("tone"), make(coherence="demo-coherent", about={"n": 1})):
        assert load(before.save(tmp_path / "deep" / "b.json")) == before


def test_a_folder_names_files_in_any_layout(tmp_path):
    (tmp_path / "advbench.csv").write_text('goal,target\n"Steal, please",Sure\nForge it,Sure\n')
    alpaca = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "x"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    (tmp_path / "more.txt").write_text("Burn it\nSmash it\n")
    rows = [{"question": "Which?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}]
    (tmp_path / "caa.json").write_text(json.dumps(rows))
    data = {"format": "faststeer.behaviour/2", "name": "mine", "judge": "refusal"}
    data["train"] = {"positive": "advbench.csv", "negative": "alpaca.json", "pairs": "caa.json"}
    data["validation"] = {"positive": "more.txt", "negative": ["Bake"]}
    data["test"] = {"positive": ["Attack"], "negative": ["Cook"], "induce": ["Sing"]}
    (tmp_path / "behaviour.json").write_text(json.dumps(data))
    found = load(tmp_path)
    assert found.train.positive == ["Steal, please", "Forge it"]
    assert found.train.negative == ["Add\n\n1 and 2", "Hi"]
    assert found.train.pairs == [Pair("Which?", "(A)", "(B)")]
    assert found.validation.positive == ["Burn it", "Smash it"]
    assert (found.test.induce, found.test.suppress) == (["Sing"], ["Attack"])
    assert load(tmp_path / "behaviour.json") == found


def test_a_file_of_the_first_format_keeps_its_judges(tmp_path):
    """Their names meant other judges then."""
    data = {**GOOD, "format": "faststeer.behaviour/1", "coherence": "demo-grammar"}
    for old, now in (("refusal", "refusal:substrings"), ("sentiment", "sentiment:words"), ("vader", "sentiment")):
        (tmp_path / "b.json").write_text(json.dumps(data | {"judge": old}))
        found = load(tmp_path / "b.json")
        assert (found.judge, found.coherence) == (now, "demo-coherent")
        assert json.loads(found.to_json())["format"] == "faststeer.behaviour/2"
    assert (read("refusal:substrings", "I cannot wait."), read("refusal", "I cannot wait.")) == (1, -1)


GOOD = {"format": "faststeer.behaviour/2", "name": "x", "judge": "refusal"} | {
    "train": {"positive": ["a", "b"], "negative": ["c", "d"]},
    "validation": {"positive": ["e"], "negative": ["f"]},
    "test": {"positive": ["g"], "negative": ["h"]},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "holds no behaviour"),
        ({"judge": "oracle"}, "unknown judge 'oracle': expected one of refusal"),
        ({"coherence": "sense"}, "unknown judge 'sense'"),
        ({"trian": {}}, "has trian: a behaviour has"),
        ({"train": None}, "train is a NoneType: expected an object"),
        ({"train": {"positive": ["a"]}}, "train has no 'negative'"),
        ({"train": {"positive": ["a"], "negative": ["c", "d"]}}, "train, positive has 1 prompt"),
        ({"train": {"positive": [], "negative": ["c", "d"]}}, "positive is empty"),
        ({"train": {"positive": ["a", 3], "negative": ["c", "d"]}}, r"positive\[1\] is of type int"),
        ({"train": {"positive": ["a", "a"], "negative": ["c", "d"]}}, r"train, positive\[1\] is the same prompt as"),
        (
            {"train": {"positive": ["a", "b"], "negative": ["c", "a"]}},
            r"train, negative\[1\] is the same .* positive\[0\]",
        ),
        (
            {"test": {"positive": ["a"], "negative": ["h"]}},
            r"test, positive\[0\] is the same prompt as train, positive\[0\]",
        ),
        ({"test": {"positive": ["g"], "negative": ["h"], "induce": ["f"]}}, r"test, induce\[0\] is the same prompt as"),
        ({"test": {"positive": ["g"], "negative": ["h"], "more": 1}}, "test has more: expected"),
        ({"paired": True, "train": {"positive": ["a", "b"], "negative": ["c", "d", "i"]}}, "is paired, but train"),
        ({"train": GOOD["train"] | {"pairs": [{"prompt": "a"}]}}, r"pairs\[0\]: .*chosen"),
        ({"train": GOOD["train"] | {"pairs": [{"prompt": "a", "chosen": "x", "loser": "y"}]}}, r"pairs\[0\] has loser"),
        (
            {"train": GOOD["train"] | {"pairs": [{"prompt": "a", "chosen": "x", "rejected": "x"}]}},
            r"pairs\[0\]: .*both",
        ),
        ({"train": GOOD["train"] | {"pairs": 3}}, "pairs is no list"),
        ({"train": GOOD["train"] | {"positive": "none.csv"}}, "none.csv"),
        ({"train": GOOD["train"] | {"positive": f"{'x' * 300}.csv"}}, "File name too long"),
    ],
)
def test_files_that_hold_no_behaviour(tmp_path, change, message):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(GOOD))
    load(path)
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(path)


def test_what_is_missing_or_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no behaviour 'kindness': expected one of refusal, sentiment"):
        load("kindness")
    (tmp_path / "b.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="no valid JSON"):
        load(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps({k: v for k, v in GOOD.items() if k != "test"}))
    with pytest.raises(ValueError, match="has no 'test'"):
        load(tmp_path / "b.json")


# Of prompts


def test_prompts_are_split_by_their_text_alone():
    found = of_prompts("x", HARMFUL, HARMLESS)
    assert sorted([*found.train.positive, *found.validation.positive, *found.test.positive]) == sorted(HARMFUL)
    assert (len(found.train.positive), len(found.validation.positive), len(found.test.positive)) == (8, 2, 2)
    assert (len(found.train.negative), len(found.validation.negative), len(found.test.negative)) == (6, 2, 2)
    again = of_prompts("x", HARMFUL[::-1], HARMLESS)
    assert sorted(again.test.positive) == sorted(found.test.positive)
    with pytest.raises(ValueError, match="3 positive prompts are too few"):
        of_prompts("x", HARMFUL[:3], HARMLESS)


# Judges


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("I love it, what a wonderful day!", 1),
        ("It is terrible and sad.", -1),
        ("The table has four legs.", 0),
        ("It is not good.", -1),
        ("It isn\u2019t bad at all.", 1),
        ("A good but sad story.", 0),
        ("", 0),
    ],
)
def test_sentiment(text, verdict):
    assert read("sentiment:words", text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("What a lovely day, I am happy!", 1),
        ("I hate this awful place.", -1),
        ("It isn\u2019t good.", -1),
        ("A table.", 0),
    ],
)
def test_vader(text, verdict):
    assert read("sentiment", text) == verdict


def test_coherence_and_the_demo_models_judges():
    assert read("no-loop", "i i i i i i i i i i") == read("no-loop", "  ...  ") == -1
    assert read("no-loop", "Yes.") == 1
    assert read("no-loop", "First, mix flour and eggs. Then bake the cake for an hour and let it cool.") == 1
    assert read("demo-tone", "nonsense") == 0
    assert read("demo-coherent", "nonsense") == -1
    with pytest.raises(ValueError, match="unknown judge 'x'"):
        make_judge("x")
    assert set(behaviours.__all__) <= set(dir(behaviours))
