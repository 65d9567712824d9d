"""Seconds for generation with frozen attention patterns (QK), SmolLM2-135M, CPU: with caches against recomputing the
whole sequences for every token, which is how the paper's authors do it.

    python benchmarks/observe/freezing.py [--rows 2] [--new 64] [--repeats 2] [--quick]

About 3 minutes on two idle cores. Cases take turns. All cases draw the same greedy tokens, no row ends early, logits
are computed at the last token alone.

- `with caches`: `model.generate` inside `fs.observe.freeze(model, plan, "qk")`.
- `recomputing, one pass`: the same without a cache: both halves in one batch, fast attention kernels. The strongest
  form of recomputing, and already this project's.
- `recomputing, two passes`: an unsteered pass in eager attention whose patterns are kept, then a steered one over which
  they are put: the published way, written plainly. Timed on one in `--every` tokens, evenly, and multiplied: a token's
  cost hangs on its place alone.
- `steered`, `unsteered`: plain generation with a cache, for comparison.

Appended to out/bench/freezing.jsonl; at the end benchmarks/results/freezing_smollm2.csv (`--quick`: in out/bench).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import faststeer as fs
from faststeer.hf.batching import encode, pad

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2
import tables


def generated(model: Any, batch: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    given = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(**given, **settings, pad_token_id=0)


def recomputed(next_logits: Callable[..., torch.Tensor], batch: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(new):
        token = next_logits(ids, mask).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


def one_pass(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits[
        :, -1
    ]


@contextmanager
def patterns_put(model: Any, patterns: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Eager attention over patterns that are given, layer by layer."""
    modeling = importlib.import_module(type(model).__module__)
    own = modeling.eager_attention_forward

    def put(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (patterns[module.layer_idx] @ value).transpose(1, 2).contiguous(), None

    modeling.eager_attention_forward = put
    try:
        yield
    finally:
        modeling.eager_attention_forward = own


def two_passes(model: Any, vector: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    patterns = model(**given, logits_to_keep=1, output_attentions=True).attentions
    layer = model.model.layers[smollm2.LAYER]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))
    try:
        with patterns_put(model, patterns):
            return model(**given, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()


@torch.no_grad()
def cases(model: Any, eager: Any, tokenizer: Any, rows: int, new: int, every: int) -> dict[str, Callable[[], Any]]:
    """Each case generates once; what recomputes says which part of its tokens are those of the caches."""
    direction = fs.extract.dim(model, tokenizer, *smollm2.contrast(8))[smollm2.LAYER]
    vector = -direction
    batch = pad(encode(tokenizer, smollm2.prompts(rows)), tokenizer.pad_token_id)
    width = batch["input_ids"].shape[1]
    plan = fs.Plan([fs.Add(vector, 1.0, layers=smollm2.LAYER, at="resid_pre")])
    sequences = torch.empty(0)

    def shape(**more: Any) -> dict[str, Any]:
        return {"rows": rows, "prompt": width, "new_tokens": new, **more}

    @torch.no_grad()
    def with_caches() -> dict[str, Any]:
        nonlocal sequences
        with fs.observe.freeze(model, plan, "qk"):
            sequences = generated(model, batch, new)
        return shape()

    @torch.no_grad()
    def steered() -> dict[str, Any]:
        with fs.steer(model, plan):
            generated(model, batch, new)
        return shape()

    @torch.no_grad()
    def unsteered() -> dict[str, Any]:
        generated(model, batch, new)
        return shape()

    @torch.no_grad()
    def once() -> dict[str, Any]:
        with fs.observe.freeze(model, plan, "qk") as frozen:
            frozen.set_prompt(width)
            again = recomputed(lambda *inputs: one_pass(model, *inputs), batch, new)
        return shape(tokens_as_with_caches=round(float((again == sequences)[:, width:].double().mean()), 4))

    @torch.no_grad()
    def twice() -> dict[str, Any]:
        mask = torch.cat([batch["attention_mask"], torch.ones(rows, new, dtype=torch.long)], 1)
        same = []
        start = time.perf_counter()
        for step in range(every // 2, new, every):
            inputs = sequences[:, : width + step], mask[:, : width + step]
            same.append((two_passes(eager, vector, *inputs).argmax(-1) == sequences[:, width + step]).double().mean())
        seconds = (time.perf_counter() - start) * every
        share = round(float(torch.stack(same).mean()), 4)
        return shape(tokens_as_with_caches=share, timed_one_in=every, seconds=round(seconds, 4))

    return {
        "with caches": with_caches,
        "steered": steered,
        "unsteered": unsteered,
        "recomputing, one pass": once,
        "recomputing, two passes": twice,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="try it: 8 tokens, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    if options.quick:
        options.new, options.every, options.repeats = 8, 4, 1
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("rows", "new", "every", "threads")}
    log = results.Log(results.LOGS / f"{'quick_' * options.quick}freezing.jsonl", settings, options.fresh)
    model, tokenizer = smollm2.load()
    eager, _ = smollm2.load()
    eager.set_attn_implementation("eager")
    runs = cases(model, eager, tokenizer, options.rows, options.new, options.every)
    runs["with caches"]()  # warms up, and makes the tokens that the others are compared with
    results.measure_in_turn(log, runs, options.repeats, threads=options.threads)
    path = results.write("freezing_smollm2", log.rows, results.LOGS if options.quick else results.FOLDER)
    print(tables.freezing(results.read(path)))
    print(path)


if __name__ == "__main__":
    main()
