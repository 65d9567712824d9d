"""The demonstration's tone part, run on the toy: how it chooses, that its figures are those of its answers."""

from __future__ import annotations

import pytest
import torch

import faststeer as fs
from faststeer.demo import real

pytest.importorskip("vaderSentiment")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tone")
    steps: list[str] = []
    return out, real.measure(*fs.demo.load(), out, 0, steps.append, questions=4, choosing=2), steps


def test_an_entry_per_coefficient(run):
    _, result, steps = run
    assert [entry["coefficient"] for entry in result["tone"]] == list(real.COEFFICIENTS)
    for entry in result["tone"]:
        assert entry["n"] == 4 and -1 <= entry["low"] <= entry["score"] <= entry["high"] <= 1
        assert entry["change_low"] <= entry["change"] <= entry["change_high"]
    unsteered = next(entry for entry in result["tone"] if entry["coefficient"] == 0)
    assert unsteered["random_score"] == unsteered["score"] and unsteered["change"] == 0
    assert len(steps) == 3


def test_the_layer_is_the_one_whose_scores_differ_most_among_the_coherent(run):
    _, result, _ = run
    assert result["tone_layer"] == real.choose(result["tone_layers"])
    points = [
        {"layer": 3, "added": 0.9, "subtracted": -0.9, "coherent": 0.5},
        {"layer": 4, "added": 0.5, "subtracted": 0.0, "coherent": 0.95},
        {"layer": 5, "added": 0.9, "subtracted": 0.2, "coherent": 0.9},
    ]
    assert real.choose(points) == 5
    assert real.choose(points[:1]) == 3


def test_the_figures_are_those_of_the_written_vector(run):
    out, result, _ = run
    model, tokenizer = fs.demo.load()
    vector = fs.SteeringVector.load(out / "tone.safetensors")
    assert vector.layers == (result["tone_layer"],)
    behaviour = fs.behaviours.load("tone")
    expected = fs.extract.dim(model, tokenizer, behaviour.train.positive, behaviour.train.negative)
    assert torch.allclose(vector[vector.layers[0]], expected[vector.layers[0]], atol=1e-5)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    questions = behaviour.test.induce[:4]
    for entry in result["tone"]:
        plan = fs.Plan([fs.Add(vector, entry["coefficient"])])
        texts = fs.evaluate.complete(model, tokenizer, questions, plan, max_new_tokens=real.MAX_NEW_TOKENS)
        scores = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
        assert entry["score"] == pytest.approx(sum(scores) / 4)
    for name in ("tone_dose_response.png", "tone_layers.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
