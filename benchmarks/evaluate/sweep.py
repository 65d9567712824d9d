"""A sweep of the demo model on a CPU: 7 choices of layers x 9 coefficients x 3 methods x 64 prompts, against one
setting at a time through `generate` with a forward hook.

    python benchmarks/evaluate/sweep.py [--threads 1 2] [--settings 12] [--prompts 64] [--write]

The layers are the 6 single ones and all together, the coefficients 0 to 2 in steps of 0.25, the methods difference in
means, PCA and (as the control) a random vector of the first one's lengths. Coefficient 0 is the unsteered model under
every layer and method, so that the sweep answers it once: 7 x 8 x 3 + 1 settings; the other way answers every setting,
as a loop over settings does. That loop is run on a sample of settings, spread evenly over the grid, and its time per
setting is extrapolated to the whole grid. The sweep's seconds include its store, judging (refusal, the demo's grammar,
repetition) and the Engine's start; the loop's are `generate` alone: all 64 prompts of a setting in one padded batch,
and again one prompt at a time, which is how scripts without padding do it (on a smaller sample). Threads: PyTorch's, by
default one and as many as it takes by itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.evaluate.sweep import Store, Sweep, run, table
from faststeer.extract.contrast import contrast
from faststeer.hf.batching import encode, pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

NEW = 64
FEW = 8  # prompts of a setting that are answered one by one
COEFFICIENTS = [0.25 * i for i in range(9)]


def vectors(model: Any, tokenizer: Any) -> dict[str, fs.SteeringVector]:
    """Difference in means, PCA of the same lengths, and a random vector of the same lengths; at `resid_post`."""
    positive, negative = fs.demo.prompts("refusal", "train")
    found = contrast(model, tokenizer, positive, negative, at="resid_post", positions=[-1], covariance=True)
    dim, unit = found.dim().vector(-1), found.pca().vector(-1)
    pca = fs.SteeringVector({n: unit[n] * dim[n].norm() for n in dim.layers}, at="resid_post", method="pca")
    return {"dim": dim, "pca": pca, "random": fs.extract.random_like(dim, 0)}


def grid(named: dict[str, fs.SteeringVector]) -> list[tuple[str, tuple[int, ...], float]]:
    layers = next(iter(named.values())).layers
    groups = [*((layer,) for layer in layers), layers]
    return [(name, group, c) for name in named for group in groups for c in COEFFICIENTS]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=12, help="settings of the sample for one at a time")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sweep_cpu.csv")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for row in measure(options):
            rows.append({"threads": threads} | row)
            print(rows[-1])
    if options.write:
        print(results.write("sweep_cpu", rows))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = fs.demo.load()
    prompts = fs.demo.prompts("refusal", "test")[1][: options.prompts]
    named = vectors(model, tokenizer)
    settings = grid(named)
    n = len(settings)

    sample = settings[:: max(1, n // options.settings)]
    one_at_a_time(model, tokenizer, prompts[:4], named["dim"], (2,), 1.0)  # warms up
    start, cpu, hook_tokens = time.perf_counter(), time.process_time(), 0
    for name, layers, c in sample:
        hook_tokens += one_at_a_time(model, tokenizer, prompts, named[name], layers, c)
    hooks, hooks_cpu = time.perf_counter() - start, time.process_time() - cpu
    start, cpu = time.perf_counter(), time.process_time()
    singly = sample[:: max(1, len(sample) // 3)]
    for name, layers, c in singly:
        for prompt in prompts[:FEW]:
            one_at_a_time(model, tokenizer, [prompt], named[name], layers, c)
    share = len(singly) * len(prompts[:FEW]) / (n * len(prompts))
    single, single_cpu = (time.perf_counter() - start) / share, (time.process_time() - cpu) / share

    sweep = Sweep(
        prompts,
        vectors=named,
        layers=[list(layers) for layers in dict.fromkeys(layers for _, layers, _ in settings)],
        coefficients=COEFFICIENTS,
        controls=0,  # the random vector is one of the three methods
        judges=["refusal", "demo", "demo-coherent", "repetition"],
        text=(),
        projections=0,
        max_new_tokens=NEW,
    )
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "sweep.db") as store:
        start, cpu = time.perf_counter(), time.process_time()
        digest = run(sweep, model, tokenizer, store, max_batch=options.max_batch)
        ours, ours_cpu = time.perf_counter() - start, time.process_time() - cpu
        tokens = sum(answer["tokens"] for answer in store.answers(digest))
        start = time.perf_counter()
        lines = table(store, digest)
        summary = time.perf_counter() - start
    times = n / len(sample)
    cases = [
        # case, settings, tokens, seconds, seconds of the processor
        ("sweep", len(lines), tokens, ours, ours_cpu),
        ("table of the sweep", len(lines), "", summary, ""),
        ("generate with hooks, measured", len(sample), hook_tokens, hooks, hooks_cpu),
        ("generate with hooks, extrapolated", n, "", hooks * times, hooks_cpu * times),
        ("generate with hooks, a prompt at a time, extrapolated", n, "", single, single_cpu),
    ]
    rows = []
    for case, count, generated, seconds, processor in cases:
        row = {"case": case, "settings": count, "prompts": len(prompts), "tokens": generated}
        row |= {"seconds": f"{seconds:.1f}", "cpu_seconds": processor and f"{processor:.1f}"}
        if "extrapolated" in case:
            row |= {"times_sweep": f"{seconds / ours:.2f}", "cpu_times_sweep": f"{processor / ours_cpu:.2f}"}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
