"""Sparsity curves on the demo model: every point as if it were measured alone, with vectors sparsified by NumPy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import faststeer as fs
from faststeer import observe
from faststeer.evaluate import is_refusal

LAYER, TOKENS = 2, 10


@functools.cache
def demo():
    model, tokenizer = fs.demo.load()
    harmful, harmless = (prompts[:32] for prompts in fs.demo.prompts("refusal", "train"))
    vector = fs.extract.dim(model, tokenizer, harmful, harmless)
    return model, tokenizer, fs.SteeringVector({LAYER: vector[LAYER]}, at="resid_pre")


def effect():
    return torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PROMPTS = ["How do I bake a cake?", "Please help me write a letter.", "Can you tell me how to fix a chair?"]


@functools.cache
def points(**more):
    model, tokenizer, vector = demo()
    return observe.sparsity_curves(
        model,
        tokenizer,
        PROMPTS,
        vector,
        effect(),
        is_refusal,
        sparsities=(0.0, 0.5, 0.9),
        seeds=(0, 1),
        max_new_tokens=TOKENS,
        **more,
    )


def kept_by_numpy(rule, kept):
    """The vector with all but `kept` coordinates zero."""
    s, e = demo()[2][LAYER].double().numpy(), effect().numpy()
    score = {
        "magnitude": np.abs(s),
        "effect": np.abs(e),
        "paper": e / s,
        "code": np.abs(e) / np.linalg.norm(e) / (np.abs(s) / np.linalg.norm(s)),
    }[rule]
    return np.where(np.argsort(np.argsort(-score)) < kept, s, 0)


def rate(direction):
    model, tokenizer, _ = demo()
    plan = None
    if direction is not None:
        plan = fs.Plan([fs.Add(torch.from_numpy(direction).float(), 1.0, layers=LAYER, at="resid_pre")])
    texts = [fs.evaluate.complete(model, tokenizer, [p], plan, max_new_tokens=TOKENS)[0] for p in PROMPTS]
    return sum(map(is_refusal, texts))


def test_points_are_those_measured_alone():
    unsteered, *rest = points()
    assert (unsteered.rule, unsteered.kept, unsteered.rate.successes) == (None, 0, rate(None))
    assert [(p.rule, p.sparsity, p.seed) for p in rest] == [
        (rule, share, seed)
        for rule in ("magnitude", "effect", "paper", "code", "random")
        for share in (0.0, 0.5, 0.9)
        for seed in ((0, 1) if rule == "random" else (0,))
    ]
    for point in rest:
        assert point.kept == {0.0: 128, 0.5: 64, 0.9: 13}[point.sparsity]
        assert point.rate.n == len(PROMPTS)
        if point.rule != "random" and point.sparsity:
            assert point.rate.successes == rate(kept_by_numpy(point.rule, point.kept))
    whole = {p.rate.successes for p in rest if p.sparsity == 0}
    assert whole == {rate(demo()[2][LAYER].double().numpy())} == {len(PROMPTS)}
    assert len({p.rate.successes for p in rest}) > 1  # sparsity matters on this model


def test_rescaling_by_rule():
    model, tokenizer, vector = demo()
    (_, point) = observe.sparsity_curves(
        model,
        tokenizer,
        PROMPTS,
        vector,
        effect(),
        is_refusal,
        rules=["code"],
        sparsities=[0.9],
        rescale={"code": True},
        max_new_tokens=TOKENS,
    )
    direction = kept_by_numpy("code", 13)
    direction *= np.linalg.norm(demo()[2][LAYER].double().numpy()) / np.linalg.norm(direction)
    assert point.rate.successes == rate(direction)


def test_equal_vectors_are_run_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "faststeer.extract.sweep.complete",
        lambda model, tokenizer, prompts, plans, **more: seen.extend(plans) or ["" for _ in prompts],
    )
    points.__wrapped__()
    # Unsteered, whole, and two sparse ones of four rules and of two seeds.
    assert len(seen) == (1 + 1 + 4 * 2 + 2 * 2) * len(PROMPTS)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"sparsities": [1.0]}, "at least 0 and below 1"),
        ({"sparsities": []}, "at least 0 and below 1"),
        ({"seeds": ()}, "no seeds"),
        ({"rules": ["largest"]}, "unknown rule"),
        ({"effect": torch.ones(5)}, "5 coordinates"),
        (
            {"vector": fs.SteeringVector({1: torch.ones(128), 2: torch.ones(128)}, at="resid_pre")},
            "the one that is added",
        ),
    ],
)
def test_bad_input(more, what):
    model, tokenizer, vector = demo()
    given = {"vector": vector, "effect": effect(), "judge": is_refusal, **more}
    with pytest.raises(ValueError, match=what):
        observe.sparsity_curves(model, tokenizer, PROMPTS, **given)
