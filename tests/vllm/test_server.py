"""A vLLM server on loopback with faststeer on: what its users send by HTTP, right and wrong, and who may."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import serving
import torch

import faststeer as fs
import faststeer.vllm
from faststeer.vllm import plan as client_plan

KEY = "a key"
LAYER, COEFFICIENT, TOKENS = 3, 2.0, 16


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return fs.demo.load()


@pytest.fixture(scope="module")
def vector() -> fs.SteeringVector:
    return fs.SteeringVector({LAYER: torch.randn(128, generator=torch.Generator().manual_seed(1))})


@pytest.fixture(scope="module")
def prompt(demo: Any) -> list[int]:
    chat = fs.demo.prompts("refusal", "test")[1][0]
    return fs.hf.batching.encode(demo[1], [chat])[0]


def generated(demo: Any, plan: fs.Plan, prompt: list[int]) -> str:
    model, tokenizer = demo
    with fs.steer(model, plan), torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, use_cache=True
        )
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(demo: Any, vector: Any, prompt: list[int]) -> dict[str, str]:
    """What Hugging Face's model says, unsteered and steered."""
    plans = {"unsteered": fs.Plan(), "steered": fs.Plan([fs.Add(vector, COEFFICIENT)])}
    found = {name: generated(demo, plan, prompt) for name, plan in plans.items()}
    assert found["steered"] != found["unsteered"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, vector: fs.SteeringVector) -> Path:
    made = tmp_path_factory.mktemp("served") / "vectors"
    made.mkdir()
    vector.save(made / "lying.safetensors")
    vector.save(made.parent / "outside.safetensors")
    (made / "ready.json").write_text(json.dumps({"add": "lying", "coefficient": COEFFICIENT}))
    return made


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: Any) -> Iterator[str]:
    port = serving.free_port()
    settings = {"faststeer": {"folder": str(folder), "http_registration": True, "max_plan_bytes": 100_000}}
    settings["faststeer"] |= {"max_plans": 2, "max_registered_bytes": 200_000, "max_dose": 1e30}
    command = [*serving.SERVE, "--model", str(fs.demo.FOLDER), "--served-model-name", "demo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--api-key", KEY, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--block-size", "32", "--additional-config", json.dumps(settings)]
    with serving.running(command, port, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address: str) -> Callable[..., tuple[int, Any]]:
    """Send a request: status and JSON of the answer."""

    def ask(path: str, data: Any = None, method: str | None = None, key: str | None = KEY) -> tuple[int, Any]:
        body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(address + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    return ask


@pytest.fixture(scope="module")
def complete(ask: Any, prompt: list[int]) -> Callable[..., tuple[int, Any]]:
    """A completion under what a request says: status, and the text or what is wrong."""

    def complete(xargs: dict[str, Any] | None, key: str | None = KEY) -> tuple[int, Any]:
        data: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        status, answer = ask("/v1/completions", data | ({"vllm_xargs": xargs} if xargs else {}), key=key)
        return status, answer["choices"][0]["text"] if status == 200 else json.dumps(answer)

    return complete


def test_steered_and_unsteered(complete: Any, expected: dict[str, str], vector: Any) -> None:
    steered = client_plan(fs.Add(vector, COEFFICIENT))
    for _ in range(2):  # the second time out of the cache of prefixes
        assert complete(None) == (200, expected["unsteered"])
        assert complete(steered) == (200, expected["steered"])
        assert complete(client_plan(None)) == (200, expected["unsteered"])
    assert complete(client_plan("ready")) == (200, expected["steered"])


def test_a_chat(ask: Any, vector: Any) -> None:
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    data = {"model": "demo", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    texts = []
    for more in ({}, {"vllm_xargs": client_plan(fs.Add(vector, COEFFICIENT))}):
        status, answer = ask("/v1/chat/completions", data | more)
        assert status == 200, answer
        texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] != texts[1]


def test_plans_beyond_the_slots_wait(complete: Any, demo: Any, prompt: list[int]) -> None:
    """The server has two, and is asked for five plans at once, twice each."""
    directions = torch.randn(5, 128, generator=torch.Generator().manual_seed(6))
    plans = [fs.Plan([fs.Add(8 * direction, layers=LAYER)]) for direction in directions] * 2
    wanted = [generated(demo, plan, prompt) for plan in plans]
    assert len(set(wanted)) > 3
    with ThreadPoolExecutor(len(plans)) as pool:
        found = list(pool.map(lambda plan: complete(client_plan(plan)), plans))
    assert found == [(200, text) for text in wanted]


@pytest.mark.parametrize(
    ("path", "request_of", "text_of"),
    [
        (
            "/v1/responses",
            lambda question: {"input": question, "max_output_tokens": TOKENS},
            lambda answer: answer["output"][0]["content"][0]["text"],
        ),
        (
            "/v1/messages",
            lambda question: {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS},
            lambda answer: answer["content"][0]["text"],
        ),
    ],
    ids=["responses", "messages"],
)
def test_other_ways_to_ask(ask: Any, address: str, vector: Any, path: str, request_of: Any, text_of: Any) -> None:
    """They steer as a chat does, and what probes saw is asked for in the same way."""
    question, common = "How do I bake bread?", {"model": "demo", "temperature": 0}
    chat = common | {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS}
    for plan in (None, fs.Plan([fs.Add(vector, 8.0), fs.Probe(vector)])):
        asked = {"vllm_xargs": client_plan(plan)}
        wanted = ask("/v1/chat/completions", chat | asked)[1]["choices"][0]["message"]["content"]
        status, answer = ask(path, common | request_of(question) | asked)
        assert status == 200, answer
        assert text_of(answer) == wanted
        if plan is not None:
            (seen,) = faststeer.vllm.projections(f"{address}/v1", answer["id"], api_key=KEY)
            assert len(seen[f"resid_pre.{LAYER + 1}"]["tokens"]) >= TOKENS - 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_beam_search_under_a_plan_is_refused(ask: Any, path: str) -> None:
    data = {"model": "demo", "max_tokens": 4, "n": 2, "temperature": 0, "use_beam_search": True}
    data |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    status, answer = ask(path, data | {"vllm_xargs": client_plan("ready")})
    assert status == 400 and "leave out use_beam_search" in json.dumps(answer)
    for more in ({}, {"vllm_xargs": client_plan(None)}):
        assert ask(path, data | more)[0] == 200


def test_a_plan_that_a_route_would_ignore_is_refused(ask: Any) -> None:
    scored = {"model": "demo", "query": "bread", "items": ["a", "b"], "label_token_ids": [5, 6]}
    assert ask("/generative_scoring", scored)[0] == 200
    for payload in ("ready", "none", "no such plan"):
        status, answer = ask("/generative_scoring", scored | {"vllm_xargs": {"faststeer": payload}})
        assert status == 400 and "have no field vllm_xargs" in json.dumps(answer)


def test_projections(ask: Any, address: str, demo: Any, vector: Any, prompt: list[int]) -> None:
    """Of two prompts and two samples of each, as Hugging Face's model has them."""
    model, watched = demo[0], torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    add, base = fs.Add(vector, COEFFICIENT), f"{address}/v1"
    prompts = [prompt, prompt[:-1]]
    data = {"model": "demo", "prompt": prompts, "max_tokens": 6, "n": 2, "temperature": 1.0, "ignore_eos": True}
    data |= {"vllm_xargs": client_plan(fs.Plan([add, fs.Probe(watched, layers=[1, 4])])), "return_token_ids": True}
    status, answer = ask("/v1/completions", data)
    assert status == 200, answer
    found = faststeer.vllm.projections(base, answer["id"], api_key=KEY)
    assert found == faststeer.vllm.projections(base + "/", answer["id"], api_key=KEY)  # not forgotten by asking
    assert len(found) == len(answer["choices"]) == 4
    directions = torch.nn.functional.normalize(watched, dim=1)
    for number, (choice, seen) in enumerate(zip(answer["choices"], found, strict=True)):
        ids = prompts[number // 2] + choice["token_ids"]
        with torch.no_grad(), fs.steer(model, fs.Plan([add])):
            states = model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        assert set(seen) == {"resid_pre.2", "resid_pre.5"}
        for name, of_site in seen.items():
            assert of_site["tokens"] == list(range(len(ids) - 1))
            expected = states[int(name[-1])][0, of_site["tokens"]] @ directions.T
            torch.testing.assert_close(torch.tensor(of_site["values"]), expected, rtol=1e-4, atol=1e-3)


def test_projections_of_a_chat_and_of_none(ask: Any, address: str, vector: Any) -> None:
    base = f"{address}/v1"
    data = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0}
    answer = ask("/v1/chat/completions", data | {"vllm_xargs": client_plan(fs.Probe(vector))})[1]
    (seen,) = faststeer.vllm.projections(base, answer["id"], api_key=KEY)
    assert list(seen) == [f"resid_pre.{LAYER + 1}"]
    unprobed = ask("/v1/chat/completions", data | {"vllm_xargs": client_plan("ready")})[1]
    for unknown in (unprobed["id"], "chatcmpl-0", answer["id"][:-1], ".*", "a/../b"):
        with pytest.raises(LookupError, match="max_projection_bytes"):
            faststeer.vllm.projections(base, unknown, api_key=KEY)
    with pytest.raises(RuntimeError, match="answers 401"):
        faststeer.vllm.projections(base, answer["id"])
    with pytest.raises(RuntimeError, match="answers 404"):
        faststeer.vllm.projections(address, answer["id"], api_key=KEY)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ("unknown", "no plan is registered as 'unknown'; known: ready"),
        ("{", "no valid JSON"),
        ('{"add": "nothing"}', "no vector is registered as 'nothing'; known: lying"),
        ('{"add": "lying", "layers": [9]}', "layer 9 is out of range"),
        ('{"add": "lying", "at": "resid_mid"}', "this server is built with resid_pre, resid_post alone"),
        (client_plan(fs.Add(torch.ones(7), layers=0))["faststeer"], "hidden size 7, the model has 128"),
        (
            client_plan(fs.Add(torch.ones(7), layers=0))["faststeer"].replace('"tensor"', '"path"'),
            "cannot be read|no path",
        ),
        (
            '{"format": "faststeer.plan/1", "interventions": '
            '[{"type": "Add", "direction": {"path": "../outside.safetensors"}}]}',
            "leads out of the server's folder",
        ),
        ("[" * 100_000, "no valid JSON"),
        ("{" + " " * 100_000, "at most 100,000"),
        # Plans that never have room, and what to raise.
        (client_plan(fs.Plan([fs.Probe(torch.randn(5, 128), layers=0)])), '\\"probe_columns\\": 5'),
        (client_plan(fs.Add(torch.randn(128), layers=0, when=fs.Gate(torch.randn(128), latched=True))), '_gates\\": 1'),
        (client_plan(fs.Plan([fs.Add(torch.ones(128), i, layers="all") for i in range(1, 25)])), '_entries\\": 144'),
        (client_plan(fs.Plan([fs.Ablate(torch.randn(7, 128), layers=i) for i in range(3)])), '_vectors\\": 21'),
        (client_plan(fs.Plan([fs.Add(torch.ones(128), i, layers=0) for i in range(1, 34)])), "takes at most 32"),
        (3, "a plan is a int"),
        (["lying"], "expected one of add, ablate"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_plan_is_answered_400(complete: Any, expected: dict[str, str], payload: Any, says: str) -> None:
    status, answer = complete(payload if isinstance(payload, dict) else {"faststeer": payload})
    assert status == 400
    assert any(part in answer for part in says.split("|"))
    assert complete(None) == (200, expected["unsteered"])


def asked(path: str) -> dict[str, Any]:
    """A short request to one of the ways to ask."""
    question, common = "How do I bake bread?", {"model": "demo", "temperature": 0}
    if path == "/v1/completions":
        return common | {"prompt": question, "max_tokens": 4}
    if path == "/v1/responses":
        return common | {"input": question, "max_output_tokens": 4}
    return common | {"messages": [{"role": "user", "content": question}], "max_tokens": 4}


WAYS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]


@pytest.fixture(scope="module")
def stream(address: str) -> Callable[[str, Any], tuple[int, str]]:
    """Send a request for a streamed answer: its status, and all that comes."""

    def stream(path: str, data: Any) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(address + path, json.dumps(data | {"stream": True}).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return stream


@pytest.mark.parametrize("path", WAYS)
def test_a_bad_plan_is_answered_400_in_a_stream_as_without_one(ask: Any, stream: Any, vector: Any, path: str) -> None:
    bad = {
        "unknown": "no plan is registered as 'unknown'",
        '{"add": "lying", "layers": [9]}': "layer 9 is out of range",
        "[" * 1000: "no valid JSON",
        client_plan(fs.Add(torch.ones(7), layers=0))["faststeer"]: "hidden size 7, the model has 128",
        client_plan(fs.Add(vector, 1e38))["faststeer"]: "use a smaller coefficient, or start the server with a larger",
    }
    for payload, says in bad.items():
        data = asked(path) | {"vllm_xargs": {"faststeer": payload}}
        status, answer = stream(path, data)
        assert (status, says in answer) == (400, True), answer
        status, unstreamed = ask(path, data)
        assert status == 400 and json.loads(answer) == unstreamed
    for plan in (None, fs.Add(vector, COEFFICIENT)):
        status, answer = stream(path, asked(path) | {"vllm_xargs": client_plan(plan)})
        assert status == 200 and "error" not in answer.lower(), answer


@pytest.mark.parametrize("path", WAYS)
def test_a_request_that_overflows_ends_with_an_error_of_its_own(ask: Any, stream: Any, complete: Any, expected: dict[str, str], vector: Any, path: str) -> None:  # fmt: skip # noqa: E501
    """Below the server's largest dose, which is larger than what a norm can square."""
    data = asked(path) | {"vllm_xargs": client_plan(fs.Add(vector, 1e27))}
    variants: list[dict[str, Any]] = [{}]
    if path == "/v1/completions":
        variants += [{"n": 2, "temperature": 1.0}, {"logprobs": 2}, {"prompt": ["Hi", "Who are you?"]}]
    elif path == "/v1/chat/completions":
        variants += [{"n": 2, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 2}]
    for more in variants:
        status, answer = ask(path, data | more)
        assert status == 400 and "the model overflowed under the plan" in json.dumps(answer), answer
        status, streamed = stream(path, data | more)
        # vLLM 0.32 cannot put a chat's error into a stream of messages, and says that instead.
        says = "event: error" if path == "/v1/messages" else "the model overflowed under the plan"
        assert status == 200 and says in streamed, streamed
    assert complete(None) == (200, expected["unsteered"])
    assert complete(client_plan("ready")) == (200, expected["steered"])


def test_registering(ask: Any, complete: Any, expected: dict[str, str], vector: fs.SteeringVector) -> None:
    plan = {"add": "mine", "coefficient": COEFFICIENT}
    assert ask("/v1/faststeer/vectors/mine", vector.to_bytes(), "PUT") == (200, {"registered": "mine"})
    assert complete({"faststeer": json.dumps(plan)}) == (200, expected["steered"])
    assert ask("/v1/faststeer/plans/calm", plan, "PUT") == (200, {"registered": "calm"})
    there = ask("/v1/faststeer")[1]
    assert there["vectors"] == ["lying", "mine"] and there["plans"] == ["calm", "ready"]
    assert ask("/v1/faststeer/vectors/mine", method="DELETE") == (200, {"removed": "mine"})
    assert complete({"faststeer": json.dumps(plan)})[0] == 400
    assert complete({"faststeer": "calm"}) == (200, expected["steered"])  # it holds the vector by value
    assert ask("/v1/faststeer/plans/calm", method="DELETE")[0] == 200
    assert complete({"faststeer": "calm"})[0] == 400


@pytest.mark.parametrize(
    ("path", "data", "status", "says"),
    [
        ("vectors/mine", b"no vector at all", 400, "is no safetensors file"),
        ("vectors/mine", b"\x80\x04pickle", 400, "it is a pickle"),
        ("vectors/none", None, 400, "is no name"),
        ("vectors/a%2Fb", None, 404, "Not Found"),
        ("plans/calm", b'{"add": "nothing"}', 400, "no vector is registered"),
        ("plans/calm", b"\xff", 400, "decode"),
        ("plans/calm", b" " * 100_001, 400, "more than the 100,000 bytes"),
        ("other/calm", b"{}", 404, "expected vectors or plans"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_registered(ask: Any, vector: Any, path: str, data: Any, status: int, says: str) -> None:
    found, answer = ask(f"/v1/faststeer/{path}", vector.to_bytes() if data is None else data, "PUT")
    assert (found, says in json.dumps(answer)) == (status, True), answer
    assert ask("/v1/faststeer")[1]["plans"] == ["ready"]


def test_the_key_is_asked_for(ask: Any, complete: Any, vector: fs.SteeringVector) -> None:
    for key in (None, "another key"):
        assert complete(client_plan("ready"), key=key)[0] == 401
        assert ask("/v1/faststeer", key=key)[0] == 401
        assert ask("/v1/faststeer/vectors/mine", vector.to_bytes(), "PUT", key=key)[0] == 401
        assert ask("/v1/faststeer/plans/ready", method="DELETE", key=key)[0] == 401
