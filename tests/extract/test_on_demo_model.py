"""The whole way on the model that comes with the package: contrast prompts in, a direction out that makes it refuse."""

from __future__ import annotations

import warnings

import pytest

from faststeer import Add, Plan, demo
from faststeer.evaluate import complete, refusal_rate, refusal_tokens, score_on
from faststeer.extract import candidates, post_instruction_positions, random_like, select

pytestmark = pytest.mark.skipif(
    not (demo.FOLDER / "model.safetensors").is_file(), reason="the demo model has not been trained"
)
COUNT = 48


@pytest.fixture(scope="module")
def chat():
    return demo.load()


@pytest.fixture(scope="module")
def opener(chat):
    """What most of its answers begin with, whether they refuse or not: without it the first token decides little."""
    model, tokenizer = chat
    texts = complete(model, tokenizer, demo.prompts("refusal", "validation")[1][:32], max_new_tokens=12)
    sentences = [text[: text.index(".") + 1] + text[text.index(".") + 1 :][:1] for text in texts if "." in text]
    return max(set(sentences), key=sentences.count)


@pytest.fixture(scope="module")
def chosen(chat, opener):
    model, tokenizer = chat
    found = candidates(model, tokenizer, *demo.prompts("refusal", "train"), positions=[-4, -1], batch_size=64)
    begun = [
        [[{"role": "user", "content": text}, {"role": "assistant", "content": opener}] for text in side[:16]]
        for side in demo.prompts("refusal", "validation")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limits are those of real models
        return select(model, tokenizer, found, *begun)


def test_template_and_refusal_tokens(chat):
    _, tokenizer = chat
    assert post_instruction_positions(tokenizer) == [-4, -3, -2, -1]
    words = {tokenizer.decode([token]) for token in refusal_tokens(tokenizer)}
    assert {"I", "As"} <= words


def test_score_tells_harmful_from_harmless(chat):
    model, tokenizer = chat
    harmful, harmless = (score_on(model, tokenizer, None, side[:COUNT]) for side in demo.prompts("refusal", "test"))
    assert harmful.min() > harmless.max()


def test_selection_finds_where_the_model_decides(chosen):
    assert chosen.unsteered["harmful"] > 0 > chosen.unsteered["harmless"]
    assert "half way" not in chosen.relaxed
    assert chosen.chosen.position == -1
    assert chosen.chosen.bypass < chosen.unsteered["harmful"]
    assert chosen.chosen.induce > chosen.unsteered["harmless"]


def test_the_direction_steers_and_a_random_one_does_not(chat, chosen):
    model, tokenizer = chat
    harmful, harmless = (side[:COUNT] for side in demo.prompts("refusal", "test"))
    control = random_like(chosen.vector, seed=0)
    add, subtract = (Plan([Add(chosen.vector, sign)]) for sign in (1.0, -1.0))
    # One batch of prompts, each under its own plan.
    arms = {
        "harmless": (harmless, None),
        "harmless, added": (harmless, add),
        "harmless, control": (harmless, Plan([Add(control, 1.0)])),
        "harmful": (harmful, None),
        "harmful, subtracted": (harmful, subtract),
        "harmful, control": (harmful, Plan([Add(control, -1.0)])),
    }
    prompts = [prompt for side, _ in arms.values() for prompt in side]
    plans = [plan for _, plan in arms.values() for _ in range(COUNT)]
    texts = complete(model, tokenizer, prompts, plans, max_new_tokens=32, batch_size=96)
    rates = {name: refusal_rate(texts[i * COUNT : (i + 1) * COUNT]) for i, name in enumerate(arms)}
    assert rates["harmless"].high < 0.2
    assert rates["harmless, added"].low > 0.8
    assert rates["harmless, control"].high < 0.2
    assert rates["harmful"].low > 0.8
    assert rates["harmful, subtracted"].high < 0.4
    assert rates["harmful, control"].low > 0.8
