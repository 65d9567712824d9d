"""Reading the activations that a vector is made of, on SmolLM2-135M and a CPU: seconds for the last token of every
prompt at all 30 layers.

    python benchmarks/extract/reading.py [--repeats 4] [--threads 2] [--quick]

About 3 minutes on two idle cores. Cases take turns: a plain loop over batches of 32 with `output_hidden_states`, as
people write it; the same with the logits of the last token alone; faststeer on whole prompts; faststeer with the common
prefix of the prompts run once. Work: `short`, 32 questions a side, most of whose tokens are the chat template's system
text; `long`, 8 texts a side of about 200 tokens, of which little is shared. Appended to out/bench/extraction.jsonl; at
the end benchmarks/results/extraction_smollm2.csv (`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faststeer.extract.reading import read_batches
from faststeer.hf.batching import encode, pad
from faststeer.hf.prefix import common_prefix

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables

BATCH = 32


def sides(work: str, count: int) -> tuple[list[str], list[str]]:
    first, second = smollm2.contrast(count)
    if work == "short":
        return first, second
    texts = smollm2.prompts(64)
    filler = [" ".join(texts[8 * i : 8 * i + 8] * 3) for i in range(count)]
    long_first, long_second = ([f"{a} {b}" for a, b in zip(filler, side, strict=True)] for side in (first, second))
    return long_first, long_second


def cases(model: Any, tokenizer: Any, rows: dict[str, list[list[int]]]) -> dict[str, Callable[[], None]]:
    @torch.no_grad()
    def plain(**logits: int) -> None:
        for ids in rows.values():
            for start in range(0, len(ids), BATCH):
                batch = pad(ids[start : start + BATCH], tokenizer.pad_token_id)
                states = model(**batch, output_hidden_states=True, use_cache=False, **logits).hidden_states
                torch.stack([state[:, -1] for state in states], 1)

    def ours(share: bool) -> None:
        for _ in read_batches(
            model, tokenizer, rows, at="resid_pre", positions=[-1], batch_size=BATCH, progress=False, share_prefix=share
        ):
            pass

    return {
        "plain loop": plain,
        "plain loop, last logits": lambda: plain(logits_to_keep=1),
        "faststeer, whole prompts": lambda: ours(False),
        "faststeer": lambda: ours(True),
    }


def shared(model: Any, tokenizer: Any, rows: dict[str, list[list[int]]]) -> int:
    """How many tokens the prompts of a side share, 0 where they are not shared."""
    return common_prefix(model, rows["positive"], 1, tokenizer.pad_token_id).length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="try it: few prompts, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = {"short": 32, "long": 8}
    if options.quick:
        options.repeats, counts = 1, {"short": 8, "long": 2}
    log = results.Log(
        results.LOGS / f"{'quick_' * options.quick}extraction.jsonl",
        {"counts": counts, "threads": options.threads},
        options.fresh,
    )
    model, tokenizer = smollm2.load()
    for work, count in counts.items():
        rows = {
            side: encode(tokenizer, texts)
            for side, texts in zip(("positive", "negative"), sides(work, count), strict=True)
        }
        every = [len(ids) for side in rows.values() for ids in side]
        where = {
            "work": work, "prompts": len(every), "tokens_each": round(sum(every) / len(every)),
            "shared": shared(model, tokenizer, rows), "threads": options.threads,
        }  # fmt: skip
        results.measure_in_turn(log, cases(model, tokenizer, rows), options.repeats, **where)
    path = results.write("extraction_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER)
    print(tables.extraction(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
