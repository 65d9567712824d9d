"""The engine's contracts: what `generate` gives under steering by hooks, row by row, however rows are filled; nothing
of one request in another; the model untouched afterwards; bad input named."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import threading

import models
import numpy as np
import pytest
import torch
from support import LIMITS, engine, generated, mixed, plan, prompts, tokens

import faststeer as fs
from faststeer.compile import orthonormal
from faststeer.engine import batch, run
from faststeer.engine.batch import EngineBatch
from faststeer.engine.cache import RowCache
from faststeer.hf import read

ALL = pytest.mark.parametrize("name", models.ARCHITECTURES)
V = models.direction(8)
SOME = pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])


# Contracts 1 to 3 -----------------------------------------------------------------------------------------------------


@ALL
def test_greedy_is_generate_steered_by_hooks(name):
    """Eight requests of different lengths through three rows, so that rows are refilled and moved."""
    model, plans = models.model(name), mixed(name)
    found = tokens(engine(name).generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    expected = [generated(model, *each) for each in zip(prompts(), plans, LIMITS, strict=True)]
    assert found == expected
    plain = [generated(model, prompt, None, new) for prompt, new in zip(prompts(), LIMITS, strict=True)]
    assert found != plain


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("mixtral", {"sliding_window": 4}),
        ("phi3", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4}),
        ("gemma3", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        ("llama", {"attn_implementation": "eager"}),
    ],
)
def test_windows_and_eager_attention(name, changes):
    model, plans = models.build(name, **changes), mixed(name)
    found = tokens(engine(model).generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    assert found == [generated(model, *each) for each in zip(prompts(), plans, LIMITS, strict=True)]


@ALL
def test_bfloat16(name):
    """Each token is the likeliest, up to rounding, by a forward pass over the whole sequence."""
    model, plans = models.build(name).to(torch.bfloat16), mixed(name)
    found = tokens(engine(model).generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    for prompt, steered, new in zip(prompts(), plans, found, strict=True):
        with torch.no_grad(), fs.steer(model, steered or fs.Plan()) as steering:
            steering.set_prompt(len(prompt))
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
        assert (logits.amax(1) - chosen).max() <= 0.1 * logits.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_row_without_plan_has_the_bits_of_the_unsteered_engine(name, monkeypatch):
    """Same kernels, same shapes; so has coefficient 0."""
    made = engine(name, max_batch=8)
    everywhere = {"layers": "all", "at": models.points(name)}
    nothing = fs.Plan(
        [fs.Add(models.direction(0), 0.0, **everywhere), fs.Ablate(models.direction(1), 0.0, **everywhere)]
    )
    seen: list[torch.Tensor] = []
    choose = made._batch._choose
    monkeypatch.setattr(made._batch, "_choose", lambda logits, *a: (seen.append(logits.clone()), choose(logits, *a))[1])

    def logits(plans: list[fs.Plan | None]) -> torch.Tensor:
        seen.clear()
        list(made.generate(prompts((5,) * 6), plans=plans, max_new_tokens=4))
        return torch.stack(seen)

    plain = logits([None] * 6)
    some = logits([None, plan(name), None, nothing, plan(name, 1), None])
    assert torch.equal(some[:, [0, 2, 3, 5]], plain[:, [0, 2, 3, 5]])
    assert not torch.equal(some[:, 1], plain[:, 1]) and not torch.equal(some[:, 4], plain[:, 4])


@SOME
def test_a_request_alone_is_that_request_in_a_batch(name):
    """Greedy and sampled ones mixed."""
    plans = mixed(name)
    settings = {
        "max_new_tokens": LIMITS,
        "temperature": [0.0, 1.0, 0.7, 1.0, 1.5, 0.0, 1.0, 1.0],
        "top_k": [0, 0, 20, 5, 0, 3, 0, 0],
        "top_p": [1.0, 0.9, 1.0, 0.8, 1.0, 0.5, 1.0, 0.95],
    }
    for rows in (3, 8):
        made = engine(name, max_batch=rows)
        together = tokens(made.generate(prompts(), plans, seed=5, **settings))
        for i, prompt in enumerate(prompts()):
            own = {what: values[i] for what, values in settings.items()}
            assert tokens(made.generate([prompt], [plans[i]], seed=[5 + i], **own)) == [together[i]]
    assert tokens(made.generate(prompts(), plans, seed=6, **settings)) != together


def test_a_plan_of_one_request_does_not_change_another():
    made = engine("llama", max_batch=8)
    before = tokens(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=5))
    other = mixed("llama")
    other[3] = fs.Plan([fs.Add(models.direction(9), 5.0, layers="all")])
    after = tokens(made.generate(prompts(), plans=other, max_new_tokens=5))
    assert [a == b for a, b in zip(after, before, strict=True)] == [i != 3 for i in range(8)]


def test_latched_gates_belong_to_requests_not_rows():
    """A row whose request closed its gate is filled with one that opens it, and the other way round."""
    model, d = models.model("llama"), models.direction(3)
    values = []
    for prompt in prompts():
        with torch.no_grad(), read(model, "resid_pre", layers=[0]) as taken:
            model(torch.tensor([prompt]))
            values.append(float(taken[0][0, -1] @ d))
    # Between two of them: a product's last bit must not decide.
    below, above = sorted(values)[len(values) // 2 - 1 :][:2]
    middle = (below + above) / 2
    steered = fs.Plan(
        [fs.Add(models.direction(4), 3.0, when=fs.Gate(d, middle, latched=True), layers="all", at="resid_pre")]
    )
    found = tokens(engine("llama", max_batch=2).generate(prompts(), plans=steered, max_new_tokens=4))
    assert found == [generated(model, prompt, steered, 4) for prompt in prompts()]
    assert 0 < sum(value > middle for value in values) < len(values)


def test_steps_launched_ahead_change_nothing():
    """As on a GPU: a step runs before the tokens of the one before are read."""
    made = engine("llama")
    stop = tokens(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=9))[1][2]
    settings = {"plans": mixed("llama"), "max_new_tokens": 9, "stop": stop, "probe": models.direction(1)}
    now = list(made.generate(prompts(), **settings))
    made._ahead = 1
    later = list(made.generate(prompts(), **settings))
    for a, b in zip(now, later, strict=True):
        assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
        torch.testing.assert_close(a.projections, b.projections, rtol=1e-4, atol=1e-4)
    assert {c.finish_reason for c in now} == {"stop", "length"}


def test_demo_model_answers_as_under_generate():
    model, tokenizer = fs.demo.load()
    asked = [*fs.demo.prompts("refusal", "test")[0][:6], *fs.demo.prompts("refusal", "test")[1][:6]]
    direction = fs.extract.dim(model, tokenizer, *(side[:16] for side in fs.demo.prompts("refusal", "train")))
    steered = fs.Plan([fs.Add(direction, 1.0, layers=4)])
    plans = [steered if i % 2 else None for i in range(len(asked))]
    made = fs.engine.Engine(model, tokenizer, max_batch=5, max_length=128)
    texts = [c.text for c in made.generate(asked, plans=plans, max_new_tokens=40)]
    assert texts == fs.evaluate.generate.complete(model, tokenizer, asked, plans, max_new_tokens=40)


# What others do to the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize(
    "where",
    ["model", "model.layers.1", "model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.0.mlp.down_proj",
     "model.layers.1.self_attn.q_proj", "model.layers.1.post_attention_layernorm", "model.norm", "lm_head",
     "model.embed_tokens", "model.rotary_emb"],
)  # fmt: skip
def test_hooks_of_others_are_called_in_every_pass(name, where):
    model = models.build(name)
    made, calls = engine(model), []
    handle = model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    found = tokens(made.generate(prompts()[:3], plan(name), max_new_tokens=5))
    handle.remove()
    assert len(calls) >= 5
    assert found == tokens(made.generate(prompts()[:3], plan(name), max_new_tokens=5))


@pytest.mark.parametrize("at", ["attn_out", "mlp_out", "resid_pre"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_hooks_of_the_steering_and_of_others_are_told_apart(name, at):
    """One of each, on modules that are passed by and on modules that are called."""
    model, steered = models.build(name), fs.Plan([fs.Add(models.direction(3), 0.3, layers=0, at=at)])
    made, down = engine(model), model.model.layers[1].mlp.down_proj
    expected = [generated(model, prompt, steered, 6) for prompt in prompts()[:3]]
    assert tokens(made.generate(prompts()[:3], steered, max_new_tokens=6)) == expected
    handle = down.register_forward_hook(lambda _m, _a, out: out.flip(-1))
    hooked = [generated(model, prompt, steered, 6) for prompt in prompts()[:3]]
    assert tokens(made.generate(prompts()[:3], steered, max_new_tokens=6)) == hooked != expected
    handle.remove()


def test_a_hook_that_changes_a_projection_is_heeded():
    """And one that comes while completions are being read."""
    model = models.build("llama")
    made, down = engine(model, max_batch=2), model.model.layers[0].mlp.down_proj

    def hook():
        return down.register_forward_hook(lambda _m, _a, out: out + 1.0)

    plainly = [generated(model, prompt, None, 6) for prompt in prompts()[:4]]
    handle = hook()
    hooked = [generated(model, prompt, None, 6) for prompt in prompts()[:4]]
    assert tokens(made.generate(prompts()[:4], max_new_tokens=6)) == hooked != plainly
    handle.remove()
    running = made.generate(prompts()[:4], max_new_tokens=6)
    first = [next(running), next(running)]  # two rows: the others have not begun
    handle = hook()
    assert tokens([*first, *running]) == plainly[:2] + hooked[2:]
    handle.remove()


def test_an_adapter_that_comes_later_is_not_passed_by():
    model = models.build("llama")
    made = engine(model)
    plainly = tokens(made.generate(prompts()[:2], max_new_tokens=5))

    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(x) + 1.0

    mlp = model.model.layers[0].mlp
    mlp.down_proj = Adapted(mlp.down_proj)
    expected = [generated(model, prompt, None, 5) for prompt in prompts()[:2]]
    assert tokens(made.generate(prompts()[:2], max_new_tokens=5)) == expected != plainly


def test_weights_that_change_are_seen():
    model = models.build("llama")
    made = engine(model)
    list(made.generate(prompts()[:2], max_new_tokens=3))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-1)
            layer.self_attn.k_proj.weight = torch.nn.Parameter(layer.self_attn.k_proj.weight.flip(0))
    expected = [generated(model, prompt, None, 5) for prompt in prompts()[:2]]
    assert tokens(made.generate(prompts()[:2], max_new_tokens=5)) == expected


# Contracts 5 and 6 ----------------------------------------------------------------------------------------------------


def before_passes(monkeypatch, made, call) -> None:
    """`call(sequences, tokens of each)` at every forward pass of an engine, when the rows' tables are written."""
    forward = made._batch._forward

    def own(ids, *more):
        call(*ids.shape)
        return forward(ids, *more)

    monkeypatch.setattr(made._batch, "_forward", own)


