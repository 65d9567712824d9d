"""KL against scipy and against 60 digits, and on a model against hooks written by hand."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import tiny_chat
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from faststeer import Add, Plan
from faststeer.evaluate import kl_divergence, kl_on
from faststeer.hf.batching import encode

EPS = np.finfo(np.float64).eps


def exact_kl(base, steered):
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(float(x))) for x in row] for row in (base, steered))
        sum_p, sum_q = mpmath.fsum(p), mpmath.fsum(q)
        return mpmath.fsum(a / sum_p * mpmath.log(a / sum_p / (b / sum_q)) for a, b in zip(p, q, strict=True))


@given(st.data())
def test_kl_is_its_definition(data):
    size = data.draw(st.integers(1, 20))
    rows = st.lists(st.floats(-300, 300), min_size=size, max_size=size)
    base, steered = data.draw(rows), data.draw(rows)
    found = kl_divergence(*(torch.tensor([row], dtype=torch.float64) for row in (base, steered))).item()
    # Each log-probability is off by eps times the largest logit a few times over, and its weights add up to one; log p
    # in the exponent makes a weight off by as much, relatively, times a difference of up to twice their range.
    largest = max(map(abs, base + steered))
    error = 2 * EPS * (4 * largest + size + 4)
    assert abs(found - float(exact_kl(base, steered))) <= error * (1 + 4 * largest)


def test_kl_agrees_with_scipy():
    base, steered = torch.randn(2, 5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = rel_entr(softmax(base.numpy(), -1), softmax(steered.numpy(), -1)).sum(-1)
    # Logits of size 5 and 100 terms: the bound of the test above.
    np.testing.assert_allclose(kl_divergence(base, steered).numpy(), expected, rtol=0, atol=2 * EPS * 124 * 21)


def test_kl_of_equals_is_zero_and_a_shift_of_all_logits_changes_nothing_much():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits).tolist() == [0.0] * 3
    assert kl_divergence(logits.double(), logits.double() + 8).abs().max() <= 2 * EPS * (4 * 12 + 54)


def test_kl_with_impossible_tokens():
    inf = torch.inf
    base = torch.tensor([[0.0, -inf, 0.0], [0.0, 0.0, -inf], [0.0, -inf, -inf]])
    steered = torch.tensor([[0.0, 5.0, -inf], [0.0, 0.0, -inf], [0.0, 0.0, -inf]])
    infinite, equal, half = kl_divergence(base, steered).tolist()
    assert infinite == np.inf
    assert equal == 0.0
    assert half == pytest.approx(np.log(2), abs=4 * EPS)


def test_kl_refuses_other_shapes():
    for base, steered in ((torch.zeros(3), torch.zeros(3)), (torch.zeros(1, 3), torch.zeros(1, 4))):
        with pytest.raises(ValueError, match=r"expected the same \[batch, vocabulary\]"):
            kl_divergence(base, steered)


def kl_by_hand(model, encoded, direction, layer):
    def add(module, args):
        return (args[0] + direction.to(args[0]),)

    found = []
    for ids in encoded:
        with torch.no_grad():
            base = model(torch.tensor([ids])).logits[0, -1].double().numpy()
            handle = model.model.layers[layer].register_forward_pre_hook(add)
            steered = model(torch.tensor([ids])).logits[0, -1].double().numpy()
            handle.remove()
        found.append(rel_entr(softmax(base), softmax(steered)).sum())
    return np.array(found)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_kl_on_is_in_the_order_of_the_prompts(tokenizer, batch_size):
    prompts = tiny_chat.HARMFUL + tiny_chat.HARMLESS
    encoded = encode(tokenizer, prompts)
    model, exact = tiny_chat.llama(len(tokenizer)), tiny_chat.llama(len(tokenizer)).double()
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    plans = [Plan([Add(direction, 1.0, layers=1, at="resid_pre")]) for direction in directions]
    both = kl_on(model, tokenizer, plans, prompts, batch_size=batch_size)
    assert both.shape == (2, len(prompts))
    assert both.dtype == torch.float64
    plain = [kl_by_hand(model, encoded, direction, 1) for direction in directions]
    tiny_chat.assert_no_worse(both, plain, [kl_by_hand(exact, encoded, direction, 1) for direction in directions])
    one = kl_on(model, tokenizer, plans[0], prompts, batch_size=batch_size)
    assert one.shape == (len(prompts),)
    tiny_chat.assert_no_worse(one, plain[0], kl_by_hand(exact, encoded, directions[0], 1))
