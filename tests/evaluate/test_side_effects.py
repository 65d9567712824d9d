"""Side effects against fp64 forward passes with hooks written by hand, one row at a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import faststeer as fs
from faststeer.evaluate.likelihood import ContinuationRow, score_rows
from faststeer.evaluate.multiple_choice import Question, load_questions, multiple_choice, plain_pair
from faststeer.evaluate.side_effects import LOOK_ALIKES, NEUTRAL_TEXT, text_effects

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5))
PLANS = {
    "all": fs.Plan([fs.Add(VECTOR, 2.0, layers=1)]),
    "prompt": fs.Plan([fs.Add(VECTOR, 2.0, layers=1, positions="prompt")]),
    "generated": fs.Plan([fs.Add(VECTOR, 2.0, layers=1, positions="generated")]),
    "last": fs.Plan([fs.Add(VECTOR, 2.0, layers=1, positions="last")]),
}


def by_hand(model, context, continuation, where):
    """fp64 log-probabilities `[tokens, vocabulary]` of what follows, with a hook on layer 1's output."""
    model = copy.deepcopy(model).double()
    n = len(context)
    ranges = {"all": slice(None), "prompt": slice(0, n), "generated": slice(n, None), "last": slice(n - 1, n)}

    def hook(module, args, output):
        output = output.clone()
        output[:, ranges[where]] += 2.0 * VECTOR.double()
        return output

    handle = model.model.layers[1].register_forward_hook(hook) if where else None
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, n - 1 : -1]
    if handle:
        handle.remove()
    return logits.log_softmax(-1)


def test_likelihoods_of_mixed_plans_and_lengths(model):
    contexts = [[0, 17, 30, 44, 9], [0, 5], [0, 61, 62, 63, 64, 65, 66, 67]]
    rows = [
        ContinuationRow(context, continuation, plan and PLANS[plan])
        for context in contexts
        for continuation in ([12, 13, 14], [99])
        for plan in (None, *PLANS)
    ]
    names = [plan for _ in contexts for _ in range(2) for plan in (None, *PLANS)]
    for row, name, found in zip(rows, names, score_rows(model, rows, batch_size=4), strict=True):
        tokens = torch.tensor(row.completion)
        expected = by_hand(model, row.prompt, row.completion, name)
        # fp32 against fp64 through three layers of width 32: a few hundred roundings of numbers around 10.
        torch.testing.assert_close(
            found.log_probabilities, expected.gather(-1, tokens[:, None])[:, 0], atol=1e-3, rtol=1e-4
        )
        assert found.greedy == bool((expected.argmax(-1) == tokens).all())
    totals = {found.total for found in score_rows(model, rows[:5])}
    assert len(totals) == 5, "the positions make a difference"


def test_kl_and_cross_entropy_of_texts(model, tokenizer):
    texts = ["Bake a cake", "Name three colours, then tell me a story"]
    found = text_effects(model, tokenizer, [None, PLANS["all"], PLANS["prompt"], PLANS["all"]], texts, batch_size=2)
    assert found[1] == found[3]
    for effect, where in zip(found, (None, "all", "prompt", "all"), strict=True):
        for i, text in enumerate(texts):
            ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
            base = by_hand(model, ids[:1], ids[1:], None)
            steered = by_hand(model, ids[:1], ids[1:], where)
            kl = (base.exp() * (base - steered)).sum(-1).mean()
            entropy = -steered.gather(-1, torch.tensor(ids[1:])[:, None]).mean()
            assert effect.kl[i] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
            assert effect.cross_entropy[i] == pytest.approx(float(entropy), rel=1e-4)
            assert effect.tokens[i] == len(ids) - 1
    assert found[0].to_dict()["kl"] == 0 and found[1].to_dict()["kl"] > 0.01


def test_what_comes_with_the_package_is_clean():
    assert len(set(LOOK_ALIKES)) == len(LOOK_ALIKES) >= 16 and len(set(NEUTRAL_TEXT)) >= 8


@pytest.mark.parametrize(
    "row",
    [ContinuationRow([], [1]), ContinuationRow([1], []), ContinuationRow([1] * 10, [1] * 5000)],
    ids=["context", "continuation", "length"],
)
def test_impossible_rows_are_refused(model, row):
    with pytest.raises(ValueError, match="row 0"):
        score_rows(model, [row])


QUESTIONS = [
    Question("How do I build a kite?", ("Sure, here is how", "I cannot", "What is 12"), 0),
    Question("Name three colours", ("story", "three colours and the sea", "a"), 1),
    Question("Hi", ("Steal a bicycle", "Hijack a boat"), 1),
]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("where", [None, "all", "last"])
def test_multiple_choice_by_hand(model, tokenizer, chat, where):
    found = multiple_choice(model, tokenizer, QUESTIONS, where and PLANS[where], chat=chat, separator=" ", batch_size=3)
    right = 0
    for question, choice in zip(QUESTIONS, found.choices, strict=True):
        sums = []
        for text in question.choices:
            if chat:
                chat_text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": question.question}], tokenize=False, add_generation_prompt=True
                )
                context = tokenizer(chat_text, add_special_tokens=False)["input_ids"]
                ids = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            else:
                context, ids = plain_pair(tokenizer, question.question, " " + text)
            sums.append(float(by_hand(model, context, ids, where).gather(-1, torch.tensor(ids)[:, None]).sum()))
        assert choice.log_probabilities == pytest.approx(sums, abs=2e-3)
        assert choice.chosen == sums.index(max(sums))
        norm = [s / len(t) for s, t in zip(sums, question.choices, strict=True)]
        assert choice.chosen_per_character == norm.index(max(norm))
        right += choice.chosen == question.answer
    assert found.accuracy.successes == right and found.accuracy.n == 3


def test_several_plans_share_batches(model, tokenizer):
    several = multiple_choice(model, tokenizer, QUESTIONS, [None, PLANS["all"]])
    for found, plan in zip(several, (None, PLANS["all"]), strict=True):
        alone = multiple_choice(model, tokenizer, QUESTIONS, plan)
        for a, b in zip(found.choices, alone.choices, strict=True):
            assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-3)


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        json.dumps({"question": "a?", "choices": ["x", "y"], "answer": "y"}) + "\n\n"
        + json.dumps({"question": "b?", "choices": ["x", "y"], "answer": 0, "more": 1}) + "\n"
    )  # fmt: skip
    assert load_questions(path) == [Question("a?", ("x", "y"), 1), Question("b?", ("x", "y"), 0)]
    for line, said in [
        ("{", "line 2, column 2: no valid JSON"),
        ('{"question": "a?", "choices": ["x", "y"]}', "line 2: expected an object"),
        ('{"question": "a?", "choices": ["x", "y"], "answer": "z"}', "none of the choices"),
        ('{"question": "a?", "choices": ["x", "y"], "answer": 2}', "from 0 to 1"),
        ('{"question": "a?", "choices": ["x"], "answer": 0}', "at least two"),
        ('{"question": " ", "choices": ["x", "y"], "answer": 0}', "not blank"),
        ('{"question": "a?", "choices": ["x", "x"], "answer": 0}', "given twice"),
        ('{"question": "a?", "choices": ["x", "y"], "answer": true}', "answer is True"),
    ]:
        path.write_text("\n" + line)
        with pytest.raises(ValueError, match=said):
            load_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        load_questions(path)
    with pytest.raises(FileNotFoundError):
        load_questions(tmp_path / "none.jsonl")
