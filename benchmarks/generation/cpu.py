"""Tokens per second of the demo model on a CPU, 64 rows: `generate` against the Engine, unsteered, with a vector added
at every layer, with a direction ablated at every layer, and with another plan in every row.

    python benchmarks/generation/cpu.py [--dtype bf16] [--threads 1 2] [--repeats 4] [--write]

Two workloads of the same prompts, greedy. `answers`: all 256 test prompts (harmful and harmless in turn), each to its
own end; `generate` takes them 64 at a time. `fixed`: the first 64, each exactly 64 new tokens, so that no method gains
by rows that end early. What counts as a token: a generated one before the end-of-sequence token, never padding. One
repeat runs every case once, in turn, so that a machine that slows down slows all of them. Threads: PyTorch's, by
default one and as many as it takes by itself. Seconds are the clock's; of one thread, processor time, which other
programs on the machine disturb less. The last part says where the time of two cases goes, on one thread:
`<results>_shares` has the seconds of one run and, from the profiler, of kinds of operators.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.engine import Engine
from faststeer.hf.batching import encode, pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

ROWS, NEW = 64, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE = "generate, hooks"
Count = Callable[[], int]


@contextmanager
def hand_written(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """What a person writes: a Python forward hook on every layer."""
    handles = [layer.register_forward_hook(lambda _m, _a, out: change(out)) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cases(model: Any, tokenizer: Any, prompts: list[list[int]], end: int | None) -> dict[str, Count]:
    """Each case runs the workload once and returns how many tokens it generated."""
    vector = 0.05 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    unit = (vector / vector.norm()).to(model.dtype)
    mine = vector.to(model.dtype)  # as the author of a hook would have it: another dtype would change the model's
    add = fs.Plan([fs.Add(vector, 1.0, layers="all")])
    ablate = fs.Plan([fs.Ablate(vector, layers="all")])
    own = [fs.Plan([fs.Add(vector, 1.0 + i / 1000, layers="all")]) for i in range(len(prompts))]
    model.generation_config.eos_token_id = [] if end is None else end

    @torch.no_grad()
    def generate() -> int:
        count = 0
        for start in range(0, len(prompts), ROWS):
            batch = pad(prompts[start : start + ROWS], 0)
            del batch["position_ids"]
            out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=end)
            rows = out[:, batch["input_ids"].shape[1] :].tolist()
            count += sum(row.index(end) if end in row else len(row) for row in rows)
        return count

    def hooked(change: Callable[[torch.Tensor], torch.Tensor]) -> Count:
        def run() -> int:
            with hand_written(model, change):
                return generate()

        return run

    def steered() -> int:
        with fs.steer(model, add):
            return generate()

    def engine(plans: Any) -> Count:
        made = Engine(model, tokenizer, max_batch=ROWS, max_length=128)

        def run() -> int:
            return sum(len(c.token_ids) for c in made.generate(prompts, plans, max_new_tokens=NEW))

        return run

    return {
        "generate, unsteered": generate,
        BASELINE: hooked(lambda h: h + 1.0 * mine),
        "generate, fs.steer": steered,
        "generate, hooks that ablate": hooked(lambda h: h - (h @ unit).unsqueeze(-1) * unit),
        "Engine, unsteered": engine(None),
        "Engine, steered": engine(add),
        "Engine, a plan per row": engine(own),
        "Engine, ablation": engine(ablate),
    }


def measure(workload: str, runs: dict[str, Count], repeats: int) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = []
    for repeat in range(-1, repeats):  # the first warms up
        for case, run in runs.items():
            start = clock()
            count = run()
            row = {"workload": workload, "threads": threads, "case": case, "repeat": repeat, "tokens": count}
            if repeat >= 0:
                rows.append(row | {"seconds": f"{clock() - start:.4f}"})
    return rows


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "faststeer::linear"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "faststeer::rotary_attention_"),
    "attention with its projections, MLPs": ("faststeer::attention_branch_", "faststeer::gated_mlp"),
    "residual add, steering, norm": ("faststeer::add_steer_rmsnorm", "faststeer::add_steer", "faststeer::steer"),
}


def shares(case: str, run: Count) -> list[dict[str, Any]]:
    """Seconds of a run by the clock, as the profiler's are, and in it of kinds of operators; "rest": small operators
    and Python."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    own = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    found = {kind: sum(own.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    total = min(seconds)
    found |= {"rest": total - sum(found.values()), "all": total}
    return [{"case": case, "kind": kind, "seconds": f"{value:.4f}"} for kind, value in found.items()]


def summary(rows: list[dict[str, Any]]) -> str:
    """Median tokens/s of each case, and the median over repeats of its ratio to hand-written hooks (to ablating ones,
    for ablation) and to the unsteered case of its kind."""
    lines = []
    for workload, threads in dict.fromkeys((row["workload"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["workload"], row["threads"]) == (workload, threads)]
        rates: dict[str, list[float]] = {}
        for row in here:
            rates.setdefault(row["case"], []).append(row["tokens"] / float(row["seconds"]))
        name = f"{workload}, {threads} thread{'s' * (threads > 1)}"
        lines.append(f"{name:32} tokens/s   to hooks   to unsteered   tokens")
        for case, rate in rates.items():
            hooks = rates["generate, hooks that ablate" if "ablat" in case else BASELINE]
            plain = rates["Engine, unsteered" if case.startswith("Engine") else "generate, unsteered"]
            to_hooks, to_plain = (
                statistics.median(a / b for a, b in zip(rate, other, strict=True)) for other in (hooks, plain)
            )
            count = next(row["tokens"] for row in here if row["case"] == case)
            lines.append(f"{case:32} {statistics.median(rate):8.0f} {to_hooks:10.2f} {to_plain:14.3f} {count:8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    default = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/generation_cpu_<dtype>*.csv")
    options = parser.parse_args()
    model, tokenizer = fs.demo.load()
    model.to(DTYPES[options.dtype])
    sides = fs.demo.prompts("refusal", "test")
    prompts = encode(tokenizer, [prompt for pair in zip(*sides, strict=True) for prompt in pair])
    end = tokenizer.eos_token_id
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += measure("answers", cases(model, tokenizer, prompts, end), options.repeats)
        rows += measure("fixed", cases(model, tokenizer, prompts[:ROWS], None), options.repeats)
    torch.set_num_threads(1)
    fixed = cases(model, tokenizer, prompts[:ROWS], None)
    parts = [row for case in (BASELINE, "Engine, steered") for row in shares(case, fixed[case])]
    print(summary(rows))
    for part in parts:
        print(f"{part['case']:32} {part['kind']:32} {part['seconds']} s")
    if options.write:
        print(results.write(f"generation_cpu_{options.dtype}", rows))
        print(results.write(f"generation_cpu_{options.dtype}_shares", parts))


if __name__ == "__main__":
    main()
