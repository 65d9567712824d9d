"""`generate_batch` and managers of continuous batching, under a plan for all requests or one for each: against each
request alone under its own plan by `generate`, and against a hook written by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

import faststeer as fs
from faststeer.plan import Plan

NEW = 5
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # transformers 5.17
PREFIX = models.tokens(1, 12, seed=9)[0].tolist()
PROMPTS = [
    models.tokens(1, 7, seed=1)[0].tolist(),
    [*PREFIX, 5],
    [*PREFIX, 6, 7],
    models.tokens(1, 1, seed=2)[0].tolist(),
    models.tokens(1, 23, seed=3)[0].tolist(),
]


@pytest.fixture(scope="module", autouse=True)
def frozen_objects():
    """transformers collects garbage whenever a manager stops: among the objects of these tests alone, not of all that
    is imported, which takes longer than a test."""
    gc.freeze()
    yield
    gc.unfreeze()


def d(seed: int) -> Tensor:
    return models.direction(seed)


def add(seed: int = 0, positions: Any = "all", **more: Any) -> Plan:
    return Plan([fs.Add(d(seed), 2.0, layers=0, positions=positions, **more)])


def latched(seed: int) -> Plan:
    """A gate that is open for about half of the prompts."""
    return add(seed, when=fs.Gate(d(seed + 10), 0.0, latched=True))


ALL = [add(0), None, add(1), add(2), add(3)]
EVERY_KIND = [add(0, "last"), add(1, "generated"), add(2, slice(-3, 2)), None, add(3, 0)]
LATCHED = [latched(0), latched(1), latched(2), add(3, "[-2:]"), latched(4)]


def build(name: str = "llama") -> Any:
    """In fp64, so that packed passes and single ones differ by the rounding of log probabilities to fp32 alone."""
    return models.build(name).double()


def settings(**more: Any) -> dict[str, Any]:
    """Small blocks, so that prompts fill several, and log probabilities."""
    small = {PAGE_SIZE: 4, "num_blocks": 64, "max_batch_tokens": 64, "return_logprobs": True}
    return {
        "generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(**{**small, **more}),
        "warmup": False,
    }


Answers = list[tuple[list[int], Tensor]]


def together(model: Any, prompts: Sequence[list[int]] = PROMPTS, persistent: bool = False, **more: Any) -> Answers:
    """Tokens and their log probabilities by `generate_batch`, request by request."""
    outputs = list(model.generate_batch(prompts, **settings(**more), persistent_manager=persistent).values())
    assert [each.error for each in outputs] == [None] * len(prompts)
    assert [each.prompt_ids for each in outputs] == list(prompts)
    return [(each.generated_tokens, torch.tensor(each.logprobs)) for each in outputs]


def alone(model: Any, plans: Sequence[Any], prompts: Sequence[list[int]] = PROMPTS) -> Answers:
    """Each request by itself, by `generate` under its own plan."""
    answers = []
    for prompt, plan in zip(prompts, plans, strict=True):
        with fs.steer(model, [plan]):
            answers.append(by_generate(model, prompt))
    return answers


def by_generate(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(torch.tensor([prompt]), return_dict_in_generate=True, output_logits=True, **options)
    tokens = output.sequences[0, len(prompt) :]
    logits = torch.stack(output.logits)[:, 0].float().log_softmax(-1)
    return tokens.tolist(), logits.gather(1, tokens[:, None])[:, 0]


def assert_same(answers: Answers, expected: Answers) -> None:
    for (tokens, logprobs), (other, others) in zip(answers, expected, strict=True):
        assert tokens == other
        torch.testing.assert_close(logprobs, others, atol=4e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "plans"),
    [("llama", ALL), ("llama", EVERY_KIND), ("olmo2", EVERY_KIND), ("gpt2", LATCHED)],
    ids=["all tokens", "positions", "positions, norms behind branches", "latched gates, by hooks"],
)
def test_every_request_has_its_plan(name, plans):
    model = build(name)
    expected = alone(model, plans)
    unsteered = alone(model, [None] * len(PROMPTS))
    changed = [not torch.allclose(a, b, atol=1e-2) for (_, a), (_, b) in zip(expected, unsteered, strict=True)]
    assert sum(changed) >= 3, "the plans must matter"
    with fs.steer(model, plans):
        assert_same(together(model), expected)
    assert_same(together(model), unsteered)


@pytest.mark.parametrize("plan", [add(), add(positions="last"), latched(1)], ids=["all", "last", "latched gate"])
def test_one_plan_for_all(plan):
    model = build()
    expected = alone(model, [plan] * len(PROMPTS))
    with fs.steer(model, plan):
        assert_same(together(model), expected)


@pytest.mark.parametrize(
    "small",
    [{"max_batch_tokens": 8}, {"max_requests_per_batch": 2}, {"num_blocks": 14}, {"scheduler_type": "prefill_first"}],
    ids=str,
)
@pytest.mark.parametrize("plans", [EVERY_KIND, LATCHED], ids=["positions", "latched gates"])
def test_prompts_in_chunks_and_requests_that_wait(plans, small):
    """`num_blocks=14`: requests lose their blocks while they run, and read prompt and answer anew."""
    model = build()
    expected = alone(model, plans)
    with fs.steer(model, plans):
        assert_same(together(model, **small), expected)


def test_the_blocks_of_the_cache_are_too_few(monkeypatch):
    """A request that lost its blocks while it was answered reads its prompt and its answer anew."""
    from transformers.generation.continuous_batching.requests import RequestState

    restarted = []
    original = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: restarted.append(self) or original(self)
    )
    model = build()
    plans = [*EVERY_KIND, *LATCHED]
    expected = alone(model, plans, PROMPTS * 2)
    with fs.steer(model, plans):
        assert_same(together(model, PROMPTS * 2, num_blocks=9), expected)
    assert any(each.generated_tokens for each in restarted)


def test_against_a_hook_written_by_hand():
    """That adds the vector of a request to the layer's output at its last prompt token."""
    model = build()
    expected = []
    for prompt, seed in zip(PROMPTS, range(5), strict=True):

        def steer_last(module: nn.Module, args: Any, output: Tensor, prompt=prompt, seed=seed) -> Tensor:
            if output.shape[1] == len(prompt):
                output = output.clone()
                output[:, -1] += 2.0 * d(seed)
            return output

        handle = model.model.layers[0].register_forward_hook(steer_last)
        expected.append(by_generate(model, prompt))
        handle.remove()
    with fs.steer(model, [add(seed, "last") for seed in range(5)]):
        answers = together(model)
    # The hook takes the tokens behind a prompt of one token for prompts, too.
    assert_same([*answers[:3], answers[4]], [*expected[:3], expected[4]])


