"""Where the prompts of several sequences end, whoever calls the model and however: told by which columns of a layer a
plain hook sees changed, counted by hand."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from class_outputs import note_class_outputs
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

import faststeer as fs

NEW = 4
ADD = {"layers": 1, "at": "attn_out"}


def d(seed: int = 0) -> Tensor:
    return models.direction(seed)


def plan(positions: Any = "all", **more: Any) -> fs.Plan:
    return fs.Plan([fs.Add(d(), 3.0, positions=positions, **ADD, **more)])


class Columns:
    """Which tokens of each pass are changed at a layer's attention output, pass by pass, as lists of 0 and 1."""

    def __init__(self, layer: nn.Module) -> None:
        self.passes: list[list[list[int]]] = []
        self._layer = layer.self_attn

    def watch(self) -> Columns:
        """Called inside of the context: notes what the module's class computes, and what a hook of the module sees."""
        before: list[Tensor] = []
        restore = note_class_outputs(self._layer, lambda out: before.append(out[0].clone()))

        def behind(module: nn.Module, args: Any, out: Any) -> None:
            self.passes.append((out[0] != before.pop()).any(-1).int().tolist())

        handle = self._layer.register_forward_hook(behind)
        self._undos = restore, handle.remove
        return self

    def row(self, row: int = 0) -> list[int]:
        """All passes of a row, one after another."""
        return [each for rows in self.passes for each in rows[row]]


def steered(model: nn.Module, base: nn.Module, plans: Any, act: Callable[[Any], Any], **more: Any) -> Columns:
    columns = Columns(base.model.layers[1])
    with torch.no_grad(), fs.steer(model, plans, **more) as steering:
        columns.watch()
        act(steering)
    for undo in columns._undos:
        undo()
    return columns


@pytest.fixture
def model() -> nn.Module:
    return models.build("llama")


SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WHERE = [
    ("prompt", lambda end: lambda c: c < end),
    ("generated", lambda end: lambda c: c >= end),
    ("last", lambda end: lambda c: c == end - 1),
    ("[-2:1]", lambda end: lambda c: end - 2 <= c < end + 1),
]
POSITIONS = pytest.mark.parametrize(("positions", "rule"), WHERE, ids=[name for name, _ in WHERE])
PEFT = {
    "lora": (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False), 0),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 3),
    "p-tuning": (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8), 2),
    "prefix": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),  # in the cache: no column of a pass
}


# Who calls `generate` -------------------------------------------------------------------------------------------------


@POSITIONS
@pytest.mark.parametrize("kind", PEFT)
def test_under_peft_called_by_position(kind, positions, rule, model):
    """Virtual tokens are part of the prompt."""
    config, virtual = PEFT[kind]
    peft, ids = get_peft_model(model, config).eval(), models.tokens(2, 5)
    base = peft.get_base_model()
    columns = steered(peft, base, plan(positions), lambda _: peft.generate(ids, **SETTINGS))
    end = 5 + virtual
    assert columns.passes[0][1] == [int(rule(end)(c)) for c in range(end)]
    if not virtual:  # some versions of PEFT put virtual tokens in front of every token
        assert columns.row(1) == [int(rule(end)(c)) for c in range(end + NEW - 1)]


class Wrapper(nn.Module):
    """Around a model, with a `generate` that says nothing of its arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *everything: Any, **named: Any) -> Any:
        return self.inner(*everything, **named)

    def generate(self, *everything: Any, **named: Any) -> Any:
        return self.inner.generate(*everything, **named)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()


@POSITIONS
@pytest.mark.parametrize("around", [True, False], ids=["wrapper", "model inside"])
def test_a_wrapper_of_ones_own(around, positions, rule, model):
    wrapper, ids = Wrapper(model), models.tokens(1, 6)
    target = wrapper if around else model
    columns = steered(target, model, plan(positions), lambda _: wrapper.generate(ids, **SETTINGS))
    assert columns.row() == [int(rule(6)(c)) for c in range(6 + NEW - 1)]


@POSITIONS
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("given", [True, False], ids=["mask given", "mask inferred"])
def test_padding_on_the_right(positions, rule, cache, given, model):
    """Each row's own last token, also where the mask that reaches the layers has four dimensions."""
    prompts = [models.tokens(1, n, seed=n)[0] for n in (6, 3, 4)]
    batch = models.right_padded(prompts)
    batch = batch if given else {"input_ids": batch["input_ids"]}
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    columns = steered(model, model, plan(positions), lambda _: model.generate(**batch, **how, **SETTINGS))
    for row, length in enumerate((6, 3, 4)):
        first = columns.passes[0][row][:length]
        behind = [rows[row][-1] for rows in columns.passes[1:]]
        expected = [int(rule(length)(c)) for c in range(length)]
        assert first == expected and behind == [int(rule(6)(c)) for c in range(6, 6 + NEW - 1)]


