"""Tokens per second of vLLM on a CPU with the demo model (a toy) at batch 64: without faststeer, with it and unsteered,
one layer steered, every layer, and 64 different plans.

    python benchmarks/vllm/cpu.py [--repeats 8] [--forms] [--write]      in the environment of `make test-vllm`

Two engines live side by side, each in a process of its own that waits while the other runs: `off` is vLLM as it is,
`on` has faststeer. With `--forms` there is a third, `fused`, whose op is one with the next norm (forms.py). One repeat
runs every case once, in turn, in an order that goes backwards every second time, so that a machine that slows down
slows all of them. Every request generates exactly `--new` tokens, greedily; prefix caching is off, so that every repeat
does the same work. Ratios are taken within a repeat, against `off`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS = 64
CASES = {
    "off": "off",
    "on, unsteered": "on",
    "on, one layer": "on",
    "on, every layer": "on",
    "on, 64 plans": "on",
}
FORMS = {f"fused, {what}": "fused" for what in ("unsteered", "one layer", "every layer", "64 plans")}


class Engine:
    """A vLLM engine in a process of its own, asked line by line."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        environment = dict(os.environ) | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "FASTSTEER_VLLM": "0" if kind == "off" else "1",
        }
        command = [sys.executable, __file__, "--serve", kind, "--new", str(options.new), "--dtype", options.dtype]
        command += ["--eager"] if options.eager else []
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("start")

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("ANSWER "):  # other libraries print, too
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"the engine ended with exit code {self._process.wait()}")

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def serve(options: argparse.Namespace) -> None:
    """The process of one engine: reads the name of a case, runs it, and answers with tokens and seconds."""
    import torch
    from vllm import LLM, SamplingParams

    import faststeer as fs
    from faststeer.hf.batching import encode
    from faststeer.vllm import plan

    _, tokenizer = fs.demo.load()
    sides = fs.demo.prompts("refusal", "test")
    if options.serve == "fused":
        import forms

        forms.fuse()
    chats = [prompt for pair in zip(*sides, strict=True) for prompt in pair][:ROWS]
    prompts = [{"prompt_token_ids": ids} for ids in encode(tokenizer, chats)]
    vector = 0.05 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    llm = LLM(
        model=str(fs.demo.FOLDER), dtype=options.dtype, max_model_len=256, max_num_seqs=ROWS, block_size=32,
        enable_prefix_caching=False, enforce_eager=options.eager,
    )  # fmt: skip
    every = [plan(fs.Add(vector, 1.0, layers="all"))] * ROWS
    given: dict[str, list[Any]] = {
        "off": [None] * ROWS,
        "unsteered": [None] * ROWS,
        "one layer": [plan(fs.Add(vector, 1.0, layers=3))] * ROWS,
        "every layer": every,
        "64 plans": [plan(fs.Add(vector, 1.0 + i / 1000, layers="all")) for i in range(ROWS)],
    }
    for line in sys.stdin:
        found: dict[str, Any] = {}
        if line.strip() != "start":
            parameters = [
                SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True, extra_args=extra)
                for extra in given[line.strip().rpartition(", ")[2]]
            ]
            start = time.perf_counter()
            answers = llm.generate(prompts, parameters, use_tqdm=False)
            seconds = time.perf_counter() - start
            ids = [list(answer.outputs[0].token_ids) for answer in answers]
            answered = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]  # the same for the same answers
            found = {"tokens": sum(map(len, ids)), "seconds": round(seconds, 4), "answers": answered}
        print("ANSWER", json.dumps(found), flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cases = CASES | (FORMS if options.forms else {})
    engines = {kind: Engine(kind, options) for kind in dict.fromkeys(cases.values())}
    try:
        for repeat in range(-1, options.repeats):  # the first warms up
            for case in list(cases) if repeat % 2 else list(cases)[::-1]:
                found = engines[cases[case]].ask(case)
                if repeat >= 0:
                    rows.append({"case": case, "repeat": repeat, "dtype": options.dtype} | found)
    finally:
        for engine in engines.values():
            engine.end()
    plain = {r["repeat"]: r["tokens"] / r["seconds"] for r in rows if r["case"] == "off"}
    return [r | {"to_off": round(r["tokens"] / r["seconds"] / plain[r["repeat"]], 4)} for r in rows]


def summary(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':20} tokens/s   to off (median, lowest, highest)"]
    for case in (case for case in CASES | FORMS if any(row["case"] == case for row in rows)):
        here = [r for r in rows if r["case"] == case]
        ratios = [r["to_off"] for r in here]
        rate = statistics.median(r["tokens"] / r["seconds"] for r in here)
        lines.append(f"{case:20} {rate:8.0f}   {statistics.median(ratios):.3f} {min(ratios):.3f} {max(ratios):.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vllm_cpu.csv")
    parser.add_argument("--forms", action="store_true", help="also the op that is one with the next norm")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    rows = measure(options)
    print(summary(rows))
    if options.write:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import results
        import vllm

        path = results.write("vllm_cpu", rows)
        beside = path.with_name("vllm_cpu.machine.json")
        found = json.loads(beside.read_text()) | {"vllm": vllm.__version__, "compiled": not options.eager}
        beside.write_text(json.dumps(found, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
