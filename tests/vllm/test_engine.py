"""The engine's tokens under plans of their own per request, against Hugging Face's model with the same plans: prompts
in chunks, prefixes shared through the cache, steered and unsteered requests side by side, compiled and eager."""

from typing import Any

import pytest
import torch
from requests_mixed import SPECIAL, by_engine, by_hugging_face, mixed, token_ids, tokens

import faststeer as fs


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return fs.demo.load()


@pytest.fixture(scope="module")
def requests(demo: tuple[Any, Any]) -> list[tuple[list[int], fs.Plan | None]]:
    return mixed(token_ids(demo[1]))


@pytest.fixture(scope="module")
def wanted(demo: tuple[Any, Any], requests: list[Any]) -> list[list[int]]:
    return by_hugging_face(demo[0], requests)


@pytest.fixture(scope="module")
def plain(requests: list[Any]) -> list[Any]:
    """Requests without plans."""
    return [(prompt, None) for prompt, _ in requests[:24]]


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engines(request: pytest.FixtureRequest, start: Any, plain: list[Any]) -> tuple[Any, list[Any]]:
    """An engine that steers, and what the one said that does not. That one is started first: what it compiled must not
    be taken for the model with steering."""
    eager = request.param == "eager"
    off = start(False, enforce_eager=eager)
    assert not hasattr(worker_of(off), "faststeer")
    with pytest.raises(ValueError, match="does not steer"):
        by_engine(off, [(plain[0][0], fs.Plan([fs.Add(torch.ones(128), layers=0)]))])
    untouched = by_engine(off, plain, logprobs=3)
    return start(SPECIAL, enforce_eager=eager), untouched


def worker_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_unsteered_requests_have_the_bits_of_an_engine_without_steering(engines: Any, plain: list[Any]) -> None:
    engine, untouched = engines
    for answer, before in zip(by_engine(engine, plain, logprobs=3), untouched, strict=True):
        assert answer.outputs[0].token_ids == before.outputs[0].token_ids
        assert [{token: seen.logprob for token, seen in step.items()} for step in answer.outputs[0].logprobs] == [
            {token: seen.logprob for token, seen in step.items()} for step in before.outputs[0].logprobs
        ]


def test_32_plans_and_none_give_what_hugging_face_gives(engines: Any, requests: list[Any], wanted: list[Any]) -> None:
    engine, _ = engines
    steered = [i for i, (_, plan) in enumerate(requests) if plan is not None]
    assert len(steered) == 64 and len({id(requests[i][1]) for i in steered}) == 32
    plain = {tuple(prompt): want for (prompt, plan), want in zip(requests, wanted, strict=True) if plan is None}
    assert sum(wanted[i] != plain.get(tuple(requests[i][0])) for i in steered) > 40  # the plans do something
    assert tokens(by_engine(engine, requests)) == wanted
    again = by_engine(engine, requests)
    assert tokens(again) == wanted
    assert sum(answer.num_cached_tokens for answer in again) >= 32 * len(requests)
    assert not worker_of(engine).faststeer.pool.slots.keys() - worker_of(engine).faststeer.plans.keys()
