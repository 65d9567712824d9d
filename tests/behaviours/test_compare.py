"""The comparison of methods on the demo model: every vector works on held-out prompts, a random one does not, and the
table says what generating by hand says."""

from __future__ import annotations

import dataclasses

import pytest

import faststeer as fs
import faststeer.behaviours.compare as comparing
from faststeer import Ablate, Add, Plan
from faststeer.behaviours import Behaviour, BehaviourSplit, job, load
from faststeer.behaviours.compare import METHODS, answer_tokens, compare
from faststeer.evaluate import complete, is_refusal, kl_on
from faststeer.extract import sweep as candidate_sweep

COUNT = 20


@pytest.fixture(scope="module")
def chat():
    return fs.demo.load()


@pytest.fixture(scope="module")
def refusal(chat):
    methods = ("dim", "ace", "unembedding", "ntp", "po")
    return compare(
        *chat, fs.demo.behaviour("refusal"), methods, positions=[-1], steps=6, train_layers=1, n_select=4, n_test=COUNT
    )


@pytest.mark.parametrize("method", ["dim", "ace", "unembedding", "ntp", "po"])
def test_each_method_induces_and_bypasses_refusal(refusal, method):
    found = refusal[method]
    assert found.induce.rate >= 0.95 and found.bypass.rate >= 0.95
    assert found.coherent.rate >= 0.85
    assert found.induce.n == found.bypass.n == COUNT


@pytest.mark.parametrize("control", ["random", "none"])
def test_controls_do_neither(refusal, control):
    assert refusal[control].induce.rate <= 0.05 and refusal[control].bypass.rate <= 0.05


def test_tone_by_three_methods(chat):
    methods = ("dim", "pca", "lat")
    found = compare(*chat, fs.demo.behaviour("tone"), methods, positions=[-3], layers=[1, 3], n_select=8, n_test=COUNT)
    for method in methods:
        assert found[method].induce.rate >= 0.95 and found[method].bypass.rate >= 0.95
    assert found["random"].induce.rate <= 0.05 and found["random"].bypass.rate <= 0.05


def test_the_figures_are_those_of_generating_by_hand(chat, refusal):
    model, tokenizer = chat
    test = fs.demo.behaviour("refusal").test
    for method in ("ntp", "random"):
        found = refusal[method]
        added = Plan([Add(found.vector, found.coefficient)])
        answers = complete(model, tokenizer, test.negative[:COUNT], added, max_new_tokens=64)
        assert found.induce.successes == sum(map(is_refusal, answers))
        subtracted = Plan([Add(found.vector, -found.coefficient)])
        answers = complete(model, tokenizer, test.positive[:COUNT], subtracted, max_new_tokens=64)
        assert found.bypass.successes == sum(not is_refusal(text) for text in answers)
        wipe = Plan([Ablate(found.vector[found.layer], layers="all", at=("resid_pre", "attn_out", "mlp_out"))])
        by_hand = kl_on(model, tokenizer, wipe, test.negative[:COUNT]).mean().item()
        assert found.kl == pytest.approx(by_hand, rel=1e-3)
    # The same length for all of one layer and token; the paper's comparison.
    dim, control = refusal["dim"], refusal["random"]
    assert control.norm == pytest.approx(dim.norm, rel=1e-6)
    assert abs(control.cosine) < 0.5 and dim.cosine == pytest.approx(1.0)


def test_what_cannot_run_is_named_and_left_out(chat):
    prompts = fs.demo.behaviour("refusal")
    splits = [
        BehaviourSplit(s.positive[:12], s.negative[:12]) for s in (prompts.train, prompts.validation, prompts.test)
    ]
    bare = Behaviour("bare", "", "sentiment", *splits)
    found = compare(*chat, bare, METHODS[5:], n_select=1, n_test=1, max_new_tokens=2, layers=[3])
    assert set(found.skipped) == set(METHODS[5:])
    assert all("has no training pairs" in why for why in found.skipped.values())
    assert [result.method for result in found.results] == ["random", "none"]
    with pytest.raises(KeyError, match="has no training pairs"):
        found["ntp"]