@POSITIONS
@pytest.mark.parametrize("how", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}], ids=["chunks", "lookup"])
def test_a_prompt_read_in_pieces_or_with_guesses(how, positions, rule, model):
    ids = models.tokens(1, 3).repeat(1, 3)  # what follows was there before: guesses are made
    plain = steered(model, model, plan(positions), lambda _: model.generate(ids, **SETTINGS))
    with fs.steer(model, plan(positions)):
        expected = model.generate(ids, **SETTINGS)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **how, **SETTINGS)
    assert torch.equal(found, expected)
    assert plain.row() == [int(rule(9)(c)) for c in range(9 + NEW - 1)]


def test_guidance_is_a_sequence_of_its_own(model):
    """Two caches in one generate, whose prompts have other lengths."""
    ids, negative = models.tokens(1, 6), models.tokens(1, 3, seed=5)
    columns = steered(
        model,
        model,
        plan("last"),
        lambda _: model.generate(ids, guidance_scale=1.5, negative_prompt_ids=negative, **SETTINGS),
    )
    assert columns.passes[:2] == [[[0, 0, 0, 0, 0, 1]], [[0, 0, 1]]]
    assert not any(each for rows in columns.passes[2:] for each in rows[0])


def test_guidance_without_a_cache_is_refused(model):
    ids, negative = models.tokens(1, 6), models.tokens(1, 3, seed=5)
    how = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "use_cache": False}
    with fs.steer(model, plan("last")), pytest.raises(ValueError, match="use_cache=True"):
        model.generate(ids, **how, **SETTINGS)
    with fs.steer(model, plan()):
        assert model.generate(ids, **how, **SETTINGS).shape == (1, 6 + NEW)


# Loops of one's own ---------------------------------------------------------------------------------------------------


