"""Tokens per second on a GPU: models of real shape with random weights, `generate` against the Engine, unsteered and
steered.

    python benchmarks/generation/gpu.py --out results --seconds 120

Greedy, every row `new` tokens and no end of sequence, so that all methods do the same work; prompts are random tokens.
Every measurement is the best of its repeats after one that warms up (captures graphs, compiles). `percent_of_weights`
compares the steps with what reading the weights once per step would take at the bandwidth that a copy reaches in this
run; prefill is part of the time. Peak memory is that of PyTorch's allocator. The most important cases come first: at
the end of its time (`--seconds`, and a part of it for each model) the program begins nothing new and says so.

Without a GPU this is a dry run: tiny models on the CPU. It measures nothing, and everything that it writes says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import faststeer as fs
from faststeer.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAME = "generation_gpu" if CUDA else "dry_run_generation"
LABEL = "gpu" if CUDA else "dry run on the CPU, measures nothing"
DTYPE = torch.bfloat16 if CUDA else torch.float32
REPEATS = 2 if CUDA else 1

# What the published configurations say.
_QWEN = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "Qwen2.5-1.5B": (transformers.Qwen2Config, _QWEN),
    "Llama-3.1-8B": (transformers.LlamaConfig, _LLAMA),
}
if not CUDA:
    MODELS = {"tiny Qwen2": (transformers.Qwen2Config, _TINY), "tiny Llama": (transformers.LlamaConfig, _TINY)}


@dataclass(frozen=True)
class Workload:
    rows: int
    prompt: int
    new: int


# The first is what the goals speak of.
WORKLOADS = [Workload(rows, 128, 128) for rows in (64, 1, 256, 8, 512)] + [Workload(64, 512, 512)]
if not CUDA:
    WORKLOADS = [Workload(3, 5, 4), Workload(1, 5, 4)]
COMPILED_ROWS = (1, 64) if CUDA else (3,)  # numbers of rows at which compiling is waited for
FEW_PLANS = 256


def build(name: str) -> Any:
    """The model with random weights, made where it runs."""
    kind, settings = MODELS[name]
    config = kind(**settings, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    model.generation_config.eos_token_id = []
    return model


class Untokenized:
    """Prompts are token ids, and nobody reads the text."""

    chat_template = eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


# Cases ----------------------------------------------------------------------------------------------------------------


def plans(model: Any, rows: int) -> dict[str, Any]:
    """Name -> what the Engine is given: a plan for all rows, or one per row."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(config.hidden_size, generator=generator)
    vector /= vector.norm()
    everywhere: dict[str, Any] = {"layers": "all"}

    def own(i: int) -> fs.Plan:
        return fs.Plan([fs.Add(vector, 0.01 + i / 10_000, **everywhere)])

    different = [own(i) for i in range(rows)]
    found = {
        "unsteered": None,
        "every layer": fs.Plan([fs.Add(vector, 0.01, **everywhere)]),
        "one layer": fs.Plan([fs.Add(vector, 0.01, layers=config.num_hidden_layers // 2)]),
        "ablation, three points": fs.Plan(
            [fs.Ablate(vector, **everywhere, at=("resid_pre", "resid_mid", "resid_post"))]
        ),
    }
    if rows > 1:
        found["a plan per row"] = different
    if rows > FEW_PLANS:
        found[f"{FEW_PLANS} plans"] = [different[i % FEW_PLANS] for i in range(rows)]
    return found


@contextmanager
def hand_written(model: Any, vector: Tensor) -> Iterator[None]:
    """What a person writes: a Python forward hook on every layer."""
    handles = [layer.register_forward_hook(lambda _m, _a, out: out + 0.01 * vector) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cases(model: Any, workload: Workload, ids: Tensor) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(who, steering, run): the ones that the goals compare first."""
    rows = workload.rows

    def generate(**more: Any) -> None:
        settings = {"max_new_tokens": workload.new, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings | more)

    def with_hooks() -> None:
        vector = torch.ones(model.config.hidden_size, device=DEVICE, dtype=DTYPE)
        with hand_written(model, vector / vector.norm()):
            generate()

    prompts = ids.tolist()
    engine: Engine | None = None

    def run_engine(given: Any) -> None:
        nonlocal engine
        if engine is None:
            engine = Engine(model, Untokenized(), max_batch=rows, max_length=workload.prompt + workload.new + 1)
        answered = list(engine.generate(prompts, given, max_new_tokens=workload.new))
        wrong = [c for c in answered if len(c.token_ids) != workload.new]
        if wrong or engine.max_batch < rows:
            raise RuntimeError(f"{len(wrong)} completions of another length, {engine.max_batch} of {rows} rows")

    wanted = plans(model, rows)
    order = ["unsteered", "every layer", *(name for name in wanted if name not in ("unsteered", "every layer"))]
    yield "Engine", order[0], lambda: run_engine(wanted[order[0]])
    yield "Engine", order[1], lambda: run_engine(wanted[order[1]])
    yield "generate, hooks", "every layer", with_hooks
    for name in order[2:]:
        yield "Engine", name, lambda name=name: run_engine(wanted[name])
    engine = None
    yield "generate", "unsteered", generate

    def fused() -> None:
        with fs.steer(model, wanted["every layer"], path="fused"):
            generate()

    yield "generate, fs.steer fused", "every layer", fused
    if rows in COMPILED_ROWS:
        compiled = {"cache_implementation": "static", "disable_compile": not CUDA}
        yield "generate, static + compile", "unsteered", lambda: generate(**compiled)


# Measuring ------------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any], out_of_time: Callable[[], bool]) -> list[float]:
    found: list[float] = []
    for repeat in range(-1, REPEATS):
        if found and out_of_time():
            break
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if repeat >= 0:
            found.append(time.perf_counter() - start)
    return found


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def copy_bytes_per_second() -> float:
    """Of a copy of 1 GiB, read and written."""
    source = torch.empty(2**29 if CUDA else 2**10, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def weight_bytes(model: nn.Module) -> int:
    """What every step reads: all parameters but an embedding that serves the input alone."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore
    return sum(p.nbytes for p in model.parameters() if p is not embedding or embedding is head)


def measure(name: str, out_of_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """One record per case; what goes wrong with one is written down, and the others go on."""
    model, bandwidth = build(name), copy_bytes_per_second()
    weights = weight_bytes(model)
    for workload in WORKLOADS:
        ids = torch.randint(1, model.config.vocab_size, (workload.rows, workload.prompt), device=DEVICE)
        for who, steering, run in cases(model, workload, ids):
            record: dict[str, Any] = {"run": LABEL, "model": name, "dtype": str(DTYPE), "rows": workload.rows}
            record |= {"prompt": workload.prompt, "new": workload.new, "who": who, "steering": steering}
            if out_of_time():
                yield record | {"error": "out of time"}
                return
            if CUDA:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                best = min(seconds_of(run, out_of_time))
            except Exception as error:
                yield record | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
                continue
            rate = workload.rows * workload.new / best
            yield record | {
                "seconds": round(best, 5),
                "tokens_per_second": round(rate, 1),
                "percent_of_weights": round(100 * workload.new * weights / bandwidth / best, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if CUDA else "",
            }


def with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`to_unsteered`: to the Engine unsteered, or to `generate` unsteered, of the same model and workload."""

    def key(record: dict[str, Any], who: str) -> tuple[Any, ...]:
        kind = "Engine" if who == "Engine" else "generate"
        return *(record[name] for name in ("model", "rows", "prompt", "new")), kind

    plain = {
        key(r, r["who"]): r["tokens_per_second"]
        for r in records
        if r["who"] in ("Engine", "generate") and r["steering"] == "unsteered" and "error" not in r
    }
    found = []
    for r in records:
        base = plain.get(key(r, r["who"]))
        ratio = "" if base is None or "error" in r else round(r["tokens_per_second"] / base, 4)
        found.append(r | {"to_unsteered": ratio})
    return found


# The table ------------------------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> str:
    header = f"{'generation' + ('' if CUDA else f' ({LABEL})'):56}  tokens/s  to unsteered  % of weights  peak GiB"
    lines = [header]
    for r in with_ratios(records):
        what = f"{r['model']}, {r['rows']} rows, {r['prompt']}+{r['new']}: {r['who']}, {r['steering']}"
        if "error" in r:
            lines.append(f"{what:66}  {r['error'][:100]}")
        else:
            cells = (
                f"{r['tokens_per_second']:8}  {r['to_unsteered']:12}  {r['percent_of_weights']:12}  {r['peak_gib']:8}"
            )
            lines.append(f"{what:66}  {cells}")
    return "\n".join(lines)


def write(records: list[dict[str, Any]], folder: Path, commit: str | None) -> Path:
    path = results.write(NAME, with_ratios(records), folder)
    beside = path.with_name(f"{NAME}.machine.json")
    found = {"run": LABEL, "transformers": transformers.__version__} | ({"commit": commit} if commit else {})
    beside.write_text(json.dumps(json.loads(beside.read_text()) | found, indent=2) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--commit", help="what to write down as the commit, where there is no git")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if not CUDA and arguments.out == results.FOLDER:
        parser.error("there is no GPU: a dry run measures nothing, so give it another --out")
    start, records = time.monotonic(), []
    for done, name in enumerate(MODELS, 1):
        end = start + arguments.seconds * done / len(MODELS)
        for record in measure(name, lambda end=end: time.monotonic() > end):  # type: ignore[misc]
            records.append(record)
            write(records, arguments.out, arguments.commit)  # what is there is kept should this be stopped
        if CUDA:
            torch.cuda.empty_cache()
    text = table(records)
    if arguments.table:
        arguments.table.write_text(text + "\n")
    print(f"{text}\n\nwritten to {arguments.out}")
    cut = [r for r in records if r.get("error") == "out of time"]
    for r in cut:
        print(f"out of time: {r['model']} from {r['rows']} rows, {r['who']}, {r['steering']} on")
    return 1 if any("error" in r and r not in cut for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
