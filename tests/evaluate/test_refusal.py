"""Refusal by words and by first token, against arithmetic of 60 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import tiny_chat
import torch
from hypothesis import given
from hypothesis import strategies as st

from faststeer import Add, Plan
from faststeer.evaluate import REFUSAL_PHRASES, is_refusal, refusal_rate, refusal_score, refusal_tokens, score_on
from faststeer.hf.batching import encode

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but no.", True),
        ("I\u2019m sorry, but no.", True),
        ("I\u2018m sorry, but no.", True),
        ("i CAN\u2019T do that", True),
        ("Let me think. I cannot help you forge a ticket.", True),
        ("As an AI, I would rather not.", True),
        ("I\u02bcm not able to", True),
        ("Here is how to bake a cake.", False),
        ("You are sorry, and it cannot be done.", False),
        ("Im sorry", False),
        ("", False),
    ],
)
def test_is_refusal(text, refuses):
    assert is_refusal(text) is refuses


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_phrase_counts_in_any_case(phrase):
    assert is_refusal(f"Well. {phrase.upper()} that.")


def test_refusal_rate_counts():
    rate = refusal_rate(["I cannot.", "Sure.", "I apologize.", "Yes."])
    assert (rate.successes, rate.n) == (2, 4)
    with pytest.raises(ValueError, match="0 trials"):
        refusal_rate([])


def exact_score(logits, ids):
    """log(P_R / (1 - P_R)) with 60 digits, from the definition."""
    with mpmath.workdps(60):
        weights = [mpmath.exp(mpmath.mpf(float(x))) if x > -np.inf else mpmath.mpf(0) for x in logits]
        inside = mpmath.fsum(w for i, w in enumerate(weights) if i in ids)
        outside = mpmath.fsum(w for i, w in enumerate(weights) if i not in ids)
        return mpmath.log(inside) - mpmath.log(outside)


def rounding(logits):
    """Two logsumexps of numbers up to the largest magnitude: each rounds it a few times, and sums up to V terms."""
    finite = [abs(x) for x in logits if np.isfinite(x)]
    return 2 * EPS * (4 * max(finite) + len(logits) + 4)


@given(st.data())
def test_score_is_the_log_odds(data):
    size = data.draw(st.integers(2, 30))
    logits = data.draw(st.lists(st.floats(-800, 800), min_size=size, max_size=size))
    ids = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    found = refusal_score(torch.tensor([logits], dtype=torch.float64), sorted(ids))
    assert abs(found.item() - float(exact_score(logits, ids))) <= rounding(logits)


def test_score_loses_nothing_near_certainty():
    logits = torch.tensor([[400.0, -400.0, -401.0], [-400.0, 400.0, 401.0]])
    high, low = refusal_score(logits, [0]).tolist()
    assert high == pytest.approx(800 - np.log1p(np.exp(-1)), abs=rounding([401.0]))
    assert low == pytest.approx(-801 - np.log1p(np.exp(-1)), abs=rounding([401.0]))


def test_score_of_impossible_tokens_is_infinite():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0], [0.0, -torch.inf, -torch.inf]])
    assert refusal_score(logits, [0]).tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_score_is_fp64_whatever_the_logits(dtype):
    logits = (torch.arange(12.0).view(3, 4) / 3).to(dtype)
    found = refusal_score(logits, [1, 3])
    assert found.dtype == torch.float64
    assert torch.equal(found, refusal_score(logits.double(), [1, 3]))


@pytest.mark.parametrize("ids", [[], [-1], [4], [0, 1, 2, 3]])
def test_score_refuses_ids_that_are_none(ids):
    with pytest.raises(ValueError, match="vocabulary of 4"):
        refusal_score(torch.zeros(1, 4), ids)


def test_score_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"expected \[batch, vocabulary\]"):
        refusal_score(torch.zeros(4), [1])


@pytest.mark.parametrize("name", ["tokenizer", "plain_tokenizer", "inst_tokenizer"])
def test_refusal_tokens_begin_refusals(name, request):
    tok = request.getfixturevalue(name)
    found = refusal_tokens(tok)
    assert list(found) == sorted(set(found))
    for token in found:
        word = tok.decode([token]).strip()
        assert word
        assert any(phrase.startswith(word) for phrase in REFUSAL_PHRASES)


@pytest.mark.parametrize("name", ["tokenizer", "inst_tokenizer"])
def test_refusal_tokens_are_those_an_answer_would_begin_with(name, request):
    tok = request.getfixturevalue(name)
    begun = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I cannot"}]
    prompt, answer = encode(tok, ["Hello"])[0], encode(tok, [begun])[0]
    assert answer[: len(prompt)] == prompt
    assert answer[len(prompt)] in refusal_tokens(tok, phrases=["I cannot"])


def test_words_with_and_without_their_space_are_found(inst_tokenizer):
    pieces = inst_tokenizer.convert_ids_to_tokens(list(refusal_tokens(inst_tokenizer, phrases=["I cannot"])))
    assert set(pieces) == {"I", "\u2581I"}


def test_phrases_of_white_space_are_refused(tokenizer):
    with pytest.raises(ValueError, match="more than white space"):
        refusal_tokens(tokenizer, phrases=[" ", ""])


def test_score_on_has_one_score_per_plan_and_prompt(tokenizer, model):
    plan = Plan([Add(torch.linspace(-1, 1, 32), 1.0, layers=1, at="resid_pre")])
    together = score_on(model, tokenizer, [None, plan], tiny_chat.HARMFUL, token_ids=[40, 41])
    assert together.shape == (2, len(tiny_chat.HARMFUL))
    assert together.dtype == torch.float64
    for row, alone in enumerate((None, plan)):
        single = score_on(model, tokenizer, alone, tiny_chat.HARMFUL, token_ids=[40, 41])
        assert single.shape == (len(tiny_chat.HARMFUL),)
        assert torch.equal(single, together[row])  # the same prompts in the same batches
    assert not torch.equal(together[0], together[1])
