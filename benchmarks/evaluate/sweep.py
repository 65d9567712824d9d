"""A sweep of SmolLM2-135M on a CPU: layers x coefficients x vectors x prompts, against one setting at a time through
`generate` with a forward hook.

    python benchmarks/evaluate/sweep.py [--repeats 2] [--prompts 8] [--threads 2] [--quick]

About 4 minutes on two idle cores. 3 layers x 5 coefficients x 2 vectors: tone by difference in means, and a random one
of the same lengths. Coefficient 0 is the unsteered model under every layer and vector, so that the sweep answers it
once: 3 x 4 x 2 + 1 settings; the loop, as loops do, answers all 30. The sweep's seconds include its store, judging
(refusal, repetition) and the Engine's start; the loop's are `generate` alone: all prompts of a setting in one padded
batch, and again one prompt at a time, which is how scripts without padding do it (on every fifth setting,
extrapolated). Cases take turns. Appended to out/bench/sweep.jsonl; at the end benchmarks/results/sweep_smollm2.csv
(`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.evaluate.sweep import Store, Sweep, run, table
from faststeer.hf.batching import encode, pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

NEW = 24
LAYERS = (16, 20, 24)
COEFFICIENTS = [-1.0, -0.5, 0.0, 0.5, 1.0]
ONE_IN = 5  # of the settings are answered a prompt at a time


def vectors(model: Any, tokenizer: Any) -> dict[str, fs.SteeringVector]:
    """Tone by difference in means, and a random vector of the same lengths; at `resid_post`."""
    dim = fs.extract.dim(model, tokenizer, *smollm2.contrast(8), at="resid_post", position=-1)
    dim = fs.SteeringVector({layer: dim[layer] for layer in LAYERS}, at="resid_post", method="dim")
    return {"dim": dim, "random": fs.extract.random_like(dim, 0)}


@torch.no_grad()
def one_at_a_time(
    model: Any, tokenizer: Any, prompts: list[str], vector: Any, layers: tuple[int, ...], c: float
) -> int:
    """All prompts of a setting through `generate`, the vector added by a hook on each layer; tokens generated."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _m, _a, out, v=vector[layer]: out + c * v)
        for layer in layers
    ]
    try:
        batch = pad(encode(tokenizer, prompts), tokenizer.pad_token_id)
        del batch["position_ids"]
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    finally:
        for handle in handles:
            handle.remove()
    end = tokenizer.eos_token_id
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return sum(row.index(end) if end in row else len(row) for row in rows)


def cases(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    named = vectors(model, tokenizer)
    grid = [(name, layer, c) for name in named for layer in LAYERS for c in COEFFICIENTS]

    def swept() -> dict[str, Any]:
        sweep = Sweep(
            prompts,
            vectors=named,
            layers=[[layer] for layer in LAYERS],
            coefficients=COEFFICIENTS,
            controls=0,  # the random vector is one of the two
            judges=["refusal", "repetition"],
            text=(),
            projections=0,
            max_new_tokens=NEW,
        )
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "sweep.db") as store:
            digest = run(sweep, model, tokenizer, store, max_batch=64)
            tokens = sum(answer["tokens"] for answer in store.answers(digest))
            return {"settings": len(table(store, digest)), "tokens": tokens}

    def looped() -> dict[str, Any]:
        tokens = sum(one_at_a_time(model, tokenizer, prompts, named[name], (layer,), c) for name, layer, c in grid)
        return {"settings": len(grid), "tokens": tokens}

    def singly() -> dict[str, Any]:
        sample = grid[::ONE_IN]
        start = time.perf_counter()
        for name, layer, c in sample:
            for prompt in prompts:
                one_at_a_time(model, tokenizer, [prompt], named[name], (layer,), c)
        seconds = (time.perf_counter() - start) * len(grid) / len(sample)
        return {"settings": len(grid), "seconds": round(seconds, 4), "timed_one_in": ONE_IN}

    return {
        "sweep": swept,
        "`generate` with hooks, a setting at a time": looped,
        "`generate` with hooks, a prompt at a time": singly,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="try it: one prompt, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.repeats = 1, 1
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("prompts", "threads")}
    log = results.Log(results.LOGS / f"{'quick_' * options.quick}sweep.jsonl", settings, options.fresh)
    model, tokenizer = smollm2.load()
    runs = cases(model, tokenizer, smollm2.prompts(options.prompts))
    results.measure_in_turn(log, runs, options.repeats, prompts=options.prompts, threads=options.threads)
    path = results.write("sweep_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER)
    print(tables.sweep(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