@pytest.mark.parametrize("plans", [[add(0, "last"), latched(2), None, add(3, "generated"), add(1)], latched(2)])
def test_return_sequences_have_the_plan_of_their_prompt(plans):
    model = build()
    expected = alone(model, plans if isinstance(plans, list) else [plans] * 5)
    with fs.steer(model, plans):
        manager = started(model, PROMPTS, num_return_sequences=3)
        outputs = collect(manager, 15)
        manager.stop()
    assert_same(
        [answer(each) for each in outputs.values()],
        [expected[PROMPTS.index(each.prompt_ids)] for each in outputs.values()],
    )


def test_a_request_that_ends_early_leaves_the_others_their_plans():
    model = build()
    expected = alone(model, EVERY_KIND)
    end = expected[0][0][1]
    options = settings()
    options["generation_config"].eos_token_id = end
    with fs.steer(model, EVERY_KIND):
        outputs = list(model.generate_batch(PROMPTS, **options).values())
    for output, (tokens, _) in zip(outputs, expected, strict=True):
        assert output.generated_tokens == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    assert len(outputs[0].generated_tokens) == 2


def test_logits_processors_per_request():
    model = build()
    options = settings(per_request_processors=True)
    options["generation_config"] = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=40, temperature=0.7, eos_token_id=-1, pad_token_id=0
    )
    plans = [add(0, "last"), add(1, "generated")]
    expected = alone(model, plans, PROMPTS[:2])
    with fs.steer(model, plans):
        manager = model.init_continuous_batching(
            generation_config=options["generation_config"],
            continuous_batching_config=options["continuous_batching_config"],
        )
        manager.start()
        for prompt in PROMPTS[:2]:
            manager.add_request(prompt, top_k=1)
        outputs = collect(manager, 2)
        manager.stop()
    assert [outputs[f"req_{i}"].generated_tokens for i in range(2)] == [tokens for tokens, _ in expected]


