"""One request overflows; nobody else's answer changes by a bit, and it ends with an error that says so. Steering that
writes infinity at every token, at a late one, in the last layer alone, numbers so large that only a norm overflows, and
NaN without any steering; beside others, before others, preempted, aborted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from requests_mixed import by_engine, token_ids

import faststeer as fs

HUGE = 3e38
BLOCK = 32


def direction(seed: int = 0) -> torch.Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(seed))


def poison(name: str, coefficient: float = HUGE) -> fs.Plan:
    where: dict[str, Any] = {
        "every token": {"layers": 2},
        "every layer": {"layers": "all"},
        "a late token": {"layers": 1, "positions": "[5:]"},
        "the prompt": {"layers": 1, "positions": "prompt"},
        "the last layer": {"layers": 5, "at": "resid_post"},
    }[name]
    return fs.Plan([fs.Add(direction(), coefficient, **where)])


POISONS = ["every token", "every layer", "a late token", "the prompt", "the last layer"]


class Watched:
    """An engine whose blocks are looked at whenever they change hands."""

    def __init__(self, llm: Any, prompts: list[list[int]]) -> None:
        self.llm, self.prompts = llm, prompts
        self.worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.bad_blocks = 0  # that were handed to somebody else, before they were zeroed
        fresh = self.worker.faststeer.fresh_blocks
        zero = fresh.zero

        def watched(blocks: list[int]) -> None:
            before = self._bad(blocks)
            zero(blocks)
            self.bad_blocks += before
            assert self._bad(blocks) == 0

        fresh.zero = watched

    def _bad(self, blocks: list[int]) -> int:
        if not blocks:
            return 0
        layers = self.worker.model_runner.compilation_config.static_forward_context.values()
        bad = torch.stack([~layer.kv_cache[blocks].flatten(1).isfinite().all(dim=1) for layer in layers])
        return int(bad.any(dim=0).sum())

    def neighbours(self, beside: list[tuple[Any, fs.Plan | None, int]] = (), start: int = 0) -> tuple[Any, list[Any]]:
        """Answers of six unsteered requests, with their log-probabilities, and of those beside them."""
        from vllm import SamplingParams

        own = [({"prompt_token_ids": prompt[start:]}, None, 12) for prompt in self.prompts[:6]]
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=n, ignore_eos=True, logprobs=2,
                extra_args=None if plan is None else {"faststeer": plan},
            )
            for _, plan, n in (*own[:3], *beside, *own[3:])
        ]  # fmt: skip
        asked: Any = [prompt for prompt, *_ in (*own[:3], *beside, *own[3:])]
        answers = self.llm.generate(asked, parameters, use_tqdm=False)
        others = answers[3 : 3 + len(beside)]
        return [bits(answer) for answer in (*answers[:3], *answers[3 + len(beside) :])], others


def bits(answer: Any) -> Any:
    output = answer.outputs[0]
    steps = [sorted((token, seen.logprob) for token, seen in step.items()) for step in output.logprobs]
    return output.finish_reason, list(output.token_ids), steps


@pytest.fixture(
    scope="module",
    params=[(True, "float32"), (True, "bfloat16"), (False, "float32"), (False, "bfloat16")],
    ids=lambda p: f"{'eager' if p[0] else 'compiled'}-{p[1]}",
)
def engine(request: pytest.FixtureRequest, start: Any) -> Watched:
    eager, dtype = request.param
    llm = start(
        {"max_dose": None}, enforce_eager=eager, dtype=dtype, num_gpu_blocks_override=48, enable_prompt_embeds=True
    )
    return Watched(llm, token_ids(fs.demo.load()[1]))


def is_error(answer: Any, *says: str) -> None:
    (output,) = answer.outputs
    assert output.finish_reason == "error" and all(part in output.stop_reason for part in says), output


@pytest.mark.parametrize("name", POISONS)
def test_neighbours_keep_their_bits_before_during_and_after(engine: Watched, name: str) -> None:
    prompt = {"prompt_token_ids": engine.prompts[6]}
    n_answered = 6 if name == "a late token" else 0
    clean, _ = engine.neighbours([(prompt, poison(name, 1.0), n_answered + 1)])
    alone, _ = engine.neighbours()
    for _ in range(3):
        during, (ended,) = engine.neighbours([(prompt, poison(name), 12)])
        is_error(ended, "the model overflowed under the plan: the hidden states of token", "use a smaller coefficient")
        assert len(ended.outputs[0].token_ids) == n_answered
        assert during == clean
        assert engine.neighbours()[0] == alone
        assert engine.neighbours(start=3)[0] == engine.neighbours(start=3)[0]  # nothing of it is in the prefix cache


def test_bad_blocks_do_change_hands_and_are_clean_by_then(engine: Watched) -> None:
    """The tests above would prove little where no such block were given to anybody else."""
    before = engine.bad_blocks
    wanted, _ = engine.neighbours()
    for _ in range(8):
        (ended,) = by_engine(engine.llm, [(engine.prompts[7], poison("every layer"))])
        is_error(ended, "the model overflowed under the plan")
    for start in range(6):
        engine.neighbours(start=start)
    assert engine.bad_blocks > before
    assert engine.neighbours()[0] == wanted


def test_the_prefix_cache_does_not_know_bad_blocks(engine: Watched) -> None:
    prompt = engine.prompts[5]
    assert len(prompt) > 2 * BLOCK
    cached = []
    for plan in (poison("every token", 1.5), poison("every token")):
        for _ in range(2):
            (answer,) = by_engine(engine.llm, [(prompt, plan)], 2)
            cached.append(answer.num_cached_tokens)
    assert cached == [0, 2 * BLOCK, 0, 0]
    is_error(answer)


def test_numbers_so_large_that_a_norm_makes_them_zero(engine: Watched) -> None:
    wanted, _ = engine.neighbours()
    (answer,) = by_engine(engine.llm, [(engine.prompts[6], poison("the last layer", 1e30))])
    is_error(answer, "the model overflowed under the plan", "token 0", "use a smaller coefficient")
    assert engine.neighbours()[0] == wanted


def test_every_sample_and_log_probabilities(engine: Watched) -> None:
    (answer,) = by_engine(
        engine.llm, [(engine.prompts[6], poison("a late token"))], temperature=1.0, n=3, logprobs=2, prompt_logprobs=1
    )
    assert [output.finish_reason for output in answer.outputs] == ["error"] * 3
    for output in answer.outputs:
        assert len(output.token_ids) == len(output.logprobs) == 6
        assert all(seen.logprob == seen.logprob for step in output.logprobs for seen in step.values())


def test_preempted_requests(engine: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than their keys and values have room, every third one bad."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    prompts = [(engine.prompts[i % 8], None) for i in range(24)]
    bad = [(prompt, poison(POISONS[i % 5]) if i % 3 == 1 else None) for i, (prompt, _) in enumerate(prompts)]
    alone = {tuple(p): by_engine(engine.llm, [(p, None)], 70, logprobs=2)[0].outputs[0] for p in engine.prompts}
    answers = by_engine(engine.llm, bad, 70)
    assert preempted
    for (prompt, plan), answer in zip(bad, answers, strict=True):
        if plan is None:
            is_alone(answer.outputs[0].token_ids, alone[tuple(prompt)], engine.worker.model_runner.dtype)
        else:
            is_error(answer, "the model overflowed under the plan")


def is_alone(answered: Sequence[int], alone: Any, dtype: torch.dtype) -> None:
    """The tokens of a request by itself. A preempted one is read again with others beside it, and some processors
    round products in bf16 by how many rows there are: there, either of two tokens may come whose logits are within two
    units in the last place of numbers below 16."""
    both = enumerate(zip(answered, alone.token_ids, strict=True))
    step = next((i for i, (token, own) in both if token != own), None)
    if step is not None:
        assert dtype is torch.bfloat16, step
        first, second = (alone.logprobs[step][token].logprob for token in (alone.token_ids[step], answered[step]))
        assert abs(first - second) <= 2 * 2**-4, (step, first, second)


def test_aborted_before_anybody_looked(engine: Watched) -> None:
    from vllm import SamplingParams

    wanted, _ = engine.neighbours()
    llm = engine.llm.llm_engine
    for number in range(6):
        parameters = SamplingParams(max_tokens=64, ignore_eos=True, extra_args={"faststeer": poison("every layer")})
        name = llm.add_request(f"aborted-{number}", {"prompt_token_ids": engine.prompts[number]}, parameters)
        if number % 2:
            llm.step()
        llm.abort_request([name or f"aborted-{number}"])
    while llm.has_unfinished_requests():
        llm.step()
    assert engine.neighbours()[0] == wanted
    assert engine.neighbours(start=2)[0] == engine.neighbours(start=2)[0]


def test_not_a_number_without_any_steering(engine: Watched) -> None:
    """A prompt of embeddings in which one is NaN, which is nobody's plan."""
    with torch.inference_mode():
        embed = engine.worker.model_runner.get_model().embed_input_ids
        given = torch.tensor(embed(torch.tensor(engine.prompts[6])).tolist(), dtype=engine.worker.model_config.dtype)
    clean, _ = engine.neighbours([({"prompt_embeds": given}, None, 1)])
    alone, _ = engine.neighbours()
    broken = given.clone()
    broken[40, 3] = torch.nan
    during, (ended,) = engine.neighbours([({"prompt_embeds": broken}, None, 12)])
    is_error(ended, "the model overflowed: the hidden states of token", "has no plan")
    assert during == clean and engine.neighbours()[0] == alone
