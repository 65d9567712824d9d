"""Plans stay loaded from one call to the next, until their room is needed or they are others; nothing shows it but the
time."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from packaging.version import Version
from support import LIMITS, engine, generated, mixed, plan, prompts, tokens

import faststeer as fs
from faststeer.compile import compile_plan
from faststeer.program import Capacity, Program


def counting(made):
    """The plans that an engine loads."""
    loads, change = [], made._slots._change
    made._slots._change = lambda plans: (change(plans), loads.extend(plans.values()))
    return loads


def expected(plans):
    return [generated(models.model("llama"), *each) for each in zip(prompts(), plans, LIMITS, strict=True)]


def test_equal_plans_are_loaded_once():
    """The same objects, others of equal value, and after the model was steered by somebody else."""
    made = engine("llama")
    first = tokens(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=LIMITS))
    assert first == expected(mixed("llama"))
    loads = counting(made)
    assert tokens(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=LIMITS)) == first
    with fs.steer(models.model("llama"), plan("llama", 5)), torch.no_grad():
        models.model("llama")(models.tokens(2, 7))
    assert tokens(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=LIMITS)) == first
    assert not loads


def flip(direction):
    direction.mul_(-1)


def flip_data(direction):
    direction.data.mul_(-1)


def flip_array(direction):
    direction.numpy()[:] *= -1


@pytest.mark.parametrize("flip", [flip, flip_data, flip_array])
def test_a_vector_changed_in_place_is_loaded_again(flip):
    """Also where torch does not count the change."""
    direction = models.direction(0).clone()
    steered = fs.Plan([fs.Add(direction, 2.0, layers="all")])
    made = engine("llama")
    before = tokens(made.generate(prompts(), plans=steered, max_new_tokens=LIMITS))
    flip(direction)
    after = tokens(made.generate(prompts(), plans=steered, max_new_tokens=LIMITS))
    assert before != after == expected([steered] * 8)


def test_a_vector_changed_in_place_while_its_request_waits():
    """What is asked for is what stands in the plan when `generate` is called."""
    made, direction = engine("llama", max_batch=1), models.direction(0).clone()
    first, second = plan("llama"), fs.Plan([fs.Add(direction, 2.0, layers="all")])
    equal, copied = (fs.Plan([fs.Add(direction.clone(), 2.0, layers="all")]) for _ in range(2))
    running = made.generate(prompts()[:3], plans=[first, second, equal], max_new_tokens=6)
    assert next(running).error is None
    direction.mul_(-1)
    for completion in running:
        assert completion.finish_reason == "error" and "changed in place" in str(completion.error)
    asked = [copied, second]
    found = tokens(made.generate(prompts()[:2], plans=asked, max_new_tokens=6))
    assert found == [generated(models.model("llama"), *each, 6) for each in zip(prompts(), asked, strict=False)]


def test_the_plan_left_alone_for_longest_goes():
    made = engine("llama", capacity=fs.Capacity(slots=2, vectors=32, entries=24))
    one, two, three = (plan("llama", seed) for seed in range(3))
    for steered in (one, two, one):
        list(made.generate(prompts()[:1], plans=steered, max_new_tokens=2))
    loads = counting(made)
    for steered, count in ((three, 1), (one, 1), (three, 1), (two, 2), (three, 2), (one, 3)):
        found = tokens(made.generate(prompts()[:1], plans=steered, max_new_tokens=4))
        assert found == [generated(models.model("llama"), prompts()[0], steered, 4)]
        assert len([p for p in loads if p is not None]) == count


def test_plans_that_are_being_trained_do_not_stay():
    direction = models.direction(0).clone().requires_grad_()
    steered = fs.Plan([fs.Add(direction, 2.0, layers=0)])
    made = engine("llama")
    before = tokens(made.generate(prompts(), plans=steered, max_new_tokens=LIMITS))
    assert all(p is None for p in made._steering.loaded)
    direction.data.mul_(-1)
    after = tokens(made.generate(prompts(), plans=steered, max_new_tokens=LIMITS))
    assert before != after == expected([steered] * 8)


def test_the_mask_has_the_dtype_of_the_queries(monkeypatch):
    """Whatever the first parameter's is."""
    model = models.build("llama").to(torch.bfloat16)
    model.register_parameter("first", torch.nn.Parameter(torch.zeros(1)))
    made, kinds = engine(model), set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, *others, attn_mask=None, **more):
        kinds.add((query.dtype, None if attn_mask is None else attn_mask.dtype))
        return attend(query, *others, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    list(made.generate(prompts((5, 5)), max_new_tokens=4))
    assert (torch.bfloat16, torch.bfloat16) in kinds and {mask for _, mask in kinds} <= {
        None,
        torch.bool,
        torch.bfloat16,
    }


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="transformers repeats keys before")
def test_keys_are_not_repeated(monkeypatch):
    """A decode step reads as many columns as the longest row has, of as many heads as there are keys; so does the
    prompt of rows without padding."""
    model, seen = models.build("llama"), []
    made = engine(model)
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **more):
        seen.append((key.shape, query.shape[1] if more.get("enable_gqa") else query.shape[1] * query.shape[2]))
        return attend(query, key, value, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    list(made.generate(prompts((5, 5)), max_new_tokens=4))
    heads, own = model.config.num_attention_heads, model.config.num_key_value_heads
    assert own < heads and {(shape[1], rows) for shape, rows in seen} == {(own, heads)}
    assert max(shape[2] for shape, _ in seen) == 5 + 4 - 1


@pytest.mark.parametrize("seed", range(20))
def test_the_bank_holds_what_is_loaded(seed):
    """After any changes, also those that do not fit: every entry's rows are its basis, and no two blocks overlap."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (1,), generator=generator))

    pool = [torch.randn(1 + i % 3, 8, generator=generator) for i in range(9)]
    program = Program(2, 8, Capacity(slots=4, vectors=9, entries=6), "cpu")
    refused = 0
    for _ in range(60):
        steered = fs.Plan([fs.Ablate(pool[draw(9)], layers=draw(2)) for _ in range(draw(4))])
        before = program.bank.clone(), program.entries.clone(), program.ranges.clone(), list(program.plans)
        try:
            program.load(slot := draw(4), None if draw(5) == 0 else steered)
        except ValueError as error:
            refused += 1
            assert "capacity exceeded" in str(error)
            assert all(map(torch.equal, before[:3], (program.bank, program.entries, program.ranges)))
            assert before[3] == program.plans
        for slot, loaded in enumerate(program.plans):
            entries = [] if loaded is None else compile_plan(loaded, 2, 8)
            for entry, row in zip(entries, program._rows[slot], strict=True):
                assert torch.equal(program.bank[row : row + len(entry.basis)], entry.basis)
            for site in range(9):
                first, count = program.ranges[site, slot].tolist()
                bases = [entry.basis for entry in entries if entry.site == site]
                assert count == len(bases)
                for i, basis in enumerate(bases):
                    row = int(program.entries[first + i, 1])
                    assert torch.equal(program.bank[row : row + len(basis)], basis)
    assert refused
