"""Seconds for generation with frozen attention patterns (QK), demo model, CPU: with caches against recomputing the
whole sequences for every token, which is how the paper's authors do it.

    OMP_NUM_THREADS=1 python benchmarks/observe/freezing.py [--rows 16] [--new 256] [--write]

All cases draw the same greedy tokens, no row ends early, logits are computed at the last token alone.

- `with caches`: `model.generate` inside `fs.observe.freeze(model, plan, "qk")`.
- `recomputing, one pass`: the same without a cache: both halves in one batch, fast attention kernels. The strongest
  form of recomputing, and already this project's.
- `recomputing, two passes`: an unsteered pass in eager attention whose patterns are kept, then a steered one over which
  they are put: the published way, written plainly. Timed on one in `--every` tokens, evenly, and multiplied: a token's
  cost hangs on its place alone.
- `steered`, `unsteered`: plain generation with a cache, for comparison.
"""

from __future__ import annotations

import argparse
import importlib
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

LAYER = 2


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
    layer = model.model.layers[LAYER]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))
    try:
        with patterns_put(model, patterns):
            return model(**given, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()


@torch.no_grad()
def measure(rows: int, new: int, every: int, repeats: int) -> Iterator[dict[str, Any]]:
    model, tokenizer = fs.demo.load()
    harmful, harmless = fs.demo.prompts("refusal", "train")
    vector = fs.extract.dim(model, tokenizer, harmful[:64], harmless[:64])[LAYER]
    batch = pad(encode(tokenizer, fs.demo.prompts("refusal", "test")[0][:rows]), 0)
    plan = fs.Plan([fs.Add(vector, -1.0, layers=LAYER, at="resid_pre")])
    eager, _ = fs.demo.load()
    eager.set_attn_implementation("eager")

    def timed(case: str, run: Callable[[], Any], repeat: int, times: int = 1) -> tuple[dict[str, Any], Any]:
        start = time.perf_counter()
        found = run()
        seconds = (time.perf_counter() - start) * times
        row = {"case": case, "rows": rows, "prompt": batch["input_ids"].shape[1], "new_tokens": new, "repeat": repeat}
        print(f"{case:28} {seconds:8.2f} s", file=sys.stderr)
        return {**row, "seconds": f"{seconds:.3f}"}, found

    sequences = torch.empty(0)
    for repeat in range(-1, repeats):  # the first warms up
        with fs.observe.freeze(model, plan, "qk"):
            row, sequences = timed("with caches", lambda: generated(model, batch, new), repeat)
        with fs.steer(model, plan):
            steered, _ = timed("steered", lambda: generated(model, batch, new), repeat)
        unsteered, _ = timed("unsteered", lambda: generated(model, batch, new), repeat)
        if repeat >= 0:
            yield from (row, steered, unsteered)
    with fs.observe.freeze(model, plan, "qk") as frozen:
        frozen.set_prompt(batch["input_ids"].shape[1])
        row, again = timed(
            "recomputing, one pass", lambda: recomputed(lambda *given: one_pass(model, *given), batch, new), 0
        )
    agree = float((again == sequences)[:, -new:].double().mean())
    yield {**row, "tokens_as_with_caches": f"{agree:.4f}"}
    mask = torch.cat([batch["attention_mask"], torch.ones(rows, new, dtype=torch.long)], 1)
    width, seen = batch["input_ids"].shape[1], []

    def some() -> None:
        for step in range(every // 2, new, every):
            given = sequences[:, : width + step], mask[:, : width + step]
            seen.append((two_passes(eager, -vector, *given).argmax(-1) == sequences[:, width + step]).double().mean())

    row, _ = timed("recomputing, two passes", some, 0, every)
    yield {**row, "tokens_as_with_caches": f"{float(torch.stack(seen).mean()):.4f}", "timed_one_in": every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/freezing_cpu.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = list(measure(options.rows, options.new, options.every, options.repeats))
    for row in found:
        print(row)
    if options.write:
        print(results.write("freezing_cpu", found))


if __name__ == "__main__":
    main()
