"""Forecasts of selections, against the rows that pass through the model when the selection is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import faststeer as fs
from faststeer.evaluate import generate
from faststeer.extract import costs, select_by_judge, select_cosmic, selection_seconds

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


@pytest.mark.parametrize("rule", ["refusal", "cosmic", "judge"])
def test_as_many_rows_are_forecast_as_pass(rule, chat, found, rows, monkeypatch):
    """With a second for a row, or for an answer. What the unsteered model is asked beside it, few rows, is left out."""
    suppress, induce = (side[:n] for side, n in zip(fs.demo.prompts("refusal", "validation"), (3, 5), strict=True))
    monkeypatch.setattr(costs, "seconds_per_row", lambda *_: 1.0)
    monkeypatch.setattr(costs, "seconds_per_answer", lambda *_, **__: 1.0)
    n_candidates = len(LAYERS) * len(found.positions)
    forecast = selection_seconds(*chat, rule, induce, suppress, n_candidates, len(COEFFICIENTS))
    options = {"layers": LAYERS, "coefficients": COEFFICIENTS}
    rows.clear()
    if rule == "refusal":
        fs.extract.select(*chat, found, suppress, induce, **options)
        unsteered = 3 + 5 + 5  # scores of both, and the distribution that KL starts from
    elif rule == "cosmic":
        select_cosmic(*chat, found, suppress, induce, **options)
        unsteered = 3 + 5 + 5
    else:
        fs.Engine(*chat, max_batch=8)  # one is made for the unsteered answers and one for the others, and tries itself
        checks = 2 * sum(rows)
        rows.clear()
        select_by_judge(*chat, found, "refusal", induce, suppress, max_new_tokens=N_TOKENS, **options)
        assert sum(rows) - checks == N_TOKENS * forecast
        return
    assert sum(rows) - unsteered == forecast


def test_a_forecast_costs_a_sixteenth_of_the_work_at_most(chat, rows):
    prompts = fs.demo.prompts("refusal", "validation")[0][:20]
    assert selection_seconds(*chat, "cosmic", prompts, prompts, 6, batch_size=8) > 0
    assert rows == [1, 8]
    rows.clear()
    assert selection_seconds(*chat, "judge", prompts[:2], prompts[:2], 5, max_new_tokens=100, batch_size=8) > 0
    timed = [6] * (1 + generate.TIMED_TOKENS)  # 4 times (5 + 1) * 4 / 16 rows, for one token and for a few
    assert rows[0] == 1 and rows[-len(timed) :] == timed
    rows.clear()
    assert selection_seconds(*chat, "judge", prompts[:1], prompts[:1], 1, max_new_tokens=1) > 0
    assert rows[-1] == 1
