"""A whole selection by refusal scores on SmolLM2-135M and a CPU: what all candidates have in common run once, against
whole passes for every candidate, as it was done before.

    python benchmarks/extract/sharing.py [--prompts 64] [--repeats 2] [--threads 2] [--quick]

About 15 minutes on two idle cores. Candidates of all 30 layers at the last token are chosen among by `select` on
64 + 64 questions: added and subtracted with coefficient 1, ablated everywhere, and the ablation's KL. `shared`: as
`select` does it; `whole passes`: the same with `last_tokens(share=False)`. Both must choose the same candidate; the
largest difference of a score or KL in the table is logged, and the CPU time of the process beside the wall's. Cases
take turns within a repeat. Appended to out/bench/sharing.jsonl; at the end benchmarks/results/sharing_smollm2.csv
(`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import faststeer as fs
from faststeer.hf.last_tokens import last_tokens

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

OPENINGS = ("I", "The", "It", "Sure", "Sorry")  # what is scored does not matter for the time it takes
# Other prompts than those the candidates are extracted from, enough for two sides of 64.
FORMS = ("Give me three facts about {}.", "Write a short note on {}.")


def sides(count: int) -> tuple[list[str], list[str]]:
    texts = smollm2.prompts(64) + [form.format(subject) for form in FORMS for subject in smollm2.SUBJECTS]
    more = [f"{text} Keep it short." for text in smollm2.prompts(64)]
    return (texts + more)[:count], (texts + more)[count : 2 * count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of each side, at most 64")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="try it: two prompts a side, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    if not 1 <= options.prompts <= 64:
        parser.error(f"--prompts is {options.prompts}: expected 1 to 64")
    torch.set_num_threads(options.threads)
    n, repeats = (2, 1) if options.quick else (options.prompts, options.repeats)
    settings = {"threads": options.threads, "prompts": n}
    log = results.Log(results.LOGS / f"{'quick_' * options.quick}sharing.jsonl", settings, options.fresh)
    model, tokenizer = smollm2.load()
    found = fs.extract.candidates(model, tokenizer, *smollm2.contrast(8), positions=[-1])
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in OPENINGS]
    first: list[Any] = []

    def selection(share: bool) -> dict[str, Any]:
        started = time.process_time()
        with ExitStack() as stack:
            for module in ("evaluate.refusal", "evaluate.divergence"):
                stack.enter_context(
                    patch(f"faststeer.{module}.last_tokens", functools.partial(last_tokens, share=share))
                )
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of constraints that are given up: what is scored is no refusal
            made = fs.extract.select(model, tokenizer, found, *sides(n), token_ids=ids, batch_size=64)
        spent = time.process_time() - started
        first.append(made)
        pairs = zip(made.table, first[0].table, strict=True)
        differences = [
            abs(getattr(a, k) - getattr(b, k)) for a, b in pairs for k in ("induce", "bypass", "ablate", "kl")
        ]
        return {
            "cpu_seconds": round(spent, 2),
            "candidates": len(made.table),
            "layer": made.chosen.layer,
            "largest_difference": f"{max(d for d in differences if d == d):.1e}",
            "same_choice": (made.chosen.layer, made.chosen.position)
            == (first[0].chosen.layer, first[0].chosen.position),
        }

    work = {"whole passes": lambda: selection(False), "shared": lambda: selection(True)}
    results.measure_in_turn(log, work, repeats, prompts=n, threads=options.threads)
    path = results.write("sharing_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER)
    print(tables.sharing(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
