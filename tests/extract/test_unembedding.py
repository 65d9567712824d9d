"""Unembedding directions against the gradient of the logits, on models with every kind of final norm."""

from __future__ import annotations

import models
import pytest
import tiny_chat
import torch

from faststeer.extract.unembedding import unembedding
from faststeer.hf.norms import final_norm

TOKENIZER = tiny_chat.bpe_tokenizer()


class NoTokenizer:
    def __call__(self, *args, **kwargs):
        raise AssertionError("ids need no tokenizer")


def gradient(model, h, tokens, against):
    """d (mean logit of tokens - mean logit of against) / d h, h being the last layer's output, by autograd through the
    model itself."""
    leaf = h.clone().requires_grad_()
    points = __import__("faststeer").hf.find_hook_points(model)
    layer = points.layer(model, points.n_layers - 1)

    def replace(module, args, output):
        first = output if isinstance(output, torch.Tensor) else output[0]
        new = leaf.expand_as(first)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = layer.register_forward_hook(replace)
    try:
        logits = model(torch.tensor([[3, 4, 5]])).logits[0, -1]
    finally:
        handle.remove()
    value = logits[tokens].mean() - (logits[against].mean() if against else logits.mean())
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox_sequential", "qwen3", "phi"])
@pytest.mark.parametrize("against", [None, [7, 50]])
def test_direction_is_the_gradient_but_for_its_part_along_the_stream(name, against):
    model = models.build(name).double()
    tokens = [5, 11, 12]
    vector = unembedding(model, NoTokenizer(), tokens, against)
    assert (vector.method, vector.scale, vector.layers) == ("unembedding", "unit", (0, 1))
    ours = vector[1].double()
    assert torch.equal(vector[0], vector[1])
    centred = final_norm(model).centred
    assert centred == (name in ("gpt2", "neox_sequential", "phi"))
    for seed in range(3):
        h = 5 * torch.randn(models.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        exact = gradient(model, h, tokens, against)
        # A norm's answer to a longer h has no gradient; that part of ours goes, too.
        along = h - h.mean() if centred else h
        rest = ours - (ours @ along) / (along @ along) * along
        assert torch.cosine_similarity(rest, exact, dim=0) > 1 - 1e-5
        assert ours @ exact > 0


def test_texts_are_tokens_too():
    model = tiny_chat.llama(len(TOKENIZER))
    [token] = TOKENIZER("I", add_special_tokens=False)["input_ids"]
    assert torch.equal(unembedding(model, TOKENIZER, ["I"])[1], unembedding(model, TOKENIZER, [token])[1])
    chosen = unembedding(model, TOKENIZER, ["I"], layers=[2], at="resid_post")
    assert (chosen.layers, chosen.at) == ((2,), "resid_post")


@pytest.mark.parametrize(
    ("tokens", "against", "message"),
    [
        ([], None, "expected a list of token ids"),
        ("I", None, "expected a list of token ids"),
        (["a rose is a rose"], None, "'a rose is a rose' is .* tokens"),
        ([5000], None, "5000 is no token of a vocabulary of"),
        ([True], None, "True is no token"),
        ([5], [5], "are both in tokens and in against"),
    ],
)
def test_tokens_that_are_none(tokens, against, message):
    with pytest.raises(ValueError, match=message):
        unembedding(tiny_chat.llama(len(TOKENIZER)), TOKENIZER, tokens, against)


def test_a_model_whose_stream_the_unembedding_does_not_read():
    model = models.build("llama")
    inner = model.model.norm

    class Twice(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(inner(x))

    model.model.norm = Twice()
    with pytest.raises(ValueError, match="neither RMSNorm nor LayerNorm"):
        unembedding(model, NoTokenizer(), [5])
    with pytest.raises(ValueError, match="no output embedding"):
        unembedding(models.build("llama").model, NoTokenizer(), [5])


def test_half_precision_reads_the_same_direction():
    model = models.build("gemma3")
    exact = unembedding(model, NoTokenizer(), [5])[1]
    assert (unembedding(model.bfloat16(), NoTokenizer(), [5])[1] - exact).norm() <= 2 * 2**-9  # weight and rows