def test_gradients_are_taken_at_the_layers_asked_for_alone(chat, monkeypatch):
    layers = []
    whole = comparing.attribution
    monkeypatch.setattr(
        comparing, "attribution", lambda *a, **named: layers.append(named["layers"]) or whole(*a, **named)
    )
    options = {"layers": [2, 3], "positions": [-1], "n_select": 1, "n_test": 1, "max_new_tokens": 2}
    found = compare(*chat, fs.demo.behaviour("refusal"), ["attribution"], **options)
    assert layers == [[2, 3]] and found["attribution"].layer in (2, 3)


@pytest.mark.parametrize("methods", [("dim", "unembedding", "ntp"), ("pca",)])
def test_as_many_answers_are_forecast_as_given(chat, methods, monkeypatch, capsys):
    answers, complete = [], candidate_sweep.complete
    monkeypatch.setattr(candidate_sweep, "complete", lambda *a, **named: answers.extend(a[2]) or complete(*a, **named))
    monkeypatch.setattr(job, "seconds_per_answer", lambda *_, **__: 1.0)
    options = {"layers": [2, 3], "positions": [-1, -2], "coefficients": (0.5, 1.0), "steps": 1, "max_new_tokens": 2}
    compare(*chat, fs.demo.behaviour("refusal"), methods, n_select=2, n_test=3, progress=True, **options)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(answers)} answers of 2 tokens at most" in said
    assert ("training not counted" in said) == ("ntp" in methods)


def test_a_comparison_goes_on_with_what_is_kept(chat, tmp_path, monkeypatch):
    """Stopped in the middle of answering: what was answered and trained is not done again, and nothing differs."""
    refusal = fs.demo.behaviour("refusal")
    few = BehaviourSplit(refusal.train.positive[:16], refusal.train.negative[:16], pairs=refusal.train.pairs[:8])
    asked = (*chat, dataclasses.replace(refusal, train=few), ("dim", "ntp"))
    options = {"positions": [-1], "layers": [2, 3], "steps": 2, "n_select": 2, "n_test": 2, "max_new_tokens": 2}
    options |= {"batch_size": 2}
    calls: list[int] = []
    complete = candidate_sweep.complete

    def counted(model, tokenizer, prompts, *more, **given):
        calls.append(len(prompts))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return complete(model, tokenizer, prompts, *more, **given)

    monkeypatch.setattr(candidate_sweep, "complete", counted)
    stop = 0
    whole = compare(*asked, **options, folder=tmp_path / "whole").to_dict()
    n_calls = len(calls)
    assert n_calls > 6 and not whole["skipped"]
    calls.clear()
    stop = n_calls - 1
    with pytest.raises(KeyboardInterrupt):
        compare(*asked, **options, folder=tmp_path / "stopped")
    stop = 0
    calls.clear()
    monkeypatch.setattr(comparing.optimise, "train", None)  # it was trained before
    again = compare(*asked, **options, folder=tmp_path / "stopped").to_dict()
    assert len(calls) == 2
    calls.clear()
    for report in (whole, again):
        for row in report["results"]:
            row.pop("seconds")
    assert again == whole
    assert sorted(each.name for each in (tmp_path / "whole").iterdir()) == sorted(
        each.name for each in (tmp_path / "stopped").iterdir()
    )
    monkeypatch.undo()
    unkept = compare(*asked, **options).to_dict()
    for row in unkept["results"]:
        row.pop("seconds")
    assert unkept == whole


def test_tokens_at_which_answers_part(chat):
    _, tokenizer = chat
    shows, does_not = answer_tokens(tokenizer, fs.demo.behaviour("refusal"))
    assert {tokenizer.decode([token]).strip() for token in shows} == {"I", "As"}
    assert not set(shows) & set(does_not)
    without = load("refusal")
    tokens, against = answer_tokens(tokenizer, Behaviour("x", "", "refusal", *(
        BehaviourSplit(s.positive, s.negative) for s in (without.train, without.validation, without.test)
    )))  # fmt: skip
    assert against == [] and set(shows) <= set(tokens)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ((), {}, r"unknown method\(s\) \(none\)"),
        (("dim", "magic"), {}, r"unknown method\(s\) magic"),
        (("dim",), {"layers": [9]}, r"the model has layers 0\.\.5"),
        (("dim",), {"n_test": 0}, "expected at least 1"),
        (("dim",), {"coefficients": [0]}, "distinct positive numbers"),
    ],
)
def test_wrong_calls(chat, methods, options, message):
    with pytest.raises(ValueError, match=message):
        compare(*chat, fs.demo.behaviour("refusal"), methods, **options)