def test_requests_are_added_one_by_one():
    """Plans belong to requests in the order in which they are added."""
    model = build()
    expected = alone(model, LATCHED)
    with fs.steer(model, LATCHED):
        manager = started(model)
        names = [manager.add_request(prompt, request_id=f"mine {i}") for i, prompt in enumerate(PROMPTS[:2])]
        names += manager.add_requests(PROMPTS[2:4])
        names.append(manager.add_request(PROMPTS[4]))
        with pytest.raises(ValueError, match=r"5 plans, but request 5 .* has none"):
            manager.add_request(PROMPTS[0])
        outputs = collect(manager, 5)
        manager.stop()
    assert_same([answer(outputs[name]) for name in names], expected)


def test_a_manager_that_runs_long_forgets_requests_that_have_ended():
    """Also where a name is used again: its prompt and its decision are its own."""
    model, plan = build(), latched(0)
    expected = alone(model, [plan] * len(PROMPTS))
    with fs.steer(model, plan):
        manager = started(model)
        requests, held = manager.add_request.__self__, []
        for wave in range(20):
            turned = PROMPTS[wave % 5 :] + PROMPTS[: wave % 5]
            for name, prompt in enumerate(turned):
                manager.add_request(prompt, request_id=f"mine {name}" if wave % 2 else None)
            outputs = collect(manager, 5)
            want = [expected[PROMPTS.index(each.prompt_ids)] for each in outputs.values()]
            assert_same([answer(each) for each in outputs.values()], want)
            held.append((len(requests._prompts), max(requests._sequences.values())))
        manager.stop()
    assert max(held) <= (10, 10) and requests.capacity == 64, "those of a wave, and of the one before"


def test_plans_change_while_requests_run():
    """A request that keeps its plan keeps what its latched gate decided. A new gate, which has not seen the prompt,
    stays undecided: as with `generate`, from the change on its request is not steered."""
    model = build()
    stays, before, after = (add(seed, when=fs.Gate(d(3), -1e9, latched=True)) for seed in range(1, 4))
    with fs.steer(model, [None, stays, before]) as steering:
        in_fourth_pass(model, lambda: steering.assign([None, stays, after]))
        manager = started(model, PROMPTS[:1] * 3, max_new_tokens=20)
        outputs = collect(manager, 3)
        manager.stop()
    for name, first, later in [("req_1", stays, stays), ("req_2", before, after)]:
        with fs.steer(model, [first]) as steering:
            in_fourth_pass(model, lambda steering=steering, later=later: steering.assign([later]))
            ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=20, do_sample=False)
        assert outputs[name].generated_tokens == ids[0, len(PROMPTS[0]) :].tolist()


def in_fourth_pass(model: Any, act: Callable[[], None]) -> None:
    """Once, before the pass begins."""
    passes = []

    def count(module: nn.Module, args: Any) -> None:
        passes.append(args)
        if len(passes) == 4:
            act()
            handle.remove()

    handle = model.register_forward_pre_hook(count)


def test_more_requests_than_gates_had_room_for():
    model = build()
    prompts = [models.tokens(1, 2 + i % 5, seed=i)[0].tolist() for i in range(70)]
    plans = [latched(i % 6) for i in range(70)]
    with fs.steer(model, plans):
        answers = together(model, prompts)
    checked = [0, *range(40, 70, 2)]
    assert_same([answers[i] for i in checked], alone(model, [plans[i] for i in checked], [prompts[i] for i in checked]))


