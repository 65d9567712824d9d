"""What answers prompts: Hugging Face's generate gives what the Engine gives, and is taken where the Engine refuses."""

from __future__ import annotations

import pytest
import tiny_chat
import torch

import faststeer as fs
from faststeer.evaluate.generate import HuggingFace, completions, generator
from faststeer.generator import SamplingParams
from faststeer.hf.batching import encode
from faststeer.hf.freeze import freeze

PROMPTS = tiny_chat.HARMFUL + tiny_chat.HARMLESS


@pytest.fixture
def exact(tokenizer):
    """In fp64 no padding changes a draw unless two sums agree to many digits. Each test may change its config."""
    return tiny_chat.llama(len(tokenizer)).double()


@pytest.fixture
def plans():
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(5)) * 3
    made = [fs.Plan([fs.Add(direction, 1.0, layers=1)]) for direction in directions]
    return [[None, *made][i % 3] for i in range(len(PROMPTS))]


def told(answers):
    return {a.index: (a.text, a.token_ids, a.prompt_ids, a.finish_reason, a.stop_token) for a in answers}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(8),
        SamplingParams([1, 2, 3, 4, 5, 6, 7, 8, 9, 3]),
        SamplingParams(8, temperature=0.9, seed=3),
        SamplingParams(8, temperature=[0.0, 0.7, 1.3, 0.0, 2.0] * 2, top_k=[0, 5] * 5, top_p=0.8, seed=list(range(10))),
        SamplingParams(12, temperature=1.5, seed=1, stop=["e", 40]),
    ],
)
def test_the_same_answers_as_the_engine(exact, tokenizer, plans, sampling):
    encoded = encode(tokenizer, PROMPTS)
    engine = fs.Engine(exact, tokenizer, max_batch=4, max_length=128)
    expected = told(engine.complete(encoded, plans, sampling))
    assert told(HuggingFace(exact, tokenizer, max_batch=3).complete(PROMPTS, plans, sampling)) == expected
    assert len(expected) == len(PROMPTS) and len({each[0] for each in expected.values()}) > 3
    if sampling.stop:
        assert {each[3] for each in expected.values()} == {"stop", "length"}


def test_which_one_answers(exact, tokenizer):
    assert isinstance(generator(exact, tokenizer), fs.Engine)
    frozen = generator(exact, tokenizer, within=freeze)
    assert isinstance(frozen, HuggingFace) and "another context" in frozen.why
    with fs.steer(exact, fs.Plan([fs.Add(torch.ones(32), layers=1)])):
        assert "steered already" in generator(exact, tokenizer).why
    exact.generation_config.repetition_penalty = 1.0  # changes nothing
    exact.generation_config.max_length = 7
    assert isinstance(generator(exact, tokenizer), fs.Engine)
    exact.generation_config.repetition_penalty = 1.5
    asked = generator(exact, tokenizer)
    assert isinstance(asked, HuggingFace) and "repetition_penalty" in asked.why
    assert "max_length is 4096" in generator(tiny_chat.llama(len(tokenizer)), tokenizer, max_length=4096).why


def test_penalties_of_the_model_are_in_force(exact, tokenizer):
    exact.generation_config.repetition_penalty = 3.0
    ids = encode(tokenizer, PROMPTS[:1])
    expected = exact.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)[0, len(ids[0]) :].tolist()
    (found,) = completions(exact, tokenizer, ids, None, SamplingParams(8))
    assert found.token_ids == expected[: len(found.token_ids)] and len(found.token_ids) > 2
    exact.generation_config.repetition_penalty = 1.0
    assert completions(exact, tokenizer, ids, None, SamplingParams(8))[0].token_ids != found.token_ids


def test_an_answer_whose_logits_are_not_finite_ends_there(tokenizer):
    model = tiny_chat.llama(len(tokenizer)).half()
    plan = fs.Plan([fs.Add(torch.ones(32), 6e4, layers=1, positions="generated")] * 2)
    encoded = encode(tokenizer, PROMPTS[:3])
    engine = fs.Engine(model, tokenizer, max_batch=4, max_length=64)
    for answering in (engine, HuggingFace(model, tokenizer)):
        answers = sorted(answering.complete(encoded, [None, plan, None], SamplingParams(4)), key=lambda a: a.index)
        assert [a.finish_reason for a in answers] == ["length", "error", "length"], answering
        assert "NaN or infinity" in str(answers[1].error) and len(answers[1].token_ids) == 1
    with pytest.warns(UserWarning, match="1 of 3 completions end early"):
        completions(model, tokenizer, encoded, [None, plan, None], SamplingParams(4))


def test_wrong_calls(exact, tokenizer):
    plain = HuggingFace(exact, tokenizer, why="of a test")
    with pytest.raises(ValueError, match=r"probe= needs the Engine.*of a test.*observe.capture"):
        plain.complete(PROMPTS, probe=torch.ones(32))
    with pytest.raises(ValueError, match="max_new_tokens has 1 numbers for 10 prompts"):
        plain.complete(PROMPTS, None, SamplingParams([4]))
    with pytest.raises(ValueError, match="temperature is -1"):
        plain.complete(PROMPTS, None, SamplingParams(temperature=-1.0))
    with pytest.raises(ValueError, match="holds the token 100000"):
        plain.complete([[1, 100_000]])
    exact.train()
    with pytest.raises(ValueError, match="training mode"):
        generator(exact, tokenizer)
