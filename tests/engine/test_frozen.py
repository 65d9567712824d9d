"""Engine(freeze="qk") gives each request what `generate` gives it alone inside `freeze`, however rows are filled."""

import models
import pytest
import torch
from support import LIMITS, engine, mixed, plan, prompts, tokens

import faststeer as fs
from faststeer.hf.freeze import freeze


def few(name):
    """Five requests of different lengths for two rows: plans and gates of every kind, and none."""
    return prompts()[:5], mixed(name)[:5], LIMITS[:5]


def alone(model, prompt, steered, new, **settings):
    ids = torch.tensor([prompt])
    with fs.backend("reference"), freeze(model, steered or fs.Plan(), "qk", path="hooks"):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_is_generate_inside_freeze(name):
    model, (given, plans, limits) = models.model(name), few(name)
    found = tokens(engine(name, freeze="qk", max_batch=2).generate(given, plans=plans, max_new_tokens=limits))
    assert found == [alone(model, *each) for each in zip(given, plans, limits, strict=True)]
    steered = tokens(engine(name, max_batch=2).generate(given, plans=plans, max_new_tokens=limits))
    assert found != steered
    for i, one in enumerate(plans):
        assert one is not None or found[i] == steered[i]


@pytest.mark.parametrize(
    ("name", "changes"), [("gemma2", {"sliding_window": 4}), ("llama", {"attn_implementation": "eager"})]
)
def test_windows_and_eager_attention(name, changes):
    model, (given, plans, limits) = models.build(name, **changes), few(name)
    found = tokens(engine(model, freeze="qk", max_batch=2).generate(given, plans=plans, max_new_tokens=limits))
    assert found == [alone(model, *each) for each in zip(given, plans, limits, strict=True)]


def test_a_shared_prefix_is_read_once():
    """The first 300 tokens of every prompt are taken from one row, both halves of it."""
    model = models.build("llama", max_position_embeddings=512)
    long = models.tokens(1, 300, seed=5)[0].tolist()
    given = [long + more for more in prompts((3, 5, 2))]
    steered = fs.Plan([fs.Add(models.direction(1), 1.0, layers=0)])
    made = engine(model, freeze="qk", max_length=330)
    found = tokens(made.generate(given, plans=steered, max_new_tokens=5))
    assert found == [alone(model, prompt, steered, 5) for prompt in given]


def test_samples_do_not_depend_on_the_batch():
    given, plans, _ = few("llama")
    settings = {"temperature": 1.2, "seed": 3}
    together = tokens(engine("llama", freeze="qk").generate(given, plans=plans, max_new_tokens=6, **settings))
    made = engine("llama", freeze="qk", max_batch=1)
    for i, (prompt, steered) in enumerate(zip(given, plans, strict=True)):
        (one,) = made.generate([prompt], plans=[steered], max_new_tokens=6, temperature=1.2, seed=3 + i)
        assert one.token_ids == together[i]


def test_projections_are_those_of_the_steered_rows():
    model, direction = models.model("llama"), models.direction(1)
    steered = fs.Plan([fs.Add(direction, 1.0, layers=0, at="resid_pre")])
    made = engine("llama", freeze="qk")
    found = list(made.generate(prompts()[:4], plans=steered, max_new_tokens=3, probe=direction))
    for completion, prompt in zip(found, prompts()[:4], strict=True):
        ids = torch.tensor([prompt + completion.token_ids[:-1]])
        with freeze(model, steered, "qk"), fs.hf.read(model, "resid_pre", [1]) as taken, torch.no_grad():
            model(input_ids=ids)
        expected = taken[1][1] @ direction / direction.norm()
        torch.testing.assert_close(completion.projections[1], expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model, ids = models.build("llama"), models.tokens(1, 6)
    before, implementation = model(input_ids=ids).logits, model.config._attn_implementation
    made = engine(model, freeze="qk")
    assert torch.equal(model(input_ids=ids).logits, before)
    running = made.generate(prompts(), plans=plan("llama"), max_new_tokens=4)
    next(running)
    running.close()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._attn_implementation == implementation


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="freezes 'qk' or nothing"):
        engine("llama", freeze="ov")
    with pytest.raises(ValueError, match=r"Falcon.*attention"):
        engine("falcon", freeze="qk")
