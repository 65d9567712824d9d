"""A vLLM process with faststeer installed and off: it works, refuses plans, and loads next to nothing of faststeer."""

import json
import os
import subprocess
import sys

import faststeer as fs

RUN = """
import json, sys
from vllm import LLM, SamplingParams

engine = LLM(
    model=sys.argv[1], dtype="float32", max_model_len=64, block_size=32, max_num_seqs=4, enforce_eager=True,
    enable_prefix_caching=True,
)
prompt = {"prompt_token_ids": list(range(20, 60))}
(answer,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
try:
    engine.generate([prompt], SamplingParams(extra_args={"faststeer": '{"add": "v"}'}), use_tqdm=False)
except ValueError as error:
    print("ANSWER", json.dumps([str(error), sorted(name for name in sys.modules if name.startswith("faststeer"))]))
"""


def test_only_the_switch_is_loaded() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTSTEER_VLLM"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(fs.demo.FOLDER)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("ANSWER ")]
    error, modules = json.loads(line.removeprefix("ANSWER "))
    assert "this server does not steer: start it with FASTSTEER_VLLM=1" in error
    assert [name.removeprefix("faststeer.vllm.") for name in modules[4:]] == [
        "admission",
        "plugin",
        "server",
        "switch",
        "wrapping",
    ]
    assert modules[:4] == ["faststeer", "faststeer.file_kinds", "faststeer.version", "faststeer.vllm"]