@pytest.mark.parametrize("inner", [add(5), [add(5), None, latched(3), add(5, "last"), None]], ids=["one", "rows"])
def test_one_context_inside_another(inner):
    model = build()
    inner_plans = inner if isinstance(inner, list) else [inner] * 5
    expected = []
    for outer_plan, inner_plan, prompt in zip(EVERY_KIND, inner_plans, PROMPTS, strict=True):
        with fs.steer(model, [outer_plan]), fs.steer(model, [inner_plan]):
            expected.append(by_generate(model, prompt))
    outer_alone, unsteered = alone(model, EVERY_KIND), alone(model, [None] * 5)
    with fs.steer(model, EVERY_KIND):
        with fs.steer(model, inner):
            assert_same(together(model), expected)
        assert_same(together(model), outer_alone)
    assert_same(together(model), unsteered)


def test_an_error_in_a_pass_reaches_its_requests_and_the_model_is_as_before():
    model = build()
    expected, unsteered = alone(model, EVERY_KIND), alone(model, [None] * 5)
    passes = []

    def fail(module: nn.Module, args: Any) -> None:
        passes.append(args)
        if len(passes) == 3:
            raise KeyError("in the third pass")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with fs.steer(model, EVERY_KIND):
        outputs = list(model.generate_batch(PROMPTS, **settings()).values())
        assert all("in the third pass" in output.error for output in outputs)
        handle.remove()
        assert_same(together(model), expected)
    assert_same(together(model), unsteered)


def test_the_context_is_left_while_a_manager_runs():
    """Requests that are not finished fail; no token is made without the plan."""
    model = build()
    (tokens, _), *_ = alone(model, [add(1)], PROMPTS[:1])
    with fs.steer(model, add(1)):
        manager = started(model, max_new_tokens=10_000)
        manager.add_request(PROMPTS[0])
        await_pass(manager, NEW + 1)
    assert not manager.is_running()
    output = manager.get_result() or manager.output_router.output_queue.get(timeout=5)
    assert output.error and output.generated_tokens[:NEW] == tokens
    with fs.steer(model, add(1)):
        steered = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=len(output.generated_tokens))
    assert output.generated_tokens == steered[0, len(PROMPTS[0]) :].tolist()


def started(model: Any, prompts: Sequence[list[int]] = (), **more: Any) -> Any:
    """A manager that runs; the prompts are all in its first pass."""
    options = settings()
    vars(options["generation_config"]).update(more)
    del options["warmup"]
    manager = model.init_continuous_batching(**options)
    manager.add_requests(prompts)
    manager.start()
    return manager


def await_pass(manager: Any, number: int) -> None:
    while getattr(manager, "current_batch", 0) < number:
        assert manager.is_running()


