"""The engine's tokens under plans of their own per request, against Hugging Face's model with the same plans: prompts
in chunks, prefixes shared through the cache, steered and unsteered requests side by side, compiled and eager."""

from typing import Any

import pytest
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


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest, start: Any) -> Any:
    if request.param == "compiled":
        # Compiled without steering first: its artefacts must not be taken for those of the model with steering.
        start(False, enforce_eager=False)
    return start(SPECIAL, enforce_eager=request.param == "eager")


def test_32_plans_and_none_give_what_hugging_face_gives(engine: Any, requests: list[Any], wanted: list[Any]) -> None:
    assert len({id(plan) for _, plan in requests if plan is not None}) == 32
    steered = [i for i, (_, plan) in enumerate(requests) if plan is not None]
    assert len(steered) == 64
    plain = {tuple(prompt): want for (prompt, plan), want in zip(requests, wanted, strict=True) if plan is None}
    changed = [i for i in steered if wanted[i] != plain.get(tuple(requests[i][0]))]
    assert len(changed) > 40  # the plans do something
    answers = by_engine(engine, requests)
    assert tokens(answers) == wanted
    again = by_engine(engine, requests)
    assert tokens(again) == wanted
    assert sum(answer.num_cached_tokens for answer in again) >= 32 * len(requests)
