"""What an engine does not start with, and what it does not take: said at once, with nothing run unsteered; and that a
plan which has no room for the moment waits, or is refused, as configured."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import serving
import torch
from requests_mixed import by_engine, by_hugging_face, token_ids, tokens

import faststeer as fs
from faststeer.vllm import plan as client_plan

MODES = {
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "KV connectors": {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {},
        }
    },
    "pooling models": {"runner": "pooling", "convert": "embed"},
}  # fmt: skip


def direction(seed: int) -> torch.Tensor:
    return 80 * torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_would_be_steered_wrongly_is_refused_at_the_start(start: Any, mode: str) -> None:
    with pytest.raises(RuntimeError, match=rf"faststeer cannot steer with {mode}.*: switch that off, or start without"):
        start(**MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_refuses_on_its_own(start: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the front end is another process, or let it through."""
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(InputProcessor, "__init__", InputProcessor.__init__.__wrapped__)
    with pytest.raises(RuntimeError, match=rf"faststeer cannot steer with {mode}"):
        start(**MODES[mode])


@pytest.fixture(scope="module")
def small(start: Any) -> Any:
    """Room for one plan of two entries and two vectors."""
    return start({"max_plans": 1, "max_entries": 2, "max_vectors": 2, "probe_columns": 1})


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (fs.Plan([fs.Add(direction(0), layers=[0, 1, 2])]), '"max_entries": 3'),
        (fs.Plan([fs.Ablate(torch.randn(3, 128), layers=0)]), '"max_vectors": 3'),
        (fs.Plan([fs.Probe(torch.randn(2, 128), layers=0)]), '"probe_columns": 2'),
        (fs.Plan([fs.Add(direction(0), layers=2, when=fs.Gate(direction(1), latched=True))]), '"latched_gates": 1'),
        (fs.Plan([fs.Add(direction(0), layers=0, at="mlp_out")]), '"hook_points": "all"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_that_never_has_room_is_refused_with_what_to_raise(small: Any, plan: fs.Plan, says: str) -> None:
    with pytest.raises(ValueError, match=f"start it with the setting {says}"):
        by_engine(small, [(list(range(20, 60)), plan)])
    assert not small.llm_engine.has_unfinished_requests()


def test_plans_that_have_room_one_after_the_other_wait(small: Any) -> None:
    model, tokenizer = fs.demo.load()
    prompts = token_ids(tokenizer)
    plans = [fs.Plan([fs.Add(direction(i), layers=2), fs.Add(direction(9), layers=4)]) for i in range(4)]
    requests = [(prompts[i], plans[i % 4] if i % 3 else None) for i in range(8)]
    worker = small.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert worker.faststeer.n_slots == 1
    assert tokens(by_engine(small, requests)) == by_hugging_face(model, requests)


def test_a_plan_too_many_is_refused_where_so_configured(start: Any) -> None:
    llm = start({"max_plans": 2, "when_full": "refuse"})
    model, tokenizer = fs.demo.load()
    prompts = token_ids(tokenizer)
    plans = [fs.Plan([fs.Add(direction(i), layers=2)]) for i in range(3)]
    full = [(prompts[0], plans[0]), (prompts[1], plans[1]), (prompts[2], None), (prompts[3], plans[0])]
    with pytest.raises(ValueError, match=r"2 different plans for other requests.* max_plans"):
        by_engine(llm, [*full, (prompts[4], plans[2])])
    assert not llm.llm_engine.has_unfinished_requests()
    assert tokens(by_engine(llm, full)) == by_hugging_face(model, full)
    others = [(prompts[4], plans[2]), (prompts[5], plans[1])]  # the first ones have ended
    assert tokens(by_engine(llm, others)) == by_hugging_face(model, others)


def test_a_server_refuses_a_plan_too_many_until_others_have_ended(tmp_path: Path) -> None:
    port, settings = serving.free_port(), {"faststeer": {"max_plans": 1, "when_full": "refuse"}}
    command = [*serving.SERVE, "--model", str(fs.demo.FOLDER), "--served-model-name", "demo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--block-size", "32", "--additional-config", json.dumps(settings)]

    def ask(plan: fs.Plan | None, n_tokens: int, **more: Any) -> Any:
        data = {"model": "demo", "prompt": list(range(20, 40)), "max_tokens": n_tokens, "ignore_eos": True}
        body = json.dumps(data | {"vllm_xargs": client_plan(plan)} | more).encode()
        asked = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        return urllib.request.urlopen(asked, timeout=120)

    first, second = (fs.Plan([fs.Add(direction(i), layers=2)]) for i in range(2))
    with serving.running(command, port, tmp_path) as address:
        with ask(first, 400, n=8, stream=True) as answers:  # under way, as its first line shows, and for a while
            assert answers.readline().startswith(b"data: ")
            for streamed in (False, True):
                with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                    ask(second, 4, stream=streamed)
                assert "max_plans" in refused.value.read().decode()
            assert ask(first, 4).status == ask(None, 4).status == 200
            answers.read()
        assert ask(second, 4).status == 200
