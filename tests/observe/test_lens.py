"""The logit lens gives the model's own logits at the end, and its formula before."""

from __future__ import annotations

import by_hand
import models
import pytest
import torch

import faststeer as fs
from faststeer import observe


@pytest.mark.parametrize("name", sorted(models.ARCHITECTURES))
def test_at_the_last_layer_it_is_the_model(name):
    model, ids = models.model(name), models.tokens(2, 5)
    with fs.hf.read(model, "resid_post", [-1]) as taken, torch.no_grad():
        logits = model(input_ids=ids).logits
    lens = observe.LogitLens(model)
    torch.testing.assert_close(lens(taken[-1]), logits, rtol=1e-5, atol=1e-5)


def test_soft_cap_and_formula_at_a_middle_layer():
    model, ids = by_hand.build("gemma2", final_logit_softcapping=3.0), models.tokens(1, 5)
    with fs.hf.read(model, "resid_pre", [1]) as taken, torch.no_grad():
        model(input_ids=ids)
    h = taken[1].double()
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + model.model.norm.weight.double())
    expected = 3 * torch.tanh(normed @ model.lm_head.weight.double().T / 3)
    torch.testing.assert_close(observe.LogitLens(model)(taken[1]).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_directions_add_up_to_the_state(name):
    """Under the state's own scale, the logits of its parts add up to its own (but for the norm's bias and the cap)."""
    model = by_hand.build(name, torch.float64, **({"final_logit_softcapping": None} if name == "gemma2" else {}))
    lens = observe.LogitLens(model)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, models.HIDDEN, generator=generator, dtype=torch.float64)
    bias = model.lm_head(model.transformer.ln_f.bias) if name == "gpt2" else 0
    parts = lens.direction(a, at=a + b) + lens.direction(b, at=a + b) + bias
    torch.testing.assert_close(parts, lens(a + b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lens.difference(a, b), lens(b) - lens(a))
    assert lens.direction(a).argmax(-1).equal(lens.direction(5 * a).argmax(-1))


def test_top_tokens():
    model, tokenizer = fs.demo.load()
    lens = observe.LogitLens(model)
    states = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = lens.top_tokens(states, tokenizer, 4)
    order = lens(states).argsort(-1, descending=True)
    assert found[1][2] == [tokenizer.decode([i]) for i in order[1, 2, :4].tolist()]
    lowest = lens.top_tokens(states[0, 0], tokenizer, 2, largest=False)
    assert lowest == [tokenizer.decode([i]) for i in order[0, 0].flip(0)[:2].tolist()]


def test_models_without_logits_are_refused():
    with pytest.raises(ValueError, match="causal language model"):
        observe.LogitLens(by_hand.build("llama").model)
    odd = by_hand.build("llama")
    odd.config.final_logit_softcapping = 2.0  # which this architecture does not know
    with pytest.raises(ValueError, match="soft cap or scale"):
        observe.LogitLens(odd)
