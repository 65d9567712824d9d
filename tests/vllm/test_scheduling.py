"""What the scheduler does to requests with plans: prefixes found in the cache or not, requests that wait, are preempted
and come back, and what probes saw of all that. Tokens are Hugging Face's in every case."""

from typing import Any

import pytest
import torch
from requests_mixed import by_engine, by_hugging_face, mixed, token_ids, tokens

import faststeer as fs


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return fs.demo.load()


@pytest.fixture(scope="module")
def prompts(demo: tuple[Any, Any]) -> list[list[int]]:
    return token_ids(demo[1])


def direction(seed: int) -> torch.Tensor:
    return 80 * torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.fixture(scope="module")
def roomy(start: Any) -> Any:
    return start()


def test_blocks_are_shared_where_plans_do_the_same(roomy: Any, demo: Any, prompts: list[list[int]]) -> None:
    model, prompt = demo[0], prompts[0]
    always = fs.Plan([fs.Add(direction(0), layers=2)])
    same = fs.Plan([fs.Add(direction(0), layers=[2])])
    other = fs.Plan([fs.Add(direction(0), 1.5, layers=2)])
    late = fs.Plan([fs.Add(direction(1), layers=3, positions="generated")])
    last = fs.Plan([fs.Add(direction(2), layers=1, positions="last")])
    blocks = 32 * ((len(prompt) - 1) // 32)

    def cached(tokens_in: list[int], plan: fs.Plan | None, n_tokens: int = 40) -> tuple[int, list[int]]:
        (answer,) = by_engine(roomy, [(tokens_in, plan)], n_tokens)
        assert tokens([answer]) == by_hugging_face(model, [(tokens_in, plan)], n_tokens)
        return answer.num_cached_tokens, tokens([answer])[0]

    assert blocks == 64
    assert cached(prompt, always)[0] == 0
    assert cached(prompt, None)[0] == 0  # not what was steered
    assert cached(prompt, same)[0] == blocks  # another object, the same plan
    assert cached(prompt, other)[0] == 0
    assert cached(prompt, late)[0] == blocks  # a plan for generated tokens reads everybody's prompt
    longer = prompts[1] + cached(prompts[1], late)[1]
    assert cached(longer, None)[0] == blocks  # and none of its own tokens is anybody's
    assert cached(longer, late)[0] == blocks + 32  # which are prompt now, not steered, and just computed
    assert cached(prompt, last)[0] == blocks
    cut = prompt[:64]
    assert cached(cut, last)[0] == 32  # its last token is in the second block
    assert cached(cut + prompt[64:], last)[0] == blocks


def test_alone_in_pieces_and_beside_others_is_the_same(roomy: Any, demo: Any, prompts: list[list[int]]) -> None:
    requests = [
        (p, None if plan is None else fs.Plan([i for i in plan if not _special(i)]) or None)
        for p, plan in mixed(prompts, 16)
    ]
    wanted = by_hugging_face(demo[0], requests)
    alone = [tokens(by_engine(roomy, [request]))[0] for request in requests[:6]]
    assert alone == wanted[:6]
    assert tokens(by_engine(roomy, requests)) == wanted


def _special(intervention: fs.Intervention) -> bool:
    latched = intervention.when is not None and intervention.when.latched
    elsewhere = intervention.at is not None and not set(intervention.at) <= {"resid_pre", "resid_post"}
    return latched or elsewhere or isinstance(intervention, fs.Project)


def test_requests_join_while_others_run(roomy: Any, demo: Any, prompts: list[list[int]]) -> None:
    from vllm import SamplingParams

    requests = [(prompts[i % 8], fs.Plan([fs.Add(direction(i), layers=i % 6)]) if i % 3 else None) for i in range(10)]
    wanted = by_hugging_face(demo[0], requests)
    engine, answers, step = roomy.llm_engine, {}, 0
    while len(answers) < len(requests):
        if step % 3 == 0 and step // 3 < len(requests):
            prompt, plan = requests[step // 3]
            extra = None if plan is None else {"faststeer": plan}
            parameters = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args=extra)
            engine.add_request(f"joins-{step // 3}", {"prompt_token_ids": prompt}, parameters)
        for answer in engine.step():
            if answer.finished:
                answers[int(answer.request_id.split("-")[1])] = list(answer.outputs[0].token_ids)
        step += 1
    assert [answers[i] for i in range(len(requests))] == wanted


def test_probes_see_what_hugging_face_sees(roomy: Any, demo: Any, prompts: list[list[int]]) -> None:
    from faststeer.vllm.worker import projections

    model, watched = demo[0], torch.stack([direction(7), direction(8)])
    plan = fs.Plan([fs.Add(direction(9), layers=1), fs.Probe(watched, layers=[0, 2, 4])])
    other = fs.Plan([fs.Add(direction(10), layers=1), fs.Probe(watched[0], layers=3)])
    requests = [(prompts[6], plan), (prompts[7], other), (prompts[5], None)]
    by_engine(roomy, requests, 12)
    answers = by_engine(roomy, requests, 12)  # whose keys and values are all known by now
    assert answers[0].num_cached_tokens == 0 and answers[2].num_cached_tokens > 0
    for answer, prompt, probed in zip(answers[:2], prompts[6:8], (plan, other), strict=True):
        probe = probed.interventions[1]
        seen = projections(roomy, answer.request_id)
        with torch.no_grad(), fs.steer(model, fs.Plan([i for i in probed if not isinstance(i, fs.Probe)])):
            states = model(torch.tensor([prompt + tokens([answer])[0][:-1]]), output_hidden_states=True).hidden_states
        directions = torch.nn.functional.normalize(torch.atleast_2d(probe.direction), dim=1)
        assert set(seen) == {f"resid_pre.{layer + 1}" for layer in probe.layers}
        for name, found in seen.items():
            expected = states[int(name.split(".")[1])][0, found["tokens"]] @ directions.T
            assert found["tokens"] == list(range(len(prompt) + 11))
            torch.testing.assert_close(torch.tensor(found["values"]), expected, rtol=1e-4, atol=1e-3)
    assert projections(roomy, answers[0].request_id) is None  # given once
    assert projections(roomy, answers[2].request_id) is None


def test_probes_of_several_samples(roomy: Any, demo: Any, prompts: list[list[int]]) -> None:
    from faststeer.vllm.worker import projections

    model, added, watched = demo[0], fs.Add(direction(9), layers=1), direction(7)
    plan = fs.Plan([added, fs.Probe(watched, layers=3)])
    (answer,) = by_engine(roomy, [(prompts[6], plan)], 12, n=3, temperature=1.0)
    for number, output in enumerate(answer.outputs):
        (found,) = projections(roomy, answer.request_id, number).values()
        with torch.no_grad(), fs.steer(model, added), fs.hf.read(model, "resid_post", [3]) as states:
            model(torch.tensor([prompts[6] + list(output.token_ids)[:-1]]))
        expected = states[3][0] @ torch.nn.functional.normalize(watched, dim=0)
        torch.testing.assert_close(torch.tensor(found["values"])[:, 0], expected, rtol=1e-4, atol=1e-3)
    assert projections(roomy, answer.request_id, 3) is None


@pytest.fixture(scope="module")
def narrow(start: Any, roomy: Any) -> Any:
    """Room for three plans, and for the keys and values of a few requests."""
    return start({"max_plans": 3}, num_gpu_blocks_override=24)


def test_plans_wait_for_slots_and_preempted_requests_come_back(narrow: Any, demo: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip # noqa: E501
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    plans = [fs.Plan([fs.Add(direction(i), layers=i % 6, positions=("all", "generated")[i % 2])]) for i in range(8)]
    requests = [(prompts[i % 8], plans[i % 8] if i % 4 else None) for i in range(24)]
    steering = narrow.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.faststeer
    assert steering.n_slots == 3
    assert tokens(by_engine(narrow, requests, 50)) == by_hugging_face(demo[0], requests, 50)
    assert preempted
    by_engine(narrow, [(prompts[0], None)], 1)  # a step in which the worker is told of the last one's end
    assert not steering.requests
