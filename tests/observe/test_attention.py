"""What attention reads, of every architecture alike: patterns, and the weights by their names."""

from __future__ import annotations

import by_hand
import models
import pytest
import torch

from faststeer import observe

EXCHANGEABLE = sorted(set(models.ARCHITECTURES) - {"falcon"})


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_patterns_are_those_of_the_eager_model(name):
    model = models.model(name)
    batch = models.left_padded([models.tokens(1, n, seed=n)[0] for n in (4, 7)])
    real = batch["attention_mask"].bool()
    eager = by_hand.eager_copy(model, torch.float32)
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
    patterns = {}

    def note(call):
        patterns[call.layer] = call.weights()
        out = call.attend()
        again = call.attend(value=call.value)
        assert torch.equal(out, again)
        return out

    before = model(**batch).logits
    with observe.exchange_attention(model, note), torch.no_grad():
        found = model(**batch).logits
    torch.testing.assert_close(found[real], before[real], rtol=1e-5, atol=1e-5)
    assert sorted(patterns) == list(range(models.N_LAYERS))
    for layer, pattern in patterns.items():
        by_token = pattern.transpose(1, 2)[real]
        torch.testing.assert_close(by_token, expected[layer].transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_token.sum(-1), torch.ones(by_token.shape[:-1]), rtol=1e-5, atol=1e-5)


def test_sliding_window_shows_in_the_pattern():
    model = by_hand.build("gemma2", sliding_window=3)
    with observe.exchange_attention(model, lambda call: seen.__setitem__(call.layer, call.weights()) or call.attend()):
        seen = {}
        model(input_ids=models.tokens(1, 8))
    distance = torch.arange(8)[:, None] - torch.arange(8)
    kinds = model.config.layer_types
    for layer, pattern in seen.items():
        outside = (pattern[:, :, (distance >= 3)] != 0).any()
        assert bool(outside) == (kinds[layer] == "full_attention")


def weights_by_name(name, layer):
    """(W_V `[kv_heads * 8, hidden]`, W_O `[hidden, heads * 8]`) of a layer, by somebody who knows the architecture."""
    if name == "gpt2":
        return layer.attn.c_attn.weight[:, 64:].T, layer.attn.c_proj.weight.T
    if name.startswith("neox"):
        return layer.attention.query_key_value.weight.view(4, 3, 8, 32)[:, 2].reshape(
            32, 32
        ), layer.attention.dense.weight
    if name == "phi3":
        return layer.self_attn.qkv_proj.weight[-16:], layer.self_attn.o_proj.weight
    attention = layer.self_attn
    out = next(getattr(attention, n) for n in ("o_proj", "out_proj", "dense") if hasattr(attention, n))
    return attention.v_proj.weight, out.weight


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_weights_by_their_names(name):
    model = models.model(name)
    layers = model.get_submodule(models.MODULES[name].layers)
    for layer, part in zip(layers, observe.find_parts(model), strict=True):
        value, output = weights_by_name(name, layer)
        assert torch.equal(part.value_matrix(layer).flatten(0, 1), value)
        assert torch.equal(part.output_matrix(layer).transpose(0, 1).flatten(1), output)
        assert (part.heads, part.head_dim) == (4, 8)
        x = 2 * torch.randn(3, models.HIDDEN, generator=torch.Generator().manual_seed(0))
        for norm in (part.attention_norm, part.mlp_norm, part.output_norm):
            if norm is not None:
                module = layer.get_submodule(norm.path)
                bias = getattr(module, "bias", None)
                expected = module(x) - (0 if bias is None else bias)
                torch.testing.assert_close(norm.scale(x) * norm.linear(layer, x), expected, rtol=1e-5, atol=1e-5)
    sandwich = name in ("gemma2", "gemma3", "olmo2")
    assert (part.output_norm is not None) == sandwich
    assert (part.attention_norm is None) == (name == "olmo2")


def test_one_exchange_at_a_time_and_exceptions_restore():
    model, ids = models.model("llama"), models.tokens(1, 5)
    before = model(input_ids=ids).logits

    def broken(call):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observe.exchange_attention(model, broken):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, before)
    with observe.exchange_attention(model, lambda call: call.attend()):
        with pytest.raises(RuntimeError, match="exchanged already"):
            observe.exchange_attention(model, broken).__enter__()
        torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_parts_are_found_anew_when_layers_change():
    model = models.build("llama")
    assert len(observe.find_parts(model)) == models.N_LAYERS
    del model.model.layers[1]
    assert len(observe.find_parts(model)) == models.N_LAYERS - 1
