"""Choosing a direction among layers x coefficients: candidates as rows of mixed batches against one at a time, on
SmolLM2-135M and a CPU.

    python benchmarks/extract/selection.py [--repeats 3] [--threads 2] [--quick]

About 4 minutes on two idle cores. The work is the same: a score of the next token of every prompt (here the odds of a
few opening words), with every candidate's tone direction added on one set of prompts and subtracted on another. `mixed
rows`: `score_on` with all plans, 64 rows a batch, each row under its own plan. `one at a time`: each plan alone on the
model by `fs.steer`, all its prompts in one batch. `one at a time, hooks`: the same with a hand-written forward hook,
registered and removed for each candidate, which is what people do. Cases take turns within a repeat. With few prompts a
candidate the batches of one at a time are small; with many, mixed rows save what candidates have in common, and the
cost of putting plans on the model. Appended to out/bench/selection.jsonl; at the end
benchmarks/results/selection_smollm2.csv (`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.evaluate import refusal_score, score_on
from faststeer.extract.sweep import Cell, cells
from faststeer.hf.batching import encode, forward_arguments, pad, padding_id

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

COEFFICIENTS = (0.5, 1.0)
LAYERS = range(10, 26, 2)
PROMPTS = (2, 8)
OPENINGS = ("I", "The", "It", "Sure", "Sorry")  # what is scored does not matter for the time it takes
Case = Callable[[], torch.Tensor]


def cases(model: Any, tokenizer: Any, found: fs.extract.Candidates, n: int) -> dict[str, Case]:
    """Each case returns the mean scores `[2, candidates]`: added, subtracted."""
    questions = smollm2.prompts(2 * n)
    tried = [cell for cell in cells(found, COEFFICIENTS) if cell.layer in LAYERS]
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in OPENINGS]
    sides = (
        (questions[:n], [cell.add for cell in tried], 1.0),
        (questions[n:], [cell.subtract for cell in tried], -1.0),
    )
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
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="try it: one prompt a side, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = (1,) if options.quick else PROMPTS
    repeats = 1 if options.quick else options.repeats
    log = results.Log(
        results.LOGS / f"{'quick_' * options.quick}selection.jsonl", {"threads": options.threads}, options.fresh
    )
    model, tokenizer = smollm2.load()
    found = fs.extract.candidates(model, tokenizer, *smollm2.contrast(8), positions=[-1])
    for n in counts:
        runs = cases(model, tokenizer, found, n)
        reference = runs["one at a time, hooks"]()  # warms up, too

        def compared(run: Case, reference: torch.Tensor = reference) -> dict[str, Any]:
            scores = run()
            choice, same = ((s[1] - s[0]).argmin() for s in (scores, reference))
            return {
                "candidates": scores.shape[1],
                "largest_difference": f"{(scores - reference).abs().max().item():.1e}",
                "same_choice": bool(choice == same),
            }

        work = {case: (lambda run=run: compared(run)) for case, run in runs.items()}
        results.measure_in_turn(log, work, repeats, prompts=n, threads=options.threads)
    path = results.write("selection_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER)
    print(tables.selection(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