class Raises:
    """At the n-th call."""

    def __init__(self, n: int, error: BaseException) -> None:
        self.n, self.error, self.count = n, error, itertools.count(1)

    def __call__(self, *sizes: int) -> None:
        if next(self.count) == self.n:
            raise self.error


def state(model) -> tuple:
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy(), "forward" in m.__dict__) for m in model.modules()]
    with torch.no_grad():
        return hooks, model(models.tokens(2, 7)).logits, "generate" in model.__dict__


def unchanged(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]


@SOME
@pytest.mark.parametrize("how", ["exhausted", "closed", "error", "interrupt", "never begun"])
def test_leaving_restores_every_bit(name, how, monkeypatch):
    model = models.build(name)
    made, before = engine(model), state(model)
    expected = tokens(made.generate(prompts(), plans=mixed(name), max_new_tokens=LIMITS))
    assert unchanged(state(model), before)
    with monkeypatch.context() as patch:
        if how in ("error", "interrupt"):
            error = ZeroDivisionError() if how == "error" else KeyboardInterrupt()
            before_passes(patch, made, Raises(8, error))
        running = made.generate(prompts(), plans=mixed(name), max_new_tokens=LIMITS)
        if how == "exhausted":
            list(running)
        elif how == "closed":
            next(running)
            with pytest.raises(RuntimeError, match="generating already"):
                made.generate(prompts())
            running.close()
        elif how != "never begun":
            with pytest.raises(ZeroDivisionError if how == "error" else KeyboardInterrupt):
                list(running)
    assert unchanged(state(model), before)
    assert tokens(made.generate(prompts(), plans=mixed(name), max_new_tokens=LIMITS)) == expected


