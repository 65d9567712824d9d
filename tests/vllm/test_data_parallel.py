"""Two engines behind one server: requests go to either, under their plans, and what probes saw comes from both."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import serving
import torch
from requests_mixed import by_hugging_face, token_ids

import faststeer as fs
import faststeer.vllm


def test_requests_on_both_engines(tmp_path: Path) -> None:
    model, tokenizer = fs.demo.load()
    prompts, generator = token_ids(tokenizer), torch.Generator().manual_seed(11)
    directions = 80 * torch.nn.functional.normalize(torch.randn(8, 128, generator=generator), dim=1)
    plans = [fs.Plan([fs.Add(d, layers=i % 6), fs.Probe(d, layers=3)]) for i, d in enumerate(directions)]
    port = serving.free_port()
    settings = {"faststeer": True}
    command = [*serving.SERVE, "--model", str(fs.demo.FOLDER), "--served-model-name", "demo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--block-size", "32", "--data-parallel-size", "2", "--additional-config", json.dumps(settings)]
    with serving.running(command, port, tmp_path) as address:

        def answer(prompt: list[int], plan: fs.Plan) -> Any:
            data = {"model": "demo", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            data |= {"return_token_ids": True, "vllm_xargs": faststeer.vllm.plan(plan)}
            headers = {"Content-Type": "application/json"}
            asked = urllib.request.Request(f"{address}/v1/completions", json.dumps(data).encode(), headers)
            with urllib.request.urlopen(asked, timeout=120) as found:
                return json.load(found)

        with ThreadPoolExecutor(len(plans)) as pool:
            answers = list(pool.map(answer, prompts, plans))
        seen = [faststeer.vllm.projections(f"{address}/v1", one["id"]) for one in answers]
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as found:
            counted = [line for line in found.read().decode().splitlines() if "request_success_total{" in line]
    wanted = by_hugging_face(model, list(zip(prompts, plans, strict=True)))
    assert [one["choices"][0]["token_ids"] for one in answers] == wanted
    assert [len(choices) for choices in seen] == [1] * len(plans)
    for (projected,), prompt in zip(seen, prompts, strict=True):
        assert projected["resid_pre.4"]["tokens"][-1] == len(prompt) + 18
    used = {line.partition('engine="')[2][:1] for line in counted if not line.endswith(" 0.0")}
    assert used == {"0", "1"}
