"""Pairs out of the demo model's own answers."""

from __future__ import annotations

import pytest
from training import ntp

from faststeer import SteeringVector, demo
from faststeer.evaluate import is_refusal
from faststeer.extract import dim, random_like, steered_pairs

pytestmark = pytest.mark.skipif(
    not (demo.FOLDER / "model.safetensors").is_file(), reason="the demo model has not been trained"
)


@pytest.fixture(scope="module")
def chat():
    return demo.load()


@pytest.fixture(scope="module")
def vector(chat):
    model, tokenizer = chat
    found = dim(model, tokenizer, *(side[:32] for side in demo.prompts("refusal", "train")))
    return SteeringVector({2: found[2]}, at=found.at, model=found.model, method="dim")


def test_chosen_answers_are_steered_and_rejected_ones_are_not(chat, vector):
    model, tokenizer = chat
    harmful, harmless = (side[:8] for side in demo.prompts("refusal", "validation"))
    pairs = steered_pairs(model, tokenizer, vector, harmless, harmful)
    assert len(pairs) >= 13
    assert {pair.prompt for pair in pairs if pair.sign == 1} <= set(harmless)
    for pair in pairs:
        assert is_refusal(pair.positive) and not is_refusal(pair.negative)
        assert demo.classify(pair.rejected) in ("refusal", "compliance")
    # Their order is that of the prompts, and they are what training takes.
    assert [p.prompt for p in pairs] == [q for q in [*harmless, *harmful] if q in {p.prompt for p in pairs}]
    assert ntp(model, tokenizer, pairs, layers=2, steps=1, batch_size=2).vector.layers == (2,)


def test_the_judge_decides(chat, vector):
    model, tokenizer = chat
    harmful, harmless = (side[:4] for side in demo.prompts("refusal", "validation"))
    with pytest.raises(ValueError, match="changes the verdict on none of 8 prompts"):
        steered_pairs(model, tokenizer, vector, harmless, harmful, judge=lambda text: 0, max_new_tokens=4)
    with pytest.raises(ValueError, match="none of 8 prompts"):
        steered_pairs(model, tokenizer, random_like(vector, 0), harmless, harmful, max_new_tokens=16)
    with pytest.raises(ValueError, match="none of 8"):
        steered_pairs(model, tokenizer, vector, harmless, harmful, coherence=lambda text: False, max_new_tokens=16)
    seen = []
    with pytest.warns(UserWarning, match="only 2 of 8 prompts"):
        few = steered_pairs(
            model, tokenizer, vector, harmless, harmful, max_new_tokens=16,
            coherence=lambda text: len(seen) < 2 and not seen.append(text),
        )  # fmt: skip
    assert [pair.chosen for pair in few] == seen


def test_no_prompts(chat, vector):
    with pytest.raises(ValueError, match="induce is empty"):
        steered_pairs(*chat, vector, [], ["a"])