def test_what_has_finished_is_delivered_at_an_interrupt(monkeypatch):
    """Also what waited for its turn: the second finishes long before the first."""
    made = engine("llama")
    before_passes(monkeypatch, made, Raises(6, KeyboardInterrupt()))
    found = []
    with pytest.raises(KeyboardInterrupt):
        for completion in made.generate(prompts((5, 5, 5)), max_new_tokens=[20, 2, 3]):
            found.append(completion)
    assert [c.index for c in found] == [1, 2]


def test_plans_change_in_place():
    """Other plans, same tables: nothing that a captured graph reads moves."""
    made = engine("llama")

    def addresses() -> list[int]:
        rows = made._batch
        own = (rows.long, rows.int, rows.real, rows.cache.layers[0].keys)
        return [t.data_ptr() for t in (*made._steering.tables, *own)]

    list(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=3))
    before = addresses()
    others = [None, plan("llama", 7), None, plan("llama", 8), *[plan("llama", 9)] * 4]
    found = tokens(made.generate(prompts(), plans=others, max_new_tokens=3))
    assert addresses() == before
    assert found == [generated(models.model("llama"), p, q, 3) for p, q in zip(prompts(), others, strict=True)]


# Running --------------------------------------------------------------------------------------------------------------


def test_completions_come_while_others_run():
    made = engine("llama", max_batch=2)
    running = made.generate(prompts((4,) * 9), max_new_tokens=[20, *[2] * 8], in_order=False)
    first = next(running)
    assert first.index == 1 and made._busy
    assert sorted(c.index for c in [first, *running]) == list(range(9))
    ordered = made.generate(prompts((4,) * 9), max_new_tokens=[20, *[2] * 8])
    assert [c.index for c in ordered] == list(range(9))