def chat(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A step of a greedy loop, whose cache the model makes."""
    state: dict[str, Any] = {"ids": ids, "cache": {}}

    def step() -> Tensor:
        out = model(input_ids=state["ids"], use_cache=True, **state["cache"])
        state.update(cache=models.cached(model, models.cache_of(out)), ids=out.logits[:, -1:].argmax(-1))
        return out.logits[:, -1]

    return step


@pytest.mark.parametrize("positions", ["prompt", "generated", "last", 1])
def test_chats_in_turn(positions, model):
    """Each as if it were alone, with caches that the model made."""
    prompts = [models.tokens(1, n, seed=n) for n in (3, 7, 5)]
    alone = []
    with torch.no_grad():
        for ids in prompts:
            with fs.steer(model, plan(positions)):
                step = chat(model, ids)
                alone.append([step() for _ in range(NEW)])
        with fs.steer(model, plan(positions)):
            steps = [chat(model, ids) for ids in prompts]
            together = [[step() for step in steps] for _ in range(NEW)]
    for i, expected in enumerate(alone):
        for k in range(NEW):
            torch.testing.assert_close(together[k][i], expected[k], rtol=1e-4, atol=1e-5)


def test_latched_gates_of_chats_in_turn(model):
    """Open for one, closed for the other, whoever comes first."""
    a, b = models.tokens(1, 4, seed=1), models.tokens(1, 6, seed=2)
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0][0, -1].detach()), with_kwargs=True
    )
    with torch.no_grad():
        model(a), model(b)
    handle.remove()
    gate = fs.Gate(
        seen[0] - seen[1], float((seen[0] + seen[1]) @ (seen[0] - seen[1])) / 2, latched=True, layer=0, at="resid_pre"
    )
    both = [[], []]
    with torch.no_grad(), fs.steer(model, plan(when=gate)):
        columns = Columns(model.model.layers[1]).watch()
        steps = chat(model, a), chat(model, b)
        for _ in range(3):
            for which, step in enumerate(steps):
                step()
                both[which].append(columns.passes[-1][0][-1])
        for undo in columns._undos:
            undo()
    assert both == [[1, 1, 1], [0, 0, 0]]


def test_a_cache_that_was_filled_elsewhere(model):
    """Asked for where a plan needs it; what the message says to do works."""
    ids, after = models.tokens(1, 5), models.tokens(1, 2, seed=3)
    with torch.no_grad():
        cache = models.cached(model, models.cache_of(model(ids, use_cache=True)))
        with fs.steer(model, plan()):
            model(after, **copy.deepcopy(cache))  # nobody asks
        with fs.steer(model, plan("generated")) as steering:
            with pytest.raises(ValueError, match=r"filled outside.*set_prompt"):
                model(after, **copy.deepcopy(cache))
            steering.set_prompt(6)
            columns = Columns(model.model.layers[1]).watch()
            model(after, **cache)
            assert columns.passes == [[[0, 1]]]
        gate = fs.Gate(d(1), latched=True)
        with fs.steer(model, plan(when=gate)) as steering:
            steering.set_prompt(5)
            with pytest.raises(ValueError, match="latched gates"):
                model(after, **copy.deepcopy(cache))
    for undo in columns._undos:
        undo()


def test_a_cache_whose_rows_became_more_or_fewer(model):
    ids = models.right_padded([models.tokens(1, 5)[0], models.tokens(1, 3)[0]])
    with (
        torch.no_grad(),
        fs.steer(model, fs.Add(d(), positions="[-1:1]", when=fs.Gate(d(1), -1e9, latched=True), **ADD)),
    ):
        cache = DynamicCache(config=model.config)
        model(**ids, **models.cached(model, cache))
        cache.batch_repeat_interleave(2)
        columns = Columns(model.model.layers[1]).watch()
        model(models.tokens(4, 1), **models.cached(model, cache))
        assert columns.passes == [[[1], [1], [1], [1]]]
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        with pytest.raises(ValueError, match="the batch has 3 rows, but 4 when its prompt was read"):
            model(models.tokens(3, 1), **models.cached(model, cache))
    for undo in columns._undos:
        undo()


def test_a_cache_that_was_cropped_into_its_prompt(model):
    """Another prompt behind the same beginning: where it ends must be said."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), fs.steer(model, plan("last")) as steering:
        model(models.tokens(1, 7), **models.cached(model, cache))
        cache.crop(-3)
        tail = models.tokens(1, 2, seed=4)
        with pytest.raises(ValueError, match=r"cropped.*set_prompt"):
            model(tail, **models.cached(model, cache))
        steering.set_prompt(6)
        columns = Columns(model.model.layers[1]).watch()
        model(tail, **models.cached(model, cache))
        assert columns.passes == [[[0, 1]]]
    for undo in columns._undos:
        undo()


def test_sequences_that_a_mask_of_four_dimensions_keeps_apart(model):
    """Position ids begin anew between real tokens; padding in front of one sequence does not count."""
    ids, sequence = models.tokens(1, 7), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = (sequence[:, None] == sequence) & torch.ones(7, 7).tril().bool()
    with torch.no_grad(), fs.steer(model, plan("last")):
        with pytest.raises(ValueError, match="packed pass"):
            model(ids, attention_mask=mask[None, None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
        padded = mask & (sequence == 1)
        columns = Columns(model.model.layers[1]).watch()
        model(ids, attention_mask=padded[None, None], position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3]]))
        assert columns.passes == [[[0, 0, 0, 0, 0, 0, 1]]]
    for undo in columns._undos:
        undo()


