"""Choosing a direction among layers x positions x coefficients: candidates as rows of mixed batches against one at a
time, on the demo model and a CPU.

    OMP_NUM_THREADS=1 python benchmarks/extract/selection.py [--repeats 3] [--write]

The work is the same: the refusal score of the next token of every validation prompt, with every candidate's direction
added (on harmless prompts) and subtracted (on harmful ones). `mixed rows`: `score_on` with all plans, 64 rows a batch,
each row under its own plan. `one at a time`: each plan alone on the model by `fs.steer`, all its prompts in one batch.
`one at a time, hooks`: the same with a hand-written forward hook, registered and removed for each candidate, which is
what people do. Cases take turns within a repeat. With few prompts a candidate the batches of one at a time are small;
with many, both compute the same rows, and what is left of the difference is the cost of putting plans on the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.evaluate import refusal_score, refusal_tokens, score_on
from faststeer.extract.sweep import Cell, cells
from faststeer.hf.batching import encode, forward_arguments, pad, padding_id

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

COEFFICIENTS = (0.5, 1.0, 2.0)
PROMPTS = (4, 16)
Case = Callable[[], torch.Tensor]


def cases(model: Any, tokenizer: Any, found: fs.extract.Candidates, n: int) -> dict[str, Case]:
    """Each case returns the mean scores `[2, candidates]`: added, subtracted."""
    harmful, harmless = (side[:n] for side in fs.demo.prompts("refusal", "validation"))
    tried, ids = cells(found, COEFFICIENTS), refusal_tokens(tokenizer)
    sides = (harmless, [cell.add for cell in tried], 1.0), (harmful, [cell.subtract for cell in tried], -1.0)
    batches = [
        forward_arguments(model, pad(encode(tokenizer, prompts), padding_id(tokenizer))) for prompts, _, _ in sides
    ]

    def mixed() -> torch.Tensor:
        scored = [
            score_on(model, tokenizer, plans, prompts, token_ids=ids, batch_size=64) for prompts, plans, _ in sides
        ]
        return torch.stack(scored).mean(-1)

    def alone() -> torch.Tensor:
        scored = [
            [score_on(model, tokenizer, plan, prompts, token_ids=ids, batch_size=64).mean() for plan in plans]
            for prompts, plans, _ in sides
        ]
        return torch.tensor(scored)

    @torch.no_grad()
    def hooks() -> torch.Tensor:
        scored = []
        for batch, (_, _, sign) in zip(batches, sides, strict=True):
            scored.append([_hooked(model, batch, cell, direction(cell), sign, ids) for cell in tried])
        return torch.tensor(scored)

    def direction(cell: Cell) -> torch.Tensor:
        return found.directions[found.positions.index(cell.position), cell.layer].float()  # type: ignore[arg-type]

    return {"mixed rows": mixed, "one at a time": alone, "one at a time, hooks": hooks}


def _hooked(model: Any, batch: Any, cell: Cell, direction: torch.Tensor, sign: float, ids: Any) -> float:
    step = sign * cell.coefficient * direction
    layer = model.model.layers[cell.layer]
    handle = layer.register_forward_pre_hook(lambda _module, args: (args[0] + step, *args[1:]))
    logits = model(**batch).logits[:, -1]
    handle.remove()
    return refusal_score(logits, ids).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/extract_selection.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = fs.demo.load()
    found = fs.extract.candidates(model, tokenizer, *fs.demo.prompts("refusal", "train"))
    rows = []
    for n in PROMPTS:
        runs = cases(model, tokenizer, found, n)
        scores = {name: run() for name, run in runs.items()}  # warms up, too
        reference = scores["one at a time, hooks"]
        for repeat in range(options.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                rows.append(
                    {
                        "case": name,
                        "candidates": scores[name].shape[1],
                        "prompts": n,
                        "repeat": repeat,
                        "seconds": f"{seconds:.4f}",
                        "largest_difference": f"{(scores[name] - reference).abs().max().item():.1e}",
                        "same_choice": bool(
                            (scores[name][1] - scores[name][0]).argmin() == (reference[1] - reference[0]).argmin()
                        ),
                    }
                )
        print(summary([row for row in rows if row["prompts"] == n]))
    if options.write:
        print(results.write("extract_selection", rows))


def summary(rows: list[dict[str, Any]]) -> str:
    """Median seconds of each case, and the median over repeats of its ratio to mixed rows."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["case"], []).append(float(row["seconds"]))
    lines = [f"{rows[0]['candidates']} candidates, {rows[0]['prompts']} prompts a side"]
    for name, taken in seconds.items():
        factor = statistics.median(a / b for a, b in zip(taken, seconds["mixed rows"], strict=True))
        row = next(row for row in rows if row["case"] == name)
        lines.append(
            f"  {name:22} {statistics.median(taken):7.3f} s   {factor:5.2f}x   differs by {row['largest_difference']}, "
            f"same choice: {row['same_choice']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
