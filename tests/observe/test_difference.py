"""Steered against unsteered, compared with two runs by hand and the definitions in NumPy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

import faststeer as fs
from faststeer import observe

PROMPTS = ["How do I bake a cake?", "Tell me a story about a boat.", "Why?"]
ANSWERS = ["Sure, here is how.", "I cannot help with that.", [7, 8, 9]]
LAYER = 2


@functools.cache
def demo():
    return fs.demo.load()


def vector():
    return torch.randn(128, generator=torch.Generator().manual_seed(0))


def plan(coefficient):
    return fs.Plan([fs.Add(vector(), coefficient, layers=LAYER, at="resid_pre")])


def by_hand(ids, coefficient):
    """(`[layers, tokens, hidden]` after each layer, logits `[tokens, vocabulary]`) of one row, in fp64."""
    model = demo()[0]
    after, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        if i == LAYER - 1:  # whose resid_post is the resid_pre of the next
            handles.append(layer.register_forward_hook(lambda m, args, out: out + coefficient * vector()))
        handles.append(layer.register_forward_hook(lambda m, args, out, i=i: after.__setitem__(i, out[0])))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return torch.stack([after[i] for i in range(6)]).double().numpy(), logits.double().numpy()


def test_numbers_are_their_definitions():
    model, tokenizer = demo()
    directions = torch.stack([vector(), vector().flip(0)])
    plans = [plan(8.0), None, plan(-0.5)]
    found = observe.difference(
        model, tokenizer, PROMPTS, plans, completions=ANSWERS, directions=directions, batch_size=2
    )
    unit = (directions / directions.norm(dim=1, keepdim=True)).double().numpy()
    for row, coefficient in zip(found, (8.0, 0.0, -0.5), strict=True):
        base, base_logits = by_hand(row.token_ids, 0.0)
        steered, logits = by_hand(row.token_ids, coefficient)
        size = np.linalg.norm(base, axis=-1)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * size.max())
        close(row.norm, np.linalg.norm(steered - base, axis=-1))
        close(row.base_norm, size)
        close(row.relative_norm * row.base_norm, row.norm)
        close(row.base_projection, base @ unit.T)
        close(row.steered_projection, steered @ unit.T)
        cosine = (base * steered).sum(-1) / size / np.linalg.norm(steered, axis=-1)
        np.testing.assert_allclose(row.cosine, cosine, atol=1e-4)
        kl = entropy(softmax(base_logits, -1), softmax(logits, -1), axis=-1)
        np.testing.assert_allclose(row.kl, kl, rtol=2e-3, atol=1e-5)
        assert row.base_token.tolist() == base_logits.argmax(-1).tolist()
        assert row.steered_token.tolist() == logits.argmax(-1).tolist()
        for t, (b, s) in enumerate(zip(row.base_token.tolist(), row.steered_token.tolist(), strict=True)):
            assert row.base_token_rank[t] == (logits[t] > logits[t, b]).sum()
            assert row.steered_token_rank[t] == (base_logits[t] > base_logits[t, s]).sum()
        assert row.flips.tolist() == (row.base_token != row.steered_token).tolist()
    assert found[0].flips.any()
    assert not found[1].norm.any() and not found[1].kl.any() and not found[1].flips.any()
    assert not found[0].norm[: LAYER - 1].any()  # nothing moves below the steered layer


def test_layers_hook_point_and_positions():
    model, tokenizer = demo()
    generated = fs.Plan([fs.Add(vector(), 0.5, layers=LAYER, at="resid_pre", positions="generated")])
    by_layer = fs.SteeringVector({2: vector(), 4: vector().flip(0)})
    found = observe.difference(
        model, tokenizer, PROMPTS, generated, completions=ANSWERS, at="resid_pre", layers=[2, -2],
        directions=by_layer.directions,
    )  # fmt: skip
    for row in found:
        n = row.n_prompt
        assert row.layers == (2, 4) and row.norm.shape == (2, len(row.token_ids))
        assert not row.norm[:, :n].any()
        torch.testing.assert_close(row.norm[0, n:], torch.full((len(row.token_ids) - n,), 0.5 * float(vector().norm())))
        moved = row.steered_projection - row.base_projection
        torch.testing.assert_close(moved[0, n:, 0], row.norm[0, n:], rtol=1e-4, atol=1e-4)


def test_positions_to_explain():
    model, tokenizer = demo()
    found = observe.difference(model, tokenizer, PROMPTS, plan(8.0), completions=ANSWERS)
    kept = observe.kept_positions(found)
    assert any(kept)
    for row, columns in zip(found, kept, strict=True):
        expected = [t for t in range(row.n_prompt - 1, len(row.token_ids) - 1) if row.flips[t]]
        assert columns == expected
    bare = observe.difference(model, tokenizer, PROMPTS, plan(8.0))
    assert [c for c in observe.kept_positions(bare)] == [[row.n_prompt - 1] if row.flips[-1] else [] for row in bare]
    nothing = observe.difference(model, tokenizer, PROMPTS, plan(0.0), completions=ANSWERS)
    with pytest.raises(ValueError, match=r"same favourite next token at all .* use a larger coefficient"):
        observe.kept_positions(nothing)


def test_bad_input_is_refused():
    model, tokenizer = demo()
    refused = [
        ({"directions": torch.ones(5)}, "hidden size 5, the model 128"),
        ({"directions": {1: vector()}}, "lack the layers"),
        ({"directions": {0: vector(), 1: torch.ones(2, 128)}, "layers": [0, 1]}, "different numbers of directions"),
        ({"layers": [9]}, "layer 9 is out of range"),
        ({"completions": "one text"}, "one text for 3 prompts"),
        ({"plans": [None]}, "1 plans for 3 prompts"),
    ]
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            observe.difference(model, tokenizer, PROMPTS, **{"plans": plan(1.0), **settings})
