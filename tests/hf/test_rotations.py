"""Batches in which a row would not be what it is alone are refused, and the remedy that the message names works."""

from __future__ import annotations

import models
import pytest
import torch

import faststeer as fs
from faststeer.hf.last_tokens import last_tokens

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
KINDS = {
    "longrope": (
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 8, "rope_scaling": LONGROPE},
    ),
    "dynamic": ("llama", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
}


def logits(model, rows, batch_size):
    """`[rows, vocabulary]`, each row under a plan of its own, by its length."""
    plans = [fs.Plan([fs.Add(models.direction(len(row)), layers=1)]) for row in rows]
    pairs = last_tokens(model, rows, list(enumerate(plans)), batch_size=batch_size)
    by_row = {number: row for numbers, found, _ in pairs for number, row in zip(numbers, found, strict=True)}
    return torch.stack([by_row[number] for number in range(len(rows))])


def prompts(*lengths):
    return [models.tokens(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_longest_turns(kind):
    name, changes = KINDS[kind]
    model = models.build(name, **changes)
    rows = prompts(12, 5)
    with pytest.raises(ValueError, match=r"more than 8 tokens .* have 5 to 12, .* use batch_size=1"):
        logits(model, rows, 2)
    alone = [logits(models.build(name, **changes), [row], 1)[0] for row in rows[1:]]
    assert torch.equal(logits(model, rows, 1)[1], alone[0])
    assert logits(model, prompts(5, 8), 2).isfinite().all(), "up to the edge all are turned alike"


def test_longrope_turns_all_long_rows_alike():
    name, changes = KINDS["longrope"]
    model, rows = models.build(name, **changes), prompts(12, 9)
    both = logits(model, rows, 2)
    torch.testing.assert_close(both[1], logits(model, rows[1:], 1)[0], rtol=1e-4, atol=1e-4)
