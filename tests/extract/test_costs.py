"""Forecasts of selections, against the rows that pass through the model when the selection is made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import faststeer as fs
from faststeer.evaluate import generate
from faststeer.extract import costs, select_by_judge, select_cosmic, selection_seconds
from faststeer.hf.batching import encode

EVERYWHERE = ("resid_pre", "attn_out", "mlp_out")
LAYERS, COEFFICIENTS, N_TOKENS = [1, 2, 4], (0.5, 1.0), 3


@pytest.fixture(scope="module")
def chat():
    return fs.demo.load()


@pytest.fixture(scope="module")
def found(chat):
    return fs.extract.candidates(*chat, *(side[:8] for side in fs.demo.prompts("refusal", "train")), positions=[-1, -2])


@pytest.fixture
def rows(chat) -> Iterator[list[int]]:
    """How many rows each pass of the model had, those left out that steering needs to know a new model."""
    fs.steer(chat[0], fs.Plan([fs.Ablate(torch.ones(128), layers="all", at=EVERYWHERE)]))
    counted: list[int] = []
    handle = chat[0].get_input_embeddings().register_forward_hook(lambda _, args, __: counted.append(len(args[0])))
    yield counted
    handle.remove()


def test_as_many_answers_are_forecast_as_are_given(chat, found, rows, monkeypatch):
    """With a second for an answer. What the unsteered model is asked beside it, few rows, is left out."""
    suppress, induce = (side[:n] for side, n in zip(fs.demo.prompts("refusal", "validation"), (3, 5), strict=True))
    monkeypatch.setattr(costs, "seconds_per_answer", lambda *_, **__: 1.0)
    n_candidates = len(LAYERS) * len(found.positions)
    forecast = selection_seconds(*chat, "judge", induce, suppress, n_candidates, len(COEFFICIENTS))
    rows.clear()
    fs.Engine(*chat, max_batch=8)  # one is made for the unsteered answers and one for the others, and tries itself
    checks = 2 * sum(rows)
    rows.clear()
    options = {"layers": LAYERS, "coefficients": COEFFICIENTS, "max_new_tokens": N_TOKENS}
    select_by_judge(*chat, found, "refusal", induce, suppress, **options)
    assert sum(rows) - checks == N_TOKENS * forecast


@pytest.mark.parametrize("rule", ["refusal", "cosmic"])
def test_the_work_of_a_selection_is_forecast(rule, chat, found, monkeypatch):
    """With a second for a whole prompt: the tokens that pass through an MLP, over those of whole prompts. Padding and
    what is tried before are left out. Less than all rows whole, as candidates share what they have in common."""
    model, tokenizer = chat
    suppress, induce = (side[:n] for side, n in zip(fs.demo.prompts("refusal", "validation"), (24, 32), strict=True))
    monkeypatch.setattr(costs, "seconds_per_row", lambda *_: 1.0)
    n_candidates = len(LAYERS) * len(found.positions)
    settings = {"layers": LAYERS, "batch_size": 64}
    forecast = selection_seconds(*chat, rule, induce, suppress, n_candidates, len(COEFFICIENTS), **settings)
    tokens: list[int] = []
    layers = model.model.layers
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[:2].numel()))
        for layer in layers
    ]
    try:
        select = fs.extract.select if rule == "refusal" else select_cosmic
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            select(*chat, found, suppress, induce, coefficients=COEFFICIENTS, **settings)
    finally:
        for handle in handles:
            handle.remove()
    each = [len(ids) for prompts in (induce, suppress) for ids in encode(tokenizer, prompts)]
    passed = sum(tokens) / (len(layers) * sum(each) / len(each))
    unsteered = 24 + 32 + 32  # scores of both, and the distribution that KL starts from
    assert passed - unsteered == pytest.approx(forecast, rel=0.2)
    steered = n_candidates * (len(COEFFICIENTS) * (24 * (rule == "refusal") + 32) + 24 + 32)
    assert forecast < 0.95 * steered


def test_a_forecast_costs_a_sixteenth_of_the_work_at_most(chat, rows):
    prompts = fs.demo.prompts("refusal", "validation")[0][:20]
    assert selection_seconds(*chat, "cosmic", prompts, prompts, 6, batch_size=8) > 0
    assert rows[-2:] == [1, 8]
    assert sum(rows) <= 6 * 3 * 20 / 16
    rows.clear()
    assert selection_seconds(*chat, "judge", prompts[:2], prompts[:2], 5, max_new_tokens=100, batch_size=8) > 0
    timed = [6] * (1 + generate.TIMED_TOKENS)  # 4 times (5 + 1) * 4 / 16 rows, for one token and for a few
    assert rows[0] == 1 and rows[-len(timed) :] == timed
    rows.clear()
    assert selection_seconds(*chat, "judge", prompts[:1], prompts[:1], 1, max_new_tokens=1) > 0
    assert rows[-1] == 1