def test_equal_plans_share_a_slot_and_others_wait():
    """Five different plans, two slots; two of equal value are one."""
    made = engine("llama", capacity=fs.Capacity(slots=2, vectors=32, entries=24))
    plans = [plan("llama", seed) for seed in (0, 1, 0, 2, 3, 1, 4, 0)]
    loads = []
    change = made._slots._change

    def counted(plans):
        change(plans)
        loads.extend(slot for slot, plan in plans.items() if plan is not None)

    made._slots._change = counted
    found = tokens(made.generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    assert found == [generated(models.model("llama"), *each) for each in zip(prompts(), plans, LIMITS, strict=True)]
    assert set(loads) == {0, 1}
    loads.clear()
    list(made.generate(prompts(), plans=[plan("llama", 9) for _ in prompts()], max_new_tokens=2))
    assert len(loads) == 1


def test_room_for_vectors_of_one_plan_at_a_time():
    """Slots enough, but the bank holds one plan: the others wait."""
    needed = 9
    made = engine("llama", capacity=fs.Capacity(slots=4, vectors=needed + 1, entries=24))
    plans = [plan("llama", seed) for seed in range(4)]
    found = tokens(made.generate(prompts()[:4], plans=plans, max_new_tokens=4))
    assert found == [generated(models.model("llama"), p, q, 4) for p, q in zip(prompts(), plans, strict=False)]


def test_out_of_memory_lowers_the_batch_and_goes_on(monkeypatch):
    made = engine("llama", max_batch=8)
    settings = {"plans": mixed("llama"), "max_new_tokens": 6, "probe": models.direction(1)}
    expected = list(made.generate(prompts(), **settings))
    sizes = []

    def small(rows, length):
        sizes.append(rows)
        if rows > 2 and len(sizes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    before_passes(monkeypatch, made, small)
    found = list(made.generate(prompts(), **settings))
    assert max(sizes) == 8 and sizes[-1] <= 2
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.projections, b.projections, rtol=1e-4, atol=1e-4)
    before_passes(monkeypatch, made, lambda *_: _raise_memory())
    with pytest.raises(torch.OutOfMemoryError):
        list(made.generate(prompts(), **settings))


def _raise_memory():
    raise torch.OutOfMemoryError("CUDA")


def test_rows_that_do_not_fit_into_memory_at_the_start(monkeypatch):
    read_prompts = EngineBatch.read_prompts

    def small(rows, *arguments):
        if rows.rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read_prompts(rows, *arguments)

    monkeypatch.setattr(EngineBatch, "read_prompts", small)
    assert engine("llama", max_batch=16).max_batch == 4


def test_a_prompt_is_unembedded_at_its_last_token_alone():
    model, seen = models.build("llama"), []
    made = engine(model, max_batch=8)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    found = tokens(made.generate(prompts(), max_new_tokens=1))
    assert seen == [(8, 1, models.VOCAB)]
    assert found == [generated(model, prompt, None, 1) for prompt in prompts()]


def test_a_model_that_names_no_unembedding(monkeypatch):
    model, plans = models.build("llama"), mixed("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    found = tokens(engine(model).generate(prompts(), plans=plans, max_new_tokens=3))
    assert found == [generated(model, *each, 3) for each in zip(prompts(), plans, strict=True)]


def test_one_row_of_two_tokens():
    made = engine("llama", max_batch=1, max_length=2)
    assert tokens(made.generate(prompts((1, 1)))) == [
        generated(models.model("llama"), p, None, 1) for p in prompts((1, 1))
    ]


def test_logits_that_are_not_finite_end_that_request_alone():
    model = models.model("llama")
    made = engine("llama", max_batch=8)
    plans = mixed("llama")
    plans[3] = fs.Plan([fs.Add(models.direction(0), 3e38, layers="all", positions="[2:]")])
    found = list(made.generate(prompts(), plans=plans, max_new_tokens=6))
    assert [c.finish_reason for c in found] == ["error" if i == 3 else "length" for i in range(8)]
    assert "NaN or infinity" in str(found[3].error) and len(found[3].token_ids) == 3
    for i in set(range(8)) - {3}:
        assert found[i].error is None and found[i].token_ids == generated(model, prompts()[i], plans[i], 6)


def test_a_row_that_held_nan_is_clean_for_the_next_request():
    """A mask does not hide a NaN: a row looks at as many columns as the longest row has. The second NaN comes with a
    request's last token, when its row is another's already."""
    made = engine("llama", max_batch=2)
    bad = fs.Plan([fs.Add(models.direction(0), 3e38, layers="all", positions="[2:]")])
    asked, limits = prompts((9, 3, 2, 4, 2, 3)), [20, 6, 4, 4, 5, 4]
    plans = [None, bad, None, bad, None, None]
    found = list(made.generate(asked, plans=plans, max_new_tokens=limits))
    assert [c.finish_reason for c in found] == ["error" if plan else "length" for plan in plans]
    for i in (0, 2, 4, 5):
        assert found[i].token_ids == generated(models.model("llama"), asked[i], None, limits[i])


@pytest.mark.parametrize("stop", [(), "never"])
def test_a_tokenizer_that_fails_fails_that_request_alone(stop):
    """Also where each token is read for a stop string."""
    made = engine("llama")
    expected = tokens(made.generate(prompts()[:3], max_new_tokens=[2, 3, 4]))
    decode, bad = made.tokenizer.decode, expected[1]
    made.tokenizer.decode = lambda ids, **k: 1 / 0 if ids == bad else decode(ids, **k)  # type: ignore[assignment]
    found = list(made.generate(prompts()[:3], max_new_tokens=[2, 3, 4], stop=stop))
    assert [c.finish_reason for c in found] == ["length", "error", "length"] and tokens(found) == expected
    assert isinstance(found[1].error, ZeroDivisionError) and found[1].text == ""


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    def allocate(*args):
        torch.empty(2**50)

    with pytest.raises(ValueError, match=f"of {2**45} rows of 32 tokens do not fit into memory: .* max_batch"):
        engine("llama", max_batch=2**45)
    monkeypatch.setattr(RowCache, "allocate", allocate)
    with pytest.raises(ValueError, match=r"of 3 rows of 32 tokens do not fit into memory: .* max_batch"):
        engine("llama")


def test_progress_bar(capsys):
    list(engine("llama").generate(prompts(), max_new_tokens=3, progress=True))
    assert "tokens/s" in capsys.readouterr().err
    list(engine("llama").generate(prompts(), max_new_tokens=3))
    assert capsys.readouterr().err == ""


# Shared prefixes ------------------------------------------------------------------------------------------------------


def of_every_position(seed: int) -> dict[str, fs.Plan | None]:
    """Plans that steer a shared prefix alike in every prompt, and plans that do not."""
    d = [models.direction(10 * seed + i) for i in range(3)]
    gate = fs.Gate(d[1], 0.0, latched=True)
    return {
        "none": None,
        "all": fs.Plan([fs.Add(d[0], 2.0, layers="all"), fs.Ablate(d[1], layers=0, when=fs.Gate(d[2]))]),
        "prompt": fs.Plan([fs.Add(d[0], 2.0, layers=0, positions="prompt")]),
        "generated": fs.Plan([fs.Add(d[0], 2.0, layers=0, positions="generated")]),
        "latched": fs.Plan([fs.Add(d[0], 2.0, layers="all", when=gate)]),
        "end": fs.Plan([fs.Add(d[0], 2.0, layers="all", positions="[-3:]"), fs.Ablate(d[1], layers=1)]),
        "inside the prefix": fs.Plan([fs.Add(d[0], 2.0, layers="all", positions="[-12:]")]),
        "up to inside": fs.Plan([fs.Add(d[0], 2.0, layers=0, positions="[:-9]")]),
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gemma3", "gpt2"])
def test_a_shared_prefix_is_read_once(name, monkeypatch):
    """Prompts that begin alike, some shorter, through few rows; windows shorter than the prefix."""
    window = {"sliding_window": 6} if name in ("mixtral", "gemma2", "gemma3") else {}
    model = models.build(name, **window)
    begin = models.tokens(1, 12, seed=77)[0].tolist()
    asked = [begin + prompt for prompt in prompts((4, 5, 4, 7, 6, 4, 9))]
    monkeypatch.setattr(run, "PADDING", 8)
    made, read_tokens = engine(model, max_batch=4), 0

    def count(rows, length):
        nonlocal read_tokens
        read_tokens += rows * length if length > 1 else 0

    before_passes(monkeypatch, made, count)
    limits, read = [3, 6, 4, 2, 5, 1, 4], {}
    for what, steered in of_every_position(3).items():
        read_tokens = 0
        found = list(made.generate(asked, plans=steered, max_new_tokens=limits, probe=models.direction(1)))
        read[what] = read_tokens
        assert tokens(found) == [generated(model, p, steered, n) for p, n in zip(asked, limits, strict=True)], what
        monkeypatch.setattr(run, "PADDING", 10**9)
        apart = list(made.generate(asked, plans=steered, max_new_tokens=limits, probe=models.direction(1)))
        monkeypatch.setattr(run, "PADDING", 8)
        for a, b in zip(found, apart, strict=True):
            torch.testing.assert_close(a.projections, b.projections, rtol=1e-4, atol=1e-4)
    whole = sum(map(len, asked))
    together = {what for what, count in read.items() if count < 0.7 * whole}
    assert together == set(read) - {"inside the prefix", "up to inside"}


def test_a_leader_that_ends_at_once_is_replaced(monkeypatch):
    """Its row is another's by the time the followers are read."""
    begin = models.tokens(1, 12, seed=77)[0].tolist()
    asked = [begin + prompt for prompt in prompts((4, 5, 4, 7, 6, 4, 9))]
    monkeypatch.setattr(run, "PADDING", 8)
    for limits in ([1, 4, 1, 3, 1, 1, 2], [1] * 7):
        found = tokens(engine("llama", max_batch=7).generate(asked, max_new_tokens=limits))
        assert found == [generated(models.model("llama"), p, None, n) for p, n in zip(asked, limits, strict=True)]


# Ends -----------------------------------------------------------------------------------------------------------------


def test_stop_tokens_and_strings():
    made = engine("llama")
    whole = tokens(made.generate(prompts(), max_new_tokens=9))
    row = whole[3]
    at = next(i for i in range(2, 9) if row[i] not in row[:i])
    by_token = list(made.generate(prompts(), max_new_tokens=9, stop=row[at]))[3]
    assert (by_token.token_ids, by_token.finish_reason) == (row[:at], "stop")
    middle = f"{row[at - 1]}><{row[at]}"[1:]  # begins inside one token and ends inside the next
    by_text = list(made.generate(prompts(), max_new_tokens=9, stop=["never", middle]))[3]
    text = made.tokenizer.decode(row)
    assert by_text.text == text[: text.index(middle)] and by_text.finish_reason == "stop"
    assert by_text.token_ids == row[: len(by_text.token_ids)] and middle in made.tokenizer.decode(by_text.token_ids)
    assert len(by_text.token_ids) <= at + 1


def test_end_of_sequence_of_the_generation_config():
    model = models.build("llama")
    whole = tokens(engine(model).generate(prompts(), max_new_tokens=9))
    ends = [whole[0][4], whole[1][2]]
    model.generation_config.eos_token_id = ends
    for row, completion in zip(whole, engine(model).generate(prompts(), max_new_tokens=9), strict=True):
        at = next((i for i, token in enumerate(row) if token in ends), None)
        assert completion.token_ids == row[:at]
        assert completion.finish_reason == ("length" if at is None else "stop")


def test_max_length_ends_a_completion():
    made = engine("llama", max_length=10)
    found = list(made.generate(prompts((9, 4, 2)), max_new_tokens=7))
    assert [len(c.token_ids) for c in found] == [1, 6, 7]
    assert [c.token_ids for c in found] == [
        generated(models.model("llama"), p, None, len(c.token_ids))
        for p, c in zip(prompts((9, 4, 2)), found, strict=True)
    ]


# Probes ---------------------------------------------------------------------------------------------------------------


@ALL
def test_projections_are_what_a_reader_sees(name):
    model, plans, n = models.model(name), mixed(name), models.N_LAYERS
    directions = torch.stack([models.direction(50), models.direction(51)])
    found = list(engine(name).generate(prompts(), plans=plans, max_new_tokens=LIMITS, probe=directions))
    for completion, steered in zip(found, plans, strict=True):
        fed = torch.tensor([completion.prompt_ids + completion.token_ids[:-1]])
        with torch.no_grad(), fs.steer(model, steered or fs.Plan()) as steering:
            steering.set_prompt(len(completion.prompt_ids))
            with read(model, "resid_pre") as before, read(model, "resid_post", layers=[n - 1]) as after:
                model(fed)
        stream = torch.stack([*(before[i][0] for i in range(n)), after[n - 1][0]])
        expected = stream @ torch.cat([orthonormal(d, "") for d in directions]).T
        assert completion.projections.shape == (n + 1, fed.shape[1], 2)
        scale = float(expected.abs().max())
        torch.testing.assert_close(completion.projections, expected, rtol=0, atol=1e-4 * scale)
    assert tokens(found) == tokens(engine(name).generate(prompts(), plans=plans, max_new_tokens=LIMITS))


def test_projections_on_one_direction_and_on_a_vector():
    made, d = engine("llama"), models.direction(0)
    vector = fs.SteeringVector({1: d}, at="attn_out", model="tiny")
    one = list(made.generate(prompts(), max_new_tokens=4, probe=d))
    assert all(c.projections.shape == (3, len(c.prompt_ids) + 3) for c in one)
    by_layer = list(made.generate(prompts(), max_new_tokens=4, probe=vector))
    assert all(c.projections.shape == (1, len(c.prompt_ids) + 3) for c in by_layer)
    assert all(c.projections is None for c in made.generate(prompts(), max_new_tokens=4))
    assert not made._steering.projections  # nothing is kept


def test_projections_end_with_the_last_token_read():
    """A stop token was drawn, not read; everything before it was read."""
    made, d = engine("llama"), models.direction(0)
    row = tokens(made.generate(prompts(), max_new_tokens=9))[3]
    at = next(i for i in range(2, 9) if row[i] not in row[:i])
    stopped = list(made.generate(prompts(), max_new_tokens=9, stop=row[at], probe=d))[3]
    assert stopped.projections.shape[1] == len(stopped.prompt_ids) + len(stopped.token_ids)
    whole = list(made.generate(prompts(), max_new_tokens=9, probe=d))[3]
    torch.testing.assert_close(stopped.projections, whole.projections[:, : stopped.projections.shape[1]])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "text"}, "expected a list"),
        ({"prompts": [[]]}, "has no tokens"),
        ({"prompts": [[3], "  "]}, r"prompts\[1\] is blank"),
        ({"prompts": [[3], [4] * 32]}, r"prompts\[1\] has 32 tokens.*larger max_length"),
        ({"prompts": [[3], [models.VOCAB]]}, r"prompts\[1\] holds the token"),
        ({"prompts": [[3]], "plans": [None, None]}, "2 plans for 1 prompts"),
        ({"prompts": [[3]], "plans": ["refusal"]}, r"plans\[0\] is a str"),
        ({"prompts": [[3]], "plans": "refusal"}, "plans is a str"),
        ({"prompts": [[3]], "plans": fs.Add(torch.ones(7), layers=0)}, r"plans\[0\].*hidden size 7"),
        ({"prompts": [[3]], "plans": fs.Add(torch.ones(models.HIDDEN), layers=5)}, r"plans\[0\].*out of range"),
        ({"prompts": [[3]], "plans": fs.Probe(torch.ones(models.HIDDEN), layers=0)}, r"plans\[0\] has probes"),
        ({"prompts": [[3]], "probe": torch.ones(7)}, "hidden size 7"),
        ({"prompts": [[3]], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": [[3]], "max_new_tokens": [2, 3]}, "max_new_tokens has 2 numbers for 1 prompts"),
        ({"prompts": [[3]], "temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": [[3]], "temperature": math.nan}, "temperature is nan"),
        ({"prompts": [[3]], "top_p": [1.5]}, r"top_p\[0\] is 1.5"),
        ({"prompts": [[3]], "top_k": 2.5}, "top_k is 2.5"),
        ({"prompts": [[3]], "top_k": 2**70}, "top_k is 1180591620717411303424: expected 0 to"),
        ({"prompts": [[3]], "seed": "x"}, "seed is 'x'"),
        ({"prompts": [[3]], "stop": ""}, "stop holds ''"),
        ({"prompts": [[3]], "stop": None}, "stop holds None"),
        ({"prompts": [[3]], "stop": -1}, "stop holds -1"),
        ({"prompts": [[3]], "seed": 1.5}, "seed is 1.5"),
        ({"prompts": [[3]], "seed": True}, "seed is True"),
        ({"prompts": [[3]], "max_new_tokens": None}, "max_new_tokens is None"),
        ({"prompts": [[3]], "max_new_tokens": np.float32(2)}, r"max_new_tokens is np.float32\(2"),
        ({"prompts": [[3]], "temperature": "hot"}, "temperature is 'hot'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message):
    model = models.model("llama")
    made, before = engine("llama"), state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        made.generate(**arguments)
    assert unchanged(state(model), before)
    assert len(tokens(made.generate(prompts(), max_new_tokens=2))) == 8


def test_numbers_of_other_libraries():
    made, ids = engine("llama"), prompts((5, 3))
    expected = tokens(made.generate(ids, max_new_tokens=[4, 3], temperature=0.5, seed=[7, 8], stop=[90]))
    settings = {
        "max_new_tokens": np.array([4, 3]), "temperature": np.float32(0.5), "seed": np.int64(7), "stop": np.array([90])
    }  # fmt: skip
    assert tokens(made.generate([np.array(ids[0]), torch.tensor(ids[1])], **settings)) == expected
    assert (
        tokens(made.generate(ids, max_new_tokens=torch.tensor(3)))[1]
        == tokens(made.generate(ids[1:], max_new_tokens=3))[0]
    )


def test_end_tokens_as_a_tensor():
    model = models.build("llama")
    first = tokens(engine(model).generate(prompts((5,)), max_new_tokens=3))[0]
    model.generation_config.eos_token_id = torch.tensor(first[1:2])
    assert tokens(engine(model).generate(prompts((5,)), max_new_tokens=3)) == [first[: first.index(first[1])]]


def test_a_model_that_was_cast_since_is_refused():
    model = models.build("llama")
    made = engine(model)
    model.to(torch.float64)
    with pytest.raises(
        RuntimeError, match=r"in torch.float64 on cpu now.* made for torch.float32 on cpu: make another"
    ):
        made.generate([[3]])


def fewer_layers(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def another_attention(model):
    model.set_attn_implementation("flex_attention")


@pytest.mark.parametrize(
    ("change", "message"), [(fewer_layers, "layers have changed .* make another"), (another_attention, 'needs "sdpa"')]
)
@pytest.mark.parametrize("steered", [True, False])
def test_a_model_that_was_changed_since_is_refused(change, message, steered):
    model = models.build("llama")
    made = engine(model)
    running = made.generate([[3]])
    change(model)
    for call in (lambda: made.generate([[3]], plan("llama") if steered else None), lambda: next(running)):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


def test_autocast_is_refused():
    """Keys and values would be of another dtype than those that rows hold."""
    made = engine("llama")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="leave autocast"):
        made.generate([[3]])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="leave autocast"):
        engine("llama")
    assert tokens(made.generate([[3]], max_new_tokens=2)) == [generated(models.model("llama"), [3], None, 2)]


def test_a_plan_larger_than_the_capacity_is_refused():
    made = engine("llama", capacity=fs.Capacity(slots=2, vectors=2, entries=24))
    with pytest.raises(ValueError, match=r"plans\[1\] needs .* use a larger capacity"):
        made.generate(prompts(), plans=[*mixed("llama")[1:], plan("llama")])


def test_resid_mid_where_there_is_none():
    with pytest.raises(ValueError, match=r"plans\[0\].*Add at resid_mid of layer 0"):
        engine("phi").generate([[3]], plans=fs.Add(models.direction(0), layers=0, at="resid_mid"))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda model: model.train(), {}, "training mode"),
        (lambda model: model.lm_head.to("meta"), {}, "one device"),
        (lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"), {}, "sdpa"),
        (lambda model: setattr(model.config, "layer_types", ["linear_attention"] * 2), {}, "linear_attention"),
        (lambda model: None, {"max_batch": 0}, "max_batch is 0"),
        (lambda model: None, {"max_length": 1}, "max_length 1"),
        (lambda model: None, {"max_batch": 2.5}, "max_batch is 2.5"),
        (lambda model: None, {"max_length": "16"}, "max_length '16'"),
        (lambda model: None, {"max_length": 4096}, "positions for 128"),
    ],
)
def test_models_that_are_refused(change, settings, message):
    model = models.build("llama")
    change(model)
    with pytest.raises(ValueError, match=message):
        engine(model, **settings)


def test_a_model_whose_logits_differ_is_refused(monkeypatch):
    """Whatever reads positions from somewhere else than position_ids, or masks otherwise."""
    model = models.build("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(
        rotary, "forward", lambda x, position_ids: forward(x, position_ids - position_ids.amin(1, True))
    )
    with pytest.raises(ValueError, match="away from the model's own"):
        engine(model)


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_a_rotation_that_depends_on_the_length_is_refused_past_the_switch_over(max_batch):
    """Phi-3's: another rotation for all tokens once a sequence is longer than 8. The remedy works."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
    }
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 8}
    model = models.build("phi3", rope_scaling=rope, **sizes)
    with pytest.raises(ValueError, match=r"tokens.* away .* so far: make the Engine with max_length=8, or use"):
        engine(model, max_batch=max_batch)
    made = engine(model, max_batch=max_batch, max_length=8)
    asked, plans = prompts((3, 5, 1, 2)), mixed("phi3")[:4]
    expected = [generated(model, *each, 3) for each in zip(asked, plans, strict=True)]
    assert tokens(made.generate(asked, plans=plans, max_new_tokens=3)) == expected


def test_windows_are_tried_on_both_sides(monkeypatch):
    """An attention that forgets its window shows behind it alone."""
    model = models.build("mistral", sliding_window=9)
    assert tokens(engine(model).generate(prompts((20, 3)), max_new_tokens=8)) == [
        generated(model, prompt, None, 8) for prompt in prompts((20, 3))
    ]
    monkeypatch.setattr(batch, "windows", lambda config: {"": None})
    with pytest.raises(ValueError, match=r"sequences of 12, 3, 10 tokens together.*max_length=9"):
        engine(model)


@pytest.mark.parametrize("steered", [True, False])
@SOME
def test_nobody_else_runs_the_model_meanwhile(name, steered):
    """Not even a pass of as many tokens as there are rows, which could be taken for a step."""
    model = models.build(name)
    made, other, plans = engine(model), engine(model), plan(name) if steered else None
    running = made.generate(prompts(), plans=plans, max_new_tokens=LIMITS)
    found = [next(running)]
    for rows, length in ((1, 1), (2, 1), (3, 1), (2, 5)):
        with pytest.raises(RuntimeError, match="exhaust or close its iterator first"):
            model(models.tokens(rows, length))
    with pytest.raises(RuntimeError, match="an Engine generates with this model"), fs.steer(model, plan(name)):
        pass
    with pytest.raises(RuntimeError, match=r"another Engine .* exhaust or close its iterator first"):
        other.generate(prompts(), plans=plan(name))
    expected = [generated(models.model(name), p, plans, n) for p, n in zip(prompts(), LIMITS, strict=True)]
    assert tokens([*found, *running]) == expected == tokens(other.generate(prompts(), plans, max_new_tokens=LIMITS))
    assert torch.equal(model(models.tokens(2, 5)).logits, models.model(name)(models.tokens(2, 5)).logits)


def test_another_thread_does_not_run_the_model_meanwhile():
    """Not in the middle of a pass, either; where it calls the unembedding itself, it gets all that it asks for."""
    model = models.build("llama")
    made, seen, states = engine(model), [], torch.randn(2, 5, models.HIDDEN)

    def run(rows):
        try:
            seen.append(model.lm_head(states).shape)
            model(models.tokens(*rows))
        except RuntimeError as error:
            seen.append(str(error))

    def elsewhere(module, args, output):
        if len(seen) < 8 and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run, args=(output.shape[:2],))
            thread.start()
            thread.join()

    with torch.no_grad():
        model.model.layers[0].mlp.register_forward_hook(elsewhere)
        found = tokens(made.generate(prompts(), plan("llama"), max_new_tokens=3))
    assert seen[::2] == [(2, 5, models.VOCAB)] * 4 and all("in another thread" in text for text in seen[1::2])
    assert found == [generated(models.model("llama"), p, plan("llama"), 3) for p in prompts()]


def test_a_window_that_is_changed_is_heeded():
    model = models.build("mistral", sliding_window=8)
    made, long = engine(model), prompts((20,))
    wide = tokens(made.generate(long, max_new_tokens=6))
    model.config.sliding_window = 4
    assert wide != tokens(made.generate(long, max_new_tokens=6)) == [generated(model, long[0], None, 6)]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(copied):
    with pytest.raises(TypeError, match="copy the model, and make another Engine"):
        copied(engine("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    def seen():
        made = engine("llama", max_batch=2)
        return list(made.generate(prompts(), plan("llama"), max_new_tokens=4, temperature=0.8, seed=1, probe=V))

    expected = seen()
    torch.set_default_dtype(dtype)
    try:
        found = seen()
    finally:
        torch.set_default_dtype(torch.float32)
    assert tokens(found) == tokens(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.projections.dtype == torch.float32 and torch.equal(one.projections, two.projections)


def test_a_model_that_is_being_steered_is_refused():
    made = engine("llama")
    with fs.steer(models.model("llama"), plan("llama")), pytest.raises(RuntimeError, match="being steered"):
        made.generate(prompts())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_of_one_token_together(name):
    steered = [plan(name), None, plan(name, 1)]
    asked = prompts((1, 1, 1))
    found = tokens(engine(name).generate(asked, plans=steered, max_new_tokens=4))
    assert found == [generated(models.model(name), *each, 4) for each in zip(asked, steered, strict=True)]
