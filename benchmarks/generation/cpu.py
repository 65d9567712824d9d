"""Tokens per second of SmolLM2-135M on a CPU: `generate` unsteered, with hand-written hooks, with `fs.steer`, and the
Engine; a vector added at every layer, one plan for all rows or another plan in each (of 32).

    python benchmarks/generation/cpu.py [--dtypes fp32 bf16] [--batches 1 16 64] [--threads 2 1] [--repeats 3] [--quick]

About 20 minutes on two idle cores; `--quick` is a try-out of the same path. Greedy, every answer of `--new` tokens, the
reading of the prompts included, so that no case gains by rows that end early. The cases of one setting take turns.
On the second number of threads the first batch is left out. Measurements are appended to out/bench/generation.jsonl; a
run that was stopped goes on there. At the end: benchmarks/results/generation_smollm2.csv (`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.engine import Engine
from faststeer.hf.batching import encode, pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PLANS = 32


@contextmanager
def hand_written(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What a person writes: a Python forward hook on every layer."""
    handles = [layer.register_forward_hook(lambda _m, _a, out: change(out)) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cases(model: Any, tokenizer: Any, batch: int, new: int) -> dict[str, Callable[[], Mapping[str, Any]]]:
    """Each case answers the prompts once and returns how many tokens it generated."""
    prompts = encode(tokenizer, smollm2.prompts(batch))
    rows = pad(prompts, tokenizer.pad_token_id)
    del rows["position_ids"]
    vector = 0.05 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    mine = vector.to(model.dtype)  # as the author of a hook would have it: another dtype would change the model's
    one = fs.Plan([fs.Add(vector, 1.0, layers="all")])
    many = [fs.Plan([fs.Add(vector, 1.0 + i % PLANS / 1000, layers="all")]) for i in range(batch)]
    model.generation_config.eos_token_id = []  # for the Engine, too: every answer has its full length

    def generate(around: Callable[[], Any]) -> Callable[[], Mapping[str, Any]]:
        @torch.no_grad()
        def run() -> Mapping[str, Any]:
            with around():
                ids = model.generate(**rows, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            return counted(ids[:, rows["input_ids"].shape[1] :].numel())

        return run

    def counted(tokens: int) -> Mapping[str, Any]:
        if tokens != batch * new:
            raise RuntimeError(f"{tokens} tokens were generated, expected {batch * new}")
        return {"tokens": tokens}

    length = rows["input_ids"].shape[1] + new
    engine = Engine(model, tokenizer, max_batch=batch, max_length=length)

    def served(plans: Any) -> Callable[[], Mapping[str, Any]]:
        return lambda: counted(sum(len(c.token_ids) for c in engine.generate(prompts, plans, max_new_tokens=new)))

    runs = {
        tables.PLAIN: generate(nullcontext),
        tables.HOOKS: generate(lambda: hand_written(model, lambda h: h + mine)),
        "generate, fs.steer": generate(lambda: fs.steer(model, one)),
        "Engine, unsteered": served(None),
        "Engine, steered": served(one),
    }
    if batch > 1:
        runs["generate, fs.steer, 32 plans"] = generate(lambda: fs.steer(model, many))
        runs["Engine, 32 plans"] = served(many)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))})[::-1])
    parser.add_argument("--new", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="try it: batches of 1 and 4, 4 tokens, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.new, options.repeats = [1, 4], 4, 1
    settings = [
        (threads, dtype, batch)
        for threads in options.threads
        for dtype in options.dtypes
        for batch in options.batches
        if threads == options.threads[0] or batch != options.batches[0]
    ]
    log = results.Log(results.LOGS / f"{'quick_' * options.quick}generation.jsonl", {"new": options.new}, options.fresh)
    for dtype in options.dtypes:
        model, tokenizer = smollm2.load(DTYPES[dtype])
        for threads, kind, batch in settings:
            where = {"dtype": kind, "batch": batch, "threads": threads}
            complete = options.repeats * (5 if batch == 1 else 7)
            if kind != dtype or len(tables.where(log.rows, **where)) >= complete:
                continue
            torch.set_num_threads(threads)
            for run in cases(model, tokenizer, batch, 2).values():
                run()  # warms up
            results.measure_in_turn(log, cases(model, tokenizer, batch, options.new), options.repeats, **where)
    folder = results.LOGS if options.quick else results.FOLDER
    path = results.write("generation_smollm2", log.rows, folder, {"new_tokens": options.new})
    print(tables.generation(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
