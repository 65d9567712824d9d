"""Frozen generation with caches gives, token by token, what recomputing the whole sequence gives."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import by_hand
import models
import pytest
import torch
from by_hand import Case
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import faststeer as fs
from faststeer import observe

LENGTHS = (5, 9, 7)
NEW = 8


def prompts():
    return [models.tokens(1, n, seed=n)[0] for n in LENGTHS]


def plan_of(case: Case, positions="all") -> fs.Plan:
    return fs.Plan([fs.Add(case.vector, case.coefficient, layers=case.layer, at="resid_pre", positions=positions)])


CASES = [
    (Case(models.direction(1), 0.75), "all"),
    (Case(models.direction(2), -0.625, layer=2), "all"),
    (Case(models.direction(3), 0.6875, positions=lambda p: p >= 0), "generated"),
]


def error_of(found, exact):
    """Largest deviation, in units of the largest exact logit."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


@functools.cache
def small(name):
    return by_hand.build(name)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("what", ["qk", "ov"])
@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_generation_with_caches_is_recomputation_of_the_whole_sequence(name, what, sampled):
    model = small(name)
    plans = [plan_of(case, positions) for case, positions in CASES]
    torch.manual_seed(7)
    with observe.freeze(model, plans, what):
        out = model.generate(
            **models.left_padded(prompts()),
            max_new_tokens=NEW,
            do_sample=sampled,
            temperature=1.3 if sampled else None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    exactly, roughly = (by_hand.eager_copy(model, dtype) for dtype in (torch.float64, torch.float32))
    width = max(LENGTHS)
    changed = 0.0
    for row, (case, _) in enumerate(CASES):
        ids = out.sequences[row, width - LENGTHS[row] :]
        n = LENGTHS[row]
        exact = by_hand.frozen_logits(exactly, ids, case, n, what)[n - 1 : -1]
        rough = by_hand.frozen_logits(roughly, ids, case, n, what)[n - 1 : -1]
        found = torch.stack([logits[row] for logits in out.logits])
        # As close to fp64 as plain fp32 PyTorch is; other batches and kernels sum in other orders.
        assert error_of(found, exact) <= 4 * max(error_of(rough, exact), 2**-22)
        if not sampled:
            assert torch.equal(ids[n:], exact.argmax(-1))
        steered = by_hand.steered_logits(exactly, ids, case, n)[n - 1 : -1]
        changed = max(changed, error_of(steered, exact))
    assert changed > 1e-3  # freezing is not just steering


@pytest.mark.parametrize("what", ["qk", "ov"])
def test_in_fp64(what):
    model = by_hand.build("gpt2", torch.float64)
    case = CASES[0][0]
    ids = models.tokens(1, 12)
    with observe.freeze(model, plan_of(case), what) as frozen, torch.no_grad():
        frozen.set_prompt(9)
        found = model(input_ids=ids).logits[0]
    exact = by_hand.frozen_logits(by_hand.eager_copy(model, torch.float64), ids[0], case, 9, what)
    # Vector and coefficient are kept in fp32, and are exact there.
    assert error_of(found, exact) < 1e-12


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_in_bf16(name):
    model, (case, _) = by_hand.build(name, torch.bfloat16), CASES[0]
    ids = models.tokens(1, 12)
    with observe.freeze(model, plan_of(case), "qk"), torch.no_grad():
        first = model(input_ids=ids[:, :10], use_cache=True)
        steps = [
            model(input_ids=ids[:, t : t + 1], **models.cached(model, models.cache_of(first))).logits for t in (10, 11)
        ]
    found = torch.cat([first.logits, *steps], 1)[0]
    exact, rough = (
        by_hand.frozen_logits(by_hand.eager_copy(model, dtype), ids[0], case, 12, "qk")
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert error_of(found, exact) <= 2 * error_of(rough, exact)


@pytest.mark.parametrize("what", ["qk", "ov"])
@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_coefficient_zero_is_unsteered(name, what):
    model, batch = small(name), models.left_padded(prompts())
    none = fs.Plan([fs.Add(models.direction(1), 0.0, layers="all")])
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**batch, **settings)
    with observe.freeze(model, [none, None, plan_of(CASES[0][0])], what):
        found = model.generate(**batch, **settings)
    assert torch.equal(found.sequences[:2], plain.sequences[:2])
    for a, b in zip(found.logits, plain.logits, strict=True):
        assert error_of(a[:2], b[:2].double()) < 64 * 2**-23
    assert not torch.allclose(found.logits[0][2], plain.logits[0][2], rtol=0.01)


@pytest.mark.parametrize("name", sorted(set(models.ARCHITECTURES) - {"falcon"}))
def test_every_architecture_with_cache_as_without(name):
    model, ids = models.model(name), models.tokens(2, 7)
    plan = fs.Plan([fs.Add(models.direction(1), 0.8, layers=0, at="resid_pre")])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for what in ("qk", "ov"):
            with observe.freeze(model, plan, what):
                whole = model(input_ids=ids, use_cache=False).logits
                first = model(input_ids=ids[:, :5], use_cache=True)
                cache, pieces = models.cache_of(first), [first.logits]
                for t in (5, 6):
                    step = model(input_ids=ids[:, t : t + 1], **models.cached(model, cache), use_cache=True)
                    pieces.append(step.logits)
            assert whole.shape == plain.shape
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(whole, plain, atol=0.05)
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_sliding_window_and_soft_cap_stay_the_models_own():
    model = by_hand.build("gemma2", sliding_window=4, attn_logit_softcapping=2.0)
    case, ids = CASES[0][0], models.tokens(1, 11)
    with observe.freeze(model, plan_of(case), "qk"), torch.no_grad():
        found = model(input_ids=ids).logits[0]
    exact = by_hand.frozen_logits(by_hand.eager_copy(model, torch.float64), ids[0], case, 11, "qk")
    assert error_of(found, exact) < 64 * 2**-23


def test_return_sequences_and_padding_on_the_right():
    model, (first, second, _) = small("llama"), prompts()
    cases = [case for case, _ in CASES[:2]]
    plans, exactly = [plan_of(case) for case in cases], by_hand.eager_copy(model, torch.float64)
    with observe.freeze(model, plans, "qk"):
        out = model.generate(**models.left_padded([first, second]), max_new_tokens=4, do_sample=True,
                             num_return_sequences=2, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    for row in range(4):
        n = (len(first), len(second))[row // 2]
        ids = out.sequences[row, len(second) - n :]
        exact = by_hand.frozen_logits(exactly, ids, cases[row // 2], n, "qk")[n - 1 : -1]
        assert error_of(torch.stack([logits[row] for logits in out.logits]), exact) < 64 * 2**-23
    with observe.freeze(model, plans, "ov"), torch.no_grad():
        found = model(**models.right_padded([first, second]), return_dict=False)[0]
    for row, ids in enumerate((first, second)):
        exact = by_hand.frozen_logits(exactly, ids, cases[row], len(ids), "ov")
        assert error_of(found[row, : len(ids)], exact) < 64 * 2**-23


def test_static_cache():
    model, batch = small("llama"), models.left_padded(prompts())
    with observe.freeze(model, plan_of(CASES[0][0]), "qk"):
        dynamic = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        static = model.generate(**batch, max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("rows", [2, 3, 4])
@torch.no_grad()
def test_position_ids_by_axis(rows):
    """`[axes, batch, tokens]`, as multimodal models have them; there are 3 or 4 axes. Each row as it is alone."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = models._COMMON | {"num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": models.HIDDEN, "num_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    ids = models.tokens(rows, 5)
    for what in ("qk", "ov"):
        with observe.freeze(model, fs.Add(models.direction(), 2.0, layers=0), what):
            together = model(ids).logits
            alone = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together, model(ids).logits, atol=1e-2)


def test_plans_change_and_hidden_states_are_the_steered_rows():
    model, ids = small("llama"), models.tokens(2, 6)
    plan = plan_of(CASES[0][0])
    with observe.freeze(model, [plan, None], "qk") as frozen, torch.no_grad():
        first = model(input_ids=ids, output_hidden_states=True)
        frozen.assign([None, plan])
        second = model(input_ids=ids.flip(0)).logits
        with fs.hf.read(model, "resid_pre", [1]) as taken:
            model(input_ids=ids)
    torch.testing.assert_close(first.logits.flip(0), second, rtol=1e-4, atol=1e-4)
    assert first.hidden_states[-1].shape == (2, 6, models.HIDDEN)
    assert taken[1].shape[0] == 4  # an observer sees both halves
    moved = taken[1][2:] - taken[1][:2]
    torch.testing.assert_close(moved[1], (0.75 * models.direction(1)).expand(6, -1), rtol=1e-4, atol=1e-4)
    assert not moved[0].any()


def test_probes_and_latched_gates_are_the_rows_own():
    model, ids = small("llama"), models.tokens(2, 6)
    vector = models.direction(1)
    with torch.no_grad(), fs.hf.read(model, "resid_pre", [1]) as taken:
        model(input_ids=ids)
    last = taken[1][:, -1] @ vector
    threshold = float(last.mean())  # one row's gate opens
    gated = fs.Add(vector, 0.8, layers=1, at="resid_pre", when=fs.Gate(vector, threshold, latched=True))
    plan = fs.Plan([fs.Probe(vector, layers=1, at="resid_pre"), gated])
    with observe.freeze(model, plan, "qk") as frozen, torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        seen = frozen.projections["resid_pre", 1]
    plain = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert seen.shape == (2, 8, 1)
    torch.testing.assert_close(seen[:, :6, 0], taken[1] @ vector / vector.norm(), rtol=1e-4, atol=1e-4)
    same = [torch.allclose(out.logits[-1][row], plain.logits[-1][row], atol=1e-3) for row in range(2)]
    assert same == [bool(value <= threshold) for value in last]


def test_gradients_reach_the_vector():
    model, ids = small("gpt2"), models.tokens(1, 6)
    vector = models.direction(1).requires_grad_()
    with observe.freeze(model, fs.Plan([fs.Add(vector, 1.0, layers=1, at="resid_pre")]), "qk"):
        model(input_ids=ids).logits[0, -1, 5].backward()
    case = Case(vector.detach().double())
    exactly, step = by_hand.eager_copy(model, torch.float64), 1e-5
    for i in (0, 7):
        ends = []
        for sign in (1, -1):
            case.vector = vector.detach().double()
            case.vector[i] += sign * step
            ends.append(by_hand.frozen_logits(exactly, ids[0], case, 6, "qk")[-1, 5])
        assert float(vector.grad[i]) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-4, abs=1e-5)


def test_leaves_the_model_as_it_was_also_after_an_exception():
    model, ids = small("llama"), models.tokens(1, 6)
    before, modules = model(input_ids=ids).logits, dict(model.config.to_dict())
    with pytest.raises(RuntimeError, match="boom"), observe.freeze(model, plan_of(CASES[0][0]), "qk"):
        model(input_ids=ids)
        raise RuntimeError("boom")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.to_dict() == modules
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert "generate" not in model.__dict__


def test_other_models_keep_their_own_attention():
    model, other, ids = small("llama"), by_hand.build("llama"), models.tokens(1, 6)
    before = other(input_ids=ids).logits
    with observe.freeze(model, plan_of(CASES[0][0]), "qk"):
        assert torch.equal(other(input_ids=ids).logits, before)


def test_kernels_that_give_no_pattern_are_exchanged_and_it_says_so():
    model, ids = by_hand.build("llama"), models.tokens(1, 6)
    plan = plan_of(CASES[0][0])
    with observe.freeze(model, plan, "qk"), torch.no_grad():
        expected = model(input_ids=ids).logits
    model.config._attn_implementation_internal = "flash_attention_2"  # not installed: it would not run
    with pytest.warns(UserWarning, match=r"'flash_attention_2'.*computing with 'sdpa'"):
        frozen = observe.freeze(model, plan, "qk").__enter__()
    try:
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
    finally:
        frozen.__exit__(None, None, None)
    assert model.config._attn_implementation == "flash_attention_2"


def test_no_warning_otherwise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with observe.freeze(small("llama"), plan_of(CASES[0][0]), "qk"):
            pass


def test_bad_input_is_refused():
    model, plan = small("llama"), plan_of(CASES[0][0])
    batch = models.left_padded(prompts())
    with pytest.raises(ValueError, match="'qk'"):
        observe.freeze(model, plan, "kv")
    with pytest.raises(ValueError, match="hidden size 7"):
        observe.freeze(model, fs.Plan([fs.Add(torch.ones(7), layers=1)]), "qk")
    with fs.steer(model, plan), pytest.raises(RuntimeError, match="give its plan to freeze"):
        observe.freeze(model, plan, "qk").__enter__()
    with observe.freeze(model, [plan, None], "qk"):
        with pytest.raises(ValueError, match="3 rows, but there are 2 plans"):
            model.generate(**batch, max_new_tokens=2)
        with pytest.raises(RuntimeError, match="give its plan to freeze"):
            fs.steer(model, plan).__enter__()
        with pytest.raises(RuntimeError, match="give its plan to freeze"):
            observe.freeze(model, plan, "ov").__enter__()
    with observe.freeze(model, plan, "qk"), pytest.raises(ValueError, match="num_beams is 3"):
        model.generate(**batch, max_new_tokens=2, num_beams=3)
    with observe.freeze(model, plan, "ov"):
        for run in (lambda: model.generate_batch([[1, 2]]), model.init_continuous_batching):
            with pytest.raises(ValueError, match=r"runs each row twice.*model\.generate"):
                run()
    filled = models.cache_of(model(input_ids=models.tokens(2, 5), use_cache=True))
    with observe.freeze(model, plan, "qk"), pytest.raises(ValueError, match="holds 2 rows, expected 4"):
        model(input_ids=models.tokens(2, 1), **models.cached(model, filled))
    with pytest.raises(ValueError, match=r"Falcon.*attention"), observe.freeze(models.model("falcon"), plan, "qk"):
        pass
    assert torch.isfinite(models.model("falcon")(models.tokens(1, 4)).logits).all()


@pytest.mark.parametrize("what", ["qk", "ov"])
def test_adapters_per_row_are_named_for_both_halves(what):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, ids = get_peft_model(by_hand.build("llama"), lora, adapter_name="one").eval(), models.tokens(2, 5)
    model.add_adapter("two", lora)
    names, new = ["one", "two"], {"max_new_tokens": 3, "do_sample": False}
    with observe.freeze(model, plan_of(CASES[0][0]), what), torch.no_grad():
        found = model(input_ids=ids, adapter_names=names * 2).logits
        answers = model.generate(input_ids=ids, adapter_names=names * 2, **new)
        for row, name in enumerate(names):
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], alone)
            assert torch.equal(answers[row : row + 1], model.generate(input_ids=ids[row : row + 1], **new))


def test_answers_by_complete():
    model, tokenizer = fs.demo.load()
    harmful = fs.demo.prompts("refusal", "test")[0][:3]
    vector = fs.extract.dim(model, tokenizer, *(side[:8] for side in fs.demo.prompts("refusal", "train")))
    plan = fs.Plan([fs.Add(vector, -1.0, layers=2)])
    within = functools.partial(observe.freeze, what="qk")
    answers = fs.evaluate.complete(model, tokenizer, harmful, plan, max_new_tokens=12, within=within)
    alone = fs.evaluate.complete(model, tokenizer, harmful[:1], plan, max_new_tokens=12, within=within)
    assert answers[0] == alone[0]
    assert answers != fs.evaluate.complete(model, tokenizer, harmful, max_new_tokens=12)


def test_a_model_is_not_kept_alive():
    model = by_hand.build("llama")
    with observe.freeze(model, plan_of(CASES[0][0]), "qk"):
        model(input_ids=models.tokens(1, 4))
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None
