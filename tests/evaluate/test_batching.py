"""Prompts become the tokens the model expects, and neither padding nor company in the batch changes what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny_chat
import torch
from hypothesis import given
from hypothesis import strategies as st

from faststeer import Add, Plan
from faststeer.hf import render, tokenize
from faststeer.hf.batching import batches, encode, pad
from faststeer.hf.last_tokens import last_tokens

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bake a cake"}]


def test_render_applies_the_template_with_its_generation_prompt(tokenizer):
    assert render(tokenizer, ["Hi"]) == ["<|begin|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]


def test_system_prompt_comes_first_whoever_gives_it(tokenizer):
    assert render(tokenizer, ["Bake a cake"], system="Be kind.") == render(tokenizer, [CHAT])


def test_a_begun_answer_is_continued(tokenizer):
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Let me"}]
    assert render(tokenizer, [begun]) == [render(tokenizer, ["Hi"])[0] + "Let me"]


def test_without_a_template_the_text_is_taken_as_it_is(plain_tokenizer):
    assert render(plain_tokenizer, [" Once\nupon "]) == [" Once\nupon "]


def test_the_tokenizer_is_left_as_it_was(inst_tokenizer):
    before = inst_tokenizer.padding_side, inst_tokenizer.pad_token
    tokenize(inst_tokenizer, ["Hi", "Name three colours"])
    assert (inst_tokenizer.padding_side, inst_tokenizer.pad_token) == before


@pytest.mark.parametrize("name", ["tokenizer", "plain_tokenizer", "inst_tokenizer"])
def test_exactly_one_begin_of_sequence_token(name, request):
    tok = request.getfixturevalue(name)
    for ids in encode(tok, ["Bake a cake", "Hi"]):
        assert ids.count(tok.bos_token_id) == 1
        assert ids[0] == tok.bos_token_id


def test_a_begin_of_sequence_token_written_by_hand_is_not_doubled(plain_tokenizer):
    assert encode(plain_tokenizer, ["<|begin|>Hi"]) == encode(plain_tokenizer, ["Hi"])


@pytest.mark.parametrize("name", ["tokenizer", "plain_tokenizer", "inst_tokenizer"])
def test_rows_end_in_the_last_column(name, request):
    tok = request.getfixturevalue(name)
    prompts = ["Hi", "Name three colours, please", "Why?"]
    batch, alone = tokenize(tok, prompts), [encode(tok, [prompt])[0] for prompt in prompts]
    for row, ids in enumerate(alone):
        width = batch["input_ids"].shape[1]
        assert batch["input_ids"][row, width - len(ids) :].tolist() == ids
        assert batch["attention_mask"][row].tolist() == [0] * (width - len(ids)) + [1] * len(ids)
        assert batch["position_ids"][row, width - len(ids) :].tolist() == list(range(len(ids)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 20))
def test_batches_hold_every_row_once_with_least_padding(lengths, batch_size):
    groups = batches(lengths, batch_size)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == batch_size for group in groups[:-1])
    # Sorted rows have the least padding that full batches can have: no batch reaches into the next one's lengths.
    for longer, shorter in pairwise(groups):
        assert min(lengths[i] for i in longer) >= max(lengths[i] for i in shorter)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", "prompts is one str: expected a list"),
        ([], "prompts is empty"),
        (["Hi", "  "], r"prompts\[1\] is blank"),
        ([7], r"prompts\[0\] is of type int"),
        ([[]], r"prompts\[0\] is a chat without messages"),
        (["Hi", [{"role": "user"}]], r"prompts\[1\] holds .*, which is no message"),
        (None, "prompts is one NoneType"),
    ],
)
def test_what_is_no_prompt_is_refused_by_number(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        render(tokenizer, prompts)


def test_two_system_prompts_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[0\] has a system message of its own"):
        render(tokenizer, [CHAT], system="Be rude.")


def test_chats_need_a_template(plain_tokenizer):
    for prompts, system in (([CHAT], None), (["Hi"], "Be kind.")):
        with pytest.raises(ValueError, match="no chat template"):
            render(plain_tokenizer, prompts, system)


def test_a_template_that_knows_no_system_role_says_so(inst_tokenizer):
    with pytest.raises(ValueError, match=r"refuses messages by system, user \(no system role\)"):
        render(inst_tokenizer, ["Hi"], system="Be kind.")


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches([1, 2], 0)


def test_training_mode_is_refused(tokenizer):
    model = tiny_chat.llama(len(tokenizer)).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        next(last_tokens(model, [[3, 4]], [(0, None)]))


def unpadded(model, encoded):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in encoded])


@pytest.mark.parametrize("make", [tiny_chat.llama, tiny_chat.gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_logits_do_not_depend_on_padding_or_batch_size(tokenizer, make, batch_size):
    model, exact = make(len(tokenizer)), make(len(tokenizer)).double()
    encoded = encode(tokenizer, tiny_chat.HARMFUL + tiny_chat.HARMLESS)
    assert len({len(ids) for ids in encoded}) > 3
    ours = torch.full((len(encoded), len(tokenizer)), torch.nan)
    rows = [(prompt, None) for prompt in range(len(encoded))]
    for numbers, logits, _ in last_tokens(model, encoded, rows, batch_size=batch_size):
        ours[numbers] = logits
    tiny_chat.assert_no_worse(ours, unpadded(model, encoded), unpadded(exact, encoded))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_row_gets_its_own_plan(tokenizer, batch_size):
    model, exact = tiny_chat.llama(len(tokenizer)), tiny_chat.llama(len(tokenizer)).double()
    encoded = encode(tokenizer, tiny_chat.HARMFUL)
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    plans = [None] + [Plan([Add(d, 1.0, layers=1, at="resid_pre")]) for d in directions]
    rows = [(prompt, plan) for plan in plans for prompt in range(len(encoded))]
    ours = torch.full((len(rows), len(tokenizer)), torch.nan)
    for numbers, logits, _ in last_tokens(model, encoded, rows, batch_size=batch_size):
        ours[numbers] = logits

    def by_hand(model):
        found = []
        for direction in [None, *directions]:

            def add(module, args, direction=direction):
                return (args[0] + direction.to(args[0]),)

            handle = model.model.layers[1].register_forward_pre_hook(add) if direction is not None else None
            found.append(unpadded(model, encoded))
            if handle:
                handle.remove()
        return torch.cat(found)

    tiny_chat.assert_no_worse(ours, by_hand(model), by_hand(exact))


def test_the_model_is_as_before_when_only_some_logits_are_taken(model, tokenizer):
    encoded = encode(tokenizer, tiny_chat.HARMFUL)
    before = unpadded(model, encoded)
    plan = Plan([Add(torch.ones(32), 1.0, layers=0, at="resid_pre")])
    steered = last_tokens(model, encoded, [(0, plan), (1, plan)], batch_size=1)
    next(steered)
    steered.close()
    assert torch.equal(unpadded(model, encoded), before)


def test_pad_masks_what_it_fills_in():
    batch = pad([[5, 6, 7], [8]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