def test_sequences_one_after_another_in_a_row(model):
    ids, places = models.tokens(1, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        with fs.steer(model, plan("last")), pytest.raises(ValueError, match="packed pass"):
            model(ids, position_ids=places, use_cache=False)
        with fs.steer(model, plan()):
            model(ids, position_ids=places, use_cache=False)


@pytest.mark.parametrize("broadcast", [False, True], ids=["by queries", "by columns"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions(kind, broadcast, model):
    """As wrappers make it."""
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    mask = real[:, None, None, :].expand(-1, 1, 5, -1) & torch.ones(5, 5, dtype=torch.bool).tril()
    if broadcast:
        mask = real[:, None, None, :]
    if kind is not torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    columns = steered(
        model,
        model,
        plan("last"),
        lambda _: model(models.tokens(2, 5), attention_mask=mask, use_cache=False),
    )
    assert columns.passes == [[[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("bias", [0, -50, -100])
def test_a_mask_of_four_dimensions_with_biases(dtype, bias):
    """Biases, as ALiBi has, leave a token visible. Integers are added to the scores, too."""
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    mask = torch.full((2, 1, 5, 5), bias, dtype=dtype).masked_fill(~real[:, None, None, :], -10_000)
    model, ids = models.build("llama", attn_implementation="eager"), models.tokens(2, 5)
    columns = steered(model, model, plan("last"), lambda _: model(ids, attention_mask=mask, use_cache=False))
    assert columns.passes == [[[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]]


@pytest.mark.parametrize("value", [1, 1.0, 0.5, -101.0, -999.0, float("nan"), float("inf")])
def test_a_mask_that_says_neither_visible_nor_hidden_is_refused(value):
    model, ids = models.build("llama", attn_implementation="eager"), models.tokens(2, 5)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.int64 if isinstance(value, int) else torch.float32)
    mask[1, 0, 2, 2] = value
    with torch.no_grad():
        with fs.steer(model, plan("last")) as steering:
            with pytest.raises(ValueError, match=r"does not show where a prompt ends: .*set_prompt"):
                model(ids, attention_mask=mask, use_cache=False)
            steering.set_prompt(5)
            model(ids, attention_mask=mask, use_cache=False)
        with fs.steer(model, plan()):  # nobody asks
            model(ids, attention_mask=mask, use_cache=False)


# Threads --------------------------------------------------------------------------------------------------------------


def in_thread(act: Callable[[], Any]) -> Any:
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(act())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return out[0]


@torch.no_grad()
def generated(model: nn.Module, ids: Tensor) -> Tensor:
    return model.generate(ids, **SETTINGS, output_logits=True, return_dict_in_generate=True).logits[-1]


def test_a_second_context_in_another_thread_is_refused(model):
    ids = models.tokens(1, 4)
    plain = generated(model, ids)
    with fs.steer(model, plan()):
        inside = generated(model, ids)

        def enter() -> None:
            with fs.steer(model, plan("last")):
                raise AssertionError("entered")

        error = in_thread(enter)
        assert isinstance(error, RuntimeError) and "a plan per row" in str(error) and "Engine" in str(error)
        assert torch.equal(generated(model, ids), inside)
        with fs.steer(model, plan("last")):  # nested in this thread as ever
            pass
    assert torch.equal(generated(model, ids), plain) and not torch.equal(inside, plain)
    assert not isinstance(in_thread(lambda: fs.steer(model, plan()).__enter__().__exit__(None, None, None)), Exception)


def test_two_tasks_of_one_thread(model):
    async def task(gate: asyncio.Event, wait: asyncio.Event) -> str:
        try:
            with fs.steer(model, plan()):
                gate.set()
                await wait.wait()
        except RuntimeError as error:
            return str(error)
        return ""

    async def both() -> list[str]:
        first, last = asyncio.Event(), asyncio.Event()
        one = asyncio.create_task(task(first, last))
        await first.wait()
        two = await asyncio.create_task(task(first, last))
        last.set()
        return [await one, two]

    assert [bool(each) for each in asyncio.run(both())] == [False, True]


def test_a_task_that_was_there_before_is_refused(model):
    """One that is created later is steered, as threads are."""
    ids = models.tokens(1, 4)

    async def run() -> Tensor:
        return model(ids).logits

    async def all_of_them() -> list[object]:
        entered, left = asyncio.Event(), asyncio.Event()

        async def before() -> Tensor:
            await entered.wait()
            try:
                return await run()
            finally:
                left.set()

        async def steering() -> Tensor:
            with fs.steer(model, plan()):
                entered.set()
                await left.wait()
                return await asyncio.create_task(run())

        tasks = [asyncio.create_task(before()), asyncio.create_task(steering())]
        return await asyncio.gather(*tasks, return_exceptions=True)

    refused, steered = asyncio.run(all_of_them())
    assert isinstance(refused, RuntimeError) and "another task of this thread" in str(refused)
    with fs.steer(model, plan()):
        assert torch.equal(steered, model(ids).logits)
        assert torch.equal(steered, asyncio.run(run())), "a loop that runs inside"


def test_a_thread_is_not_taken_for_one_that_has_ended(model):
    """The system gives an identifier again to threads that are started later."""
    ids, entered, out = models.tokens(1, 4), threading.Event(), []
    before = [threading.Thread(target=entered.wait) for _ in range(4)]
    for thread in before:
        thread.start()
    with fs.steer(model, plan()):
        entered.set()
        for thread in before:
            thread.join(60)
        expected = model(ids).logits
        for _ in before:
            thread = threading.Thread(target=lambda: out.append(model(ids).logits))
            thread.start()
            thread.join(60)
    assert len(out) == 4 and all(torch.equal(each, expected) for each in out)


def test_a_thread_that_was_started_inside_is_steered(model):
    """As streamers do it; at the same time as another one of another prompt length."""
    prompts = [models.tokens(1, n, seed=n) for n in (3, 8)]
    with fs.steer(model, plan("generated")):
        expected = [generated(model, ids) for ids in prompts]
        out: dict[int, list[Tensor]] = {0: [], 1: []}
        threads = [
            threading.Thread(target=lambda i=i: [out[i].append(generated(model, prompts[i])) for _ in range(5)])
            for i in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in (0, 1):
        assert len(out[i]) == 5
        for each in out[i]:
            torch.testing.assert_close(each, expected[i], rtol=1e-4, atol=1e-5)


class Pausing:
    """A streamer that waits behind the first token until the context is left."""

    def __init__(self) -> None:
        self.tokens, self.begun, self.left = 0, threading.Event(), threading.Event()

    def put(self, _tokens: Tensor) -> None:
        self.tokens += 1
        if self.tokens == 2:  # the prompt comes first
            self.begun.set()
            self.left.wait(60)

    def end(self) -> None: ...


def test_a_thread_that_outlives_the_context_is_told(model):
    streamer, out, ids = Pausing(), [], models.tokens(1, 4)

    def answer() -> None:
        with pytest.raises(RuntimeError, match=r"left while this generate ran.*thread\.join\(\)"):
            model.generate(ids, **SETTINGS, streamer=streamer)
        out.append(streamer.tokens)

    with fs.steer(model, plan()):
        thread = threading.Thread(target=answer)
        thread.start()
        assert streamer.begun.wait(60)
    streamer.left.set()
    thread.join(60)
    assert out and out[0] > 2


def test_a_thread_that_was_there_before_is_refused(model):
    ids, entered, done, out = models.tokens(1, 4), threading.Event(), threading.Event(), []

    def plain() -> None:
        entered.wait(60)
        for act in (lambda: generated(model, ids), lambda: model(ids)):
            try:
                out.append(act())
            except RuntimeError as error:
                out.append(str(error))
        done.set()

    thread = threading.Thread(target=plain)
    thread.start()
    with fs.steer(model, plan()):
        entered.set()
        done.wait(60)
    thread.join(60)
    assert len(out) == 2 and all("was there before" in each for each in out)


def test_contexts_in_any_order_leave_no_wrapper(model):
    contexts = [fs.steer(model, plan()), fs.steer(model, plan("last")), fs.hf.read(model)]
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        with ExitStack() as stack:
            for context in contexts:
                context.__enter__()
            for i in order:
                stack.callback(contexts[i].__exit__, None, None, None)
        assert not any(name in vars(m) for m in model.modules() for name in ("generate", "forward", "__getstate__"))
