"""Milliseconds of a decode step on a GPU: models of real shape with random weights, the Engine and `generate`,
unsteered and steered.

    python benchmarks/generation/gpu.py --csv generation.csv --model llama-8b --who engine hooks --rows 64 1 256

Greedy, no end of sequence, prompts of random tokens. A step is what it takes longer to draw `new` tokens than one, per
token more: prefill is apart, and plans are in their slots before the clock starts. `percent_of_weights` compares a step
with reading the weights once at the bandwidth that a copy reaches in this process. "A vector per plan and layer": every
row has a plan of its own, with a vector of its own at every layer. Peak memory is that of PyTorch's allocator.

Without a GPU this is a dry run: tiny models on the CPU. It measures nothing, and everything that it writes says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import faststeer as fs
from faststeer import measure, ops
from faststeer.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[1]))
import records

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUN = "gpu" if CUDA else "dry run"
DTYPE = torch.bfloat16 if CUDA else torch.float32
PROMPT, NEW, REPEATS = (128, 64, 2) if CUDA else (5, 4, 1)
COPY_BYTES = 2**30 if CUDA else 2**12
# PyTorch reads it when it first attends: whether cuDNN, which plans anew for every length of the keys, comes last.
CUDNN_LAST = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"

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
# Option -> name, configuration.
MODELS = {
    "qwen-1.5b": ("Qwen2.5-1.5B", transformers.Qwen2Config, _QWEN),
    "llama-8b": ("Llama-3.1-8B", transformers.LlamaConfig, _LLAMA),
}
STEERINGS = ("unsteered", "every layer", "a vector per plan and layer")
WHO = ("engine", "hooks", "generate", "fused", "compiled")


# Models and plans -----------------------------------------------------------------------------------------------------


def config_of(option: str) -> tuple[str, Any]:
    name, kind, settings = MODELS[option]
    if not CUDA:
        name, settings = f"tiny {name.partition('-')[0]}", settings | _TINY
    return name, kind(**settings, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def build(config: Any) -> Any:
    """The model with random weights, made where it runs.

    Raises:
        MemoryError: its weights do not fit.
    """
    if CUDA:
        with torch.device("meta"):
            shapes = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
        needed, free = sum(p.nbytes for p in shapes.parameters()), torch.cuda.mem_get_info()[0]
        if needed > 0.9 * free:
            raise MemoryError(f"the weights have {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
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


def plans(config: Any, rows: int) -> dict[str, Any]:
    """Steering -> what the Engine takes: nothing, one plan for all rows, or one per row."""
    generator = torch.Generator().manual_seed(0)

    def vectors(n: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, config.hidden_size, generator=generator), dim=1)

    def own() -> fs.Plan:
        return fs.Plan([fs.Add(fs.SteeringVector(dict(enumerate(vectors(config.num_hidden_layers)))), 0.01)])

    one = fs.Plan([fs.Add(vectors(1)[0], 0.01, layers="all")])
    return dict(zip(STEERINGS, (None, one, [own() for _ in range(rows)]), strict=True))


@contextmanager
def hand_written(model: Any) -> Iterator[None]:
    """What a person writes: a Python forward hook on every layer."""
    vector = torch.ones(model.config.hidden_size, device=DEVICE, dtype=DTYPE)
    vector = 0.01 * vector / vector.norm()
    handles = [layer.register_forward_hook(lambda _m, _a, out: out + vector) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Cases ----------------------------------------------------------------------------------------------------------------


def cases(model: Any, who: str, rows: int, steerings: Sequence[str]) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """(steering, draw n tokens per row)."""
    ids = torch.randint(1, model.config.vocab_size, (rows, PROMPT), device=DEVICE)
    by_steering = plans(model.config, rows)
    if who == "engine":
        yield from engine_cases(model, ids.tolist(), {name: by_steering[name] for name in steerings})
        return

    def generate(n: int, **more: Any) -> None:
        settings = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "disable_compile": True} | more
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def inside(context: Callable[[], Any], **more: Any) -> Callable[[int], None]:
        def run(n: int) -> None:
            with context():
                generate(n, **more)

        return run

    if who == "hooks":
        yield "every layer", inside(lambda: hand_written(model))
    elif who == "fused":
        yield "every layer", inside(lambda: fs.steer(model, by_steering["every layer"], path="fused"))
    elif who == "compiled":
        yield "unsteered", inside(nullcontext, cache_implementation="static", disable_compile=not CUDA)
    else:
        yield "unsteered", inside(nullcontext)


def engine_cases(
    model: Any, prompts: list[list[int]], by_steering: dict[str, Any]
) -> Iterator[tuple[str, Callable[[int], Any]]]:
    engine: Engine | None = None

    def run(plan: Any, n: int) -> None:
        nonlocal engine
        if engine is None:
            engine = Engine(model, Untokenized(), max_batch=len(prompts), max_length=PROMPT + NEW + 1)
        answers = list(engine.generate(prompts, plan, max_new_tokens=n))
        wrong = [c for c in answers if len(c.token_ids) != n]
        if wrong or engine.max_batch < len(prompts):
            fault = f": {wrong[0].error}" if wrong else ""
            raise RuntimeError(
                f"{len(wrong)} completions of another length, {engine.max_batch} of {len(prompts)} rows{fault}"
            )

    for name, plan in by_steering.items():
        yield name, lambda n, plan=plan: run(plan, n)


# Measuring ------------------------------------------------------------------------------------------------------------


def measure_model(table: records.GpuTable, options: argparse.Namespace, end: float) -> None:
    """One record per case; what goes wrong with one is written down, and the others go on."""
    name, config = config_of(options.model)
    base = {"what": "step", "model": name, "dtype": str(DTYPE).removeprefix("torch."), "prompt": PROMPT, "new": NEW}
    base["attention"] = "cuDNN last" if CUDNN_LAST else "cuDNN as PyTorch orders it"
    base["back_end"] = ops.backend_for(DEVICE)
    if CUDA and base["back_end"] == "reference":
        table(base | {"failed": f"nothing but the reference works: {ops.states()['cuda'].reason}"})
        return
    try:
        copy, timing = measure.copy_bandwidth(DEVICE, COPY_BYTES, replays=3)
        copied = {"what": "copy", "op": "copy", "who": "torch", **asdict(timing), "gb_per_s": round(copy / 1e9, 1)}
        table(copied)
        model = build(config)
    except Exception as error:
        table(base | {"failed": records.reason(error)})
        return
    weights, begun = measure.weight_bytes(model), False
    for rows in options.rows if CUDA else sorted({min(rows, 3) for rows in options.rows}):
        for who in options.who:
            for steering, run in cases(model, who, rows, options.steerings):
                if begun and time.monotonic() > end:
                    print(f"out of time at {rows} rows, {who}, {steering}", flush=True)
                    return
                begun = True
                row = base | {"rows": rows, "who": who, "steering": steering}
                table(row | measured(run, rows, weights / copy))


def measured(run: Callable[[int], Any], rows: int, least: float) -> dict[str, Any]:
    """`least`: seconds of a step that does nothing but read the weights."""
    if CUDA:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        timing = measure.time_steps(run, NEW, DEVICE, repeats=REPEATS)
    except Exception as error:
        return {"failed": records.reason(error)}
    step = max(timing.step_ms, 1e-4)
    record = asdict(timing) | {"percent_of_weights": round(100 * least * 1e3 / step, 2)}
    record["tokens_per_second"] = round(rows / step * 1e3, 1)
    if CUDA:
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file that records are appended to")
    parser.add_argument("--stage", default="generation", help="what the records are labelled with")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--who", nargs="+", choices=WHO, default=["engine", "hooks"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 1, 256])
    parser.add_argument("--steerings", nargs="+", choices=STEERINGS, default=STEERINGS, help="of the Engine")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    options = parser.parse_args()
    table = records.GpuTable(options.csv, RUN, options.stage)
    measure_model(table, options, time.monotonic() + options.seconds)
    if table.failures:
        print(f"{table.failures} failed")
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