def answer(output: Any) -> tuple[list[int], Tensor]:
    assert output.error is None
    return output.generated_tokens, torch.tensor(output.logprobs)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"use_async_batching": True},
        {"default_compile_level": 1},
        {"varlen_compile_config": {"mode": "default"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("plans", [[add()] * 5, latched(1)], ids=["rows", "gate"])
def test_passes_that_cannot_be_looked_at(plans, setting):
    model = build()
    with fs.steer(model, plans), pytest.raises(ValueError, match=r"graphs, compiled passes .* leave out"):
        model.generate_batch(PROMPTS, **settings(**setting))


def test_another_number_of_plans():
    model = build()
    with fs.steer(model, [add(), None]), pytest.raises(ValueError, match=r"5 rows, but there are 2 plans"):
        model.generate_batch(PROMPTS, **settings())


def test_probes():
    model = build()
    with fs.steer(model, fs.Probe(d(0), layers=1)) as steering:
        with pytest.raises(ValueError, match=r"cannot be told apart by request"):
            model.generate_batch(PROMPTS, **settings())
        steering.assign(add())
        manager = started(model)
        steering.assign(fs.Probe(d(0), layers=1))
        name = manager.add_request(PROMPTS[0])
        assert "cannot be told apart by request" in collect(manager, 1)[name].error


def test_another_structure_of_transformers(monkeypatch):
    """Which plan a token has would be a guess: refused before a request is added."""
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

    model = build()
    original = ContinuousBatchingIOs.__init__

    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        del self.requests_in_batch

    monkeypatch.setattr(ContinuousBatchingIOs, "__init__", renamed)
    for plans in [[add()] * 5, add(positions="last")]:
        with fs.steer(model, plans), pytest.raises(RuntimeError, match=r"use generate, or the Engine"):
            model.generate_batch(PROMPTS, **settings())


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: [SimpleNamespace(state=each.state, query_length=each.query_length + 1) for each in batch],
        lambda batch: batch[::-1],
        lambda batch: [
            SimpleNamespace(state=SimpleNamespace(request_id="other"), query_length=each.query_length) for each in batch
        ],
        lambda batch: [SimpleNamespace(state=each.state) for each in batch],
    ],
    ids=["lengths", "order", "names", "attributes"],
)
def test_a_batch_that_does_not_fit_the_pass(change, monkeypatch):
    from faststeer.hf.continuous_batching import RequestStream

    model = build()
    original = RequestStream.tokens

    def tokens(self: Any, *args: Any) -> Tensor:
        ios = self.manager.batch_processor.inputs_and_outputs
        batch, ios.requests_in_batch = ios.requests_in_batch, change(ios.requests_in_batch)
        try:
            return original(self, *args)
        finally:
            ios.requests_in_batch = batch

    monkeypatch.setattr(RequestStream, "tokens", tokens)
    with fs.steer(model, ALL):
        outputs = model.generate_batch(PROMPTS, **settings())
    assert all("which token belongs to which" in output.error for output in outputs.values())
    assert not any(output.generated_tokens for output in outputs.values())


@pytest.mark.parametrize("plan", [add(), add(positions="last")], ids=["all tokens", "position"])
def test_a_manager_from_outside(plan):
    """Its cached blocks were filled without the plan."""
    model = build()
    unsteered = together(model, persistent=True)
    with fs.steer(model, plan):
        with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
            together(model)
        model.destroy_cached_continuous_batching_manager()
        steered = together(model, persistent=True)
        assert_same(together(model, persistent=True), steered)
    assert not hasattr(model, "_cached_continuous_batching_manager"), "its blocks would be used without the plan"
    assert_same(together(model), unsteered)


def test_requests_with_the_same_beginning_one_after_another():
    """Neither a later request nor one under a later plan is given blocks that were filled under another plan."""
    model = build()
    expected = alone(model, [add(0), add(1), None], PROMPTS[1:3] + PROMPTS[1:2])
    with fs.steer(model, add(0)) as steering:
        manager = started(model)
        answers = []
        for plan, prompt in zip([add(0), add(1), None], PROMPTS[1:3] + PROMPTS[1:2], strict=True):
            steering.assign(plan if plan is not None else fs.Plan([]))
            name = manager.add_request(prompt)
            answers.append(answer(collect(manager, 1)[name]))
        manager.stop()
    assert_same(answers, expected)


def test_plans_do_not_change_under_graphs():
    """As on CUDA, whose graphs hold the sites of the plans that acted when they were made."""
    model = build()
    with fs.steer(model, add()) as steering:
        manager = started(model)
        (stream,) = steering.passes.managers.streams()
        assert not stream.captured
        stream.captured = True
        with pytest.raises(RuntimeError, match="stop the manager before plans are changed"):
            steering.assign(add(1))
        with pytest.raises(RuntimeError, match="stop the manager before plans are changed"):
            steering.load(0, add(1))
        manager.stop()
        steering.assign(add(1))


def collect(manager: Any, requests: int) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    while len(outputs) < requests:
        output = manager.get_result(timeout=30)
        assert output is not None
        if output.is_finished():
            outputs[output.request_id] = output
    return outputs
