"""vLLM's second model runner, the usual one on GPUs: the same tokens as Hugging Face's model, prefixes shared, plans
that wait, requests that are preempted and sent again as new ones, probes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runner_v2
import torch
from requests_mixed import by_hugging_face, mixed, token_ids

import faststeer as fs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("v2") / "answers.json"
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("runner_v2.py")), str(path)],
        env=dict(os.environ) | runner_v2.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-5000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def demo() -> tuple[Any, list[list[int]]]:
    model, tokenizer = fs.demo.load()
    return model, token_ids(tokenizer)


def test_mixed_plans(found: dict[str, Any], demo: Any) -> None:
    model, prompts = demo
    requests = mixed(prompts, 16)
    wanted = by_hugging_face(model, requests)
    assert found["mixed"] == wanted and found["cached"] == wanted
    assert found["cached tokens"] >= 32 * len(requests) > found["mixed tokens"]


def test_waiting_and_preemption(found: dict[str, Any], demo: Any) -> None:
    model, prompts = demo
    assert found["preempted"] > 0
    assert found["waiting"] == by_hugging_face(model, runner_v2.waiting(prompts), 50)


def test_requests_that_overflow_end_and_leave_others_their_bits(found: dict[str, Any]) -> None:
    ends, answers = found["overflowing"]["ends"], found["overflowing"]["answers"]
    assert len(ends) == 16 and all(
        end.startswith("the model overflowed under the plan: the hidden states of token") for end in ends
    )
    assert answers[2] == answers[0] and answers[3] == answers[1]


def test_probes(found: dict[str, Any], demo: Any) -> None:
    model, prompts = demo
    prompt, plan = runner_v2.probing(prompts)
    assert found["probed"] == by_hugging_face(model, [(prompt, plan)])[0]
    with torch.no_grad(), fs.steer(model, fs.Plan([plan.interventions[0]])):
        states = model(torch.tensor([prompt + found["probed"][:-1]]), output_hidden_states=True).hidden_states
    directions = torch.nn.functional.normalize(plan.interventions[1].direction, dim=1)
    assert set(found["seen"]) == {"resid_pre.1", "resid_pre.3", "resid_post.5"}
    for name in ("resid_pre.1", "resid_pre.3"):  # behind the last layer Hugging Face's states are normed
        seen = found["seen"][name]
        assert seen["tokens"][-1] == len(prompt) + 18
        expected = states[int(name[-1])][0, seen["tokens"]] @ directions.T
        torch.testing.assert_close(torch.tensor(seen["values"]), expected, rtol=1e-4, atol=1e-3)
