"""Completions come in the order of the prompts, each under its own plan, whatever the batches."""

from __future__ import annotations

import pytest
import tiny_chat
import torch

from faststeer import Add, Plan
from faststeer.evaluate import complete
from faststeer.hf.batching import encode

NEW = 6


@pytest.fixture(scope="module")
def exact(tokenizer):
    """In fp64 no padding changes a greedy choice unless two logits agree to twelve digits."""
    return tiny_chat.llama(len(tokenizer)).double()


def by_hand(model, tokenizer, prompt, direction=None):
    """Greedy, one prompt at a time, without cache; the direction is added by a hook written out."""

    def add(module, args):
        return (args[0] + direction.to(args[0]),)

    handle = model.model.layers[1].register_forward_pre_hook(add) if direction is not None else None
    ids = list(encode(tokenizer, [prompt])[0])
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + NEW:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == model.generation_config.eos_token_id:
                break
            ids.append(token)
    if handle:
        handle.remove()
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_unsteered_completions(exact, tokenizer, batch_size):
    prompts = tiny_chat.HARMFUL + tiny_chat.HARMLESS
    expected = [by_hand(exact, tokenizer, prompt) for prompt in prompts]
    assert len(set(expected)) > 3
    assert complete(exact, tokenizer, prompts, max_new_tokens=NEW, batch_size=batch_size) == expected


@pytest.mark.parametrize("batch_size", [2, 32])
def test_one_plan_per_prompt(exact, tokenizer, batch_size):
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(5)) * 3
    prompts = tiny_chat.HARMFUL
    choice = [None, 0, 1, None, 0]
    plans = [Plan([Add(direction, 1.0, layers=1, at="resid_pre")]) for direction in directions]
    found = complete(
        exact, tokenizer, prompts, [None if c is None else plans[c] for c in choice], max_new_tokens=NEW,
        batch_size=batch_size,
    )  # fmt: skip
    expected = [
        by_hand(exact, tokenizer, prompt, None if c is None else directions[c])
        for prompt, c in zip(prompts, choice, strict=True)
    ]
    assert found == expected
    plain = complete(exact, tokenizer, prompts, max_new_tokens=NEW)
    assert [a == b for a, b in zip(found, plain, strict=True)] == [c is None for c in choice]
    everywhere = complete(exact, tokenizer, prompts, plans[0], max_new_tokens=NEW)
    assert everywhere == [by_hand(exact, tokenizer, prompt, directions[0]) for prompt in prompts]


def test_completions_end_at_the_end_token(tokenizer):
    model = tiny_chat.llama(len(tokenizer)).double()
    prompt = tiny_chat.HARMLESS[0]
    whole = encode(tokenizer, [prompt])[0]
    with torch.no_grad():
        ids = model.generate(torch.tensor([whole]), max_new_tokens=NEW, do_sample=False)[0, len(whole) :].tolist()
    # Make the third token the end: what is left are the two before it, also beside a row that goes on.
    assert ids[2] not in ids[:2]
    model.generation_config.eos_token_id = [ids[2]]
    texts = complete(model, tokenizer, [prompt, *tiny_chat.HARMFUL], max_new_tokens=NEW)
    assert texts[0] == tokenizer.decode(ids[:2], skip_special_tokens=True)
    assert any(len(text) > len(texts[0]) for text in texts[1:])


def test_sampling_settings_of_the_model_are_not_used(tokenizer):
    model = tiny_chat.llama(len(tokenizer))
    expected = complete(model, tokenizer, tiny_chat.HARMFUL, max_new_tokens=NEW)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.num_beams = 3
    assert complete(model, tokenizer, tiny_chat.HARMFUL, max_new_tokens=NEW) == expected


def test_wrong_calls(model, tokenizer):
    plan = Plan([Add(torch.ones(32), layers=1)])
    with pytest.raises(ValueError, match="1 plans for 2 prompts"):
        complete(model, tokenizer, ["a", "b"], [plan])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        complete(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        complete(model, tokenizer, [])
    with pytest.raises(ValueError, match="hidden size 8"):
        complete(model, tokenizer, ["a"], Plan([Add(torch.ones(8), layers=1)]))
