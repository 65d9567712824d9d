"""What a steered layer costs the host in a step of decoding: a hook written by hand, `fs.steer` by hooks, `fs.steer`
fused, each over the model without steering. Run alone on the machine:

    python benchmarks/host/layer.py

The model computes next to nothing (30 layers of hidden size 64, one row), so that the host's work is what is timed. The
ways take turns within a round, a few steps each, since a machine's speed drifts by more than what is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import results

import faststeer as fs
from faststeer.hf.cache import cache_argument

LAYERS, HIDDEN, PROMPT, TURN = 30, 64, 16, 16
NONE, BY_HAND, HOOKS, FUSED = "none", "hook by hand", "fs.steer by hooks", "fs.steer fused"


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def ways(of: Any, positions: str) -> dict[str, AbstractContextManager[Any]]:
    """What the steps run in."""
    v = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))

    @contextmanager
    def by_hand() -> Iterator[None]:
        handles = [layer.register_forward_hook(lambda module, args, output: output + v) for layer in of.model.layers]
        yield
        for handle in handles:
            handle.remove()

    plan = fs.Plan([fs.Add(v, 1.0, layers="all", at="resid_post", positions=positions)])
    steered = {HOOKS: fs.steer(of, plan, path="hooks"), FUSED: fs.steer(of, plan, path="fused")}
    hand = {BY_HAND: by_hand()} if positions == "all" else {}  # a hook that knows positions is no one-liner
    return {NONE: nullcontext(), **hand, **steered}


@torch.inference_mode()
def turn_us(of: Any) -> float:
    """Microseconds that `TURN` steps take, behind a prompt and two steps."""
    cache = DynamicCache(config=of.config)
    token: Tensor = torch.ones(1, PROMPT, dtype=torch.long)
    of(token, **{cache_argument(of): cache})
    token = token[:, :1]
    for step in range(TURN + 2):
        if step == 2:
            start = time.perf_counter_ns()
        of(token, **{cache_argument(of): cache})
    return (time.perf_counter_ns() - start) / 1e3


def rounds(of: Any, positions: str, n: int, steps: int) -> dict[str, list[float]]:
    """Microseconds per step of each way, by rounds."""
    times: dict[str, list[float]] = {}
    for number in range(n + 1):
        spent: dict[str, float] = {}
        for turn in range(steps // TURN):
            contexts = list(ways(of, positions).items())
            for way, context in reversed(contexts) if turn % 2 else contexts:
                with context:
                    spent[way] = spent.get(way, 0) + turn_us(of)
        if number:  # the first warms up
            for way, us in spent.items():
                times.setdefault(way, []).append(us / (steps // TURN * TURN))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=64, help=f"of each way in a round, by turns of {TURN}")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    arguments = parser.parse_args()
    results.refuse_reference()
    torch.set_num_threads(1)
    found, of = [], model()
    for positions in ("all", "generated"):
        times = rounds(of, positions, arguments.rounds, arguments.steps)
        for way, taken in times.items():
            over = [(ours - plain) / LAYERS for ours, plain in zip(taken, times[NONE], strict=True)]
            row = {"way": way, "positions": positions, "layers": LAYERS, "hidden": HIDDEN, "rounds": len(taken)}
            row |= {"step_us_median": round(median(taken), 1), "step_us_least": round(min(taken), 1)}
            row |= {"layer_us_median": round(median(over), 2)}
            row |= {"layer_us_of_least": round((min(taken) - min(times[NONE])) / LAYERS, 2)}
            found.append(row)
            print(row, flush=True)
    print("written to", results.write("host_layer", found, *([arguments.out] if arguments.out else [])))


if __name__ == "__main__":
    main()
