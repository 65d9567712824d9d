"""GPU time of the ops against copy bandwidth and against what people use today.

Each time is the median over replays of one CUDA graph that runs the op many times over rotated buffers: launches are
free and the L2 cache is cold, as it is between the layers of a model. Ratios compare runs of this one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import STEERINGS, Case, case, eager_hook
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

from faststeer import ops

ROWS = (1, 16, 64, 256, 512, 1024, 4096, 16384, 32768)
HIDDEN = (2048, 4096, 8192)
DTYPE = torch.bfloat16
EPS = 1e-6
ROTATED_BYTES = 512 * 2**20  # several times any L2
REPLAYS = 7

Run = Callable[[Case, Tensor, Tensor], Any]


def timed(run: Callable[[int], Any], n_sets: int) -> float:
    """Seconds per call: the median replay of a graph that calls `run(0..n_sets - 1)` often enough to time it."""
    calls = max(n_sets, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(3, n_sets)):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % n_sets)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def rotated(x: Tensor, residual: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Copies of a pair of buffers, together larger than the cache."""
    n = max(1, min(64, ROTATED_BYTES // max(2 * x.nbytes, 1)))
    return [(x.clone(), residual.clone()) for _ in range(n)]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda i: target.copy_(source), 1)


def ours(backend: ops.Backend) -> dict[str, Run]:
    """The ops of one back end, on one pair of buffers."""

    def steer_(c: Case, x: Tensor, residual: Tensor) -> Any:
        return ops.steer_(x, c.tables, c.rows, backend=backend)

    def add_steer(c: Case, x: Tensor, residual: Tensor) -> Any:
        return ops.add_steer(x, residual, c.tables, c.rows, backend=backend)

    def add_steer_rmsnorm(c: Case, x: Tensor, residual: Tensor) -> Any:
        return ops.add_steer_rmsnorm(x, residual, c.weight, EPS, 0.0, False, c.tables, c.rows, backend=backend)

    return {"steer_": steer_, "add_steer": add_steer, "add_steer_rmsnorm": add_steer_rmsnorm}


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as transformers writes it."""
    h = hidden.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(hidden.dtype)


def baselines(steering: str, hidden: int) -> dict[tuple[str, str], Run]:
    """(op, who) -> the same work by others; steering only where a hook is what people would write."""
    found: dict[tuple[str, str], Run] = {}
    if steering in ("add", "ablate"):
        hook = eager_hook(steering, hidden, DTYPE, "cuda")
        compiled = torch.compile(hook, dynamic=False)
        found["steer_", "eager hook"] = lambda c, x, residual: hook(x)
        found["steer_", "compiled hook"] = lambda c, x, residual: compiled(x)

        def whole(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            h = hook(x + residual)
            return norm(h, weight), h

        whole_compiled = torch.compile(whole, dynamic=False)
        found["add_steer_rmsnorm", "eager hook"] = lambda c, x, residual: whole(x, residual, c.weight)
        found["add_steer_rmsnorm", "compiled hook"] = lambda c, x, residual: whole_compiled(x, residual, c.weight)
    elif steering == "none":

        def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            h = x + residual
            return norm(h, weight), h

        compiled_plain = torch.compile(plain, dynamic=False)
        found["add_steer_rmsnorm", "eager"] = lambda c, x, residual: plain(x, residual, c.weight)
        found["add_steer_rmsnorm", "compiled"] = lambda c, x, residual: compiled_plain(x, residual, c.weight)
        found["add_steer_rmsnorm", "torch add + rms_norm"] = lambda c, x, residual: torch.nn.functional.rms_norm(
            x.add_(residual), (hidden,), c.weight, EPS
        )
        found |= _others()
    return found


def _others() -> dict[tuple[str, str], Run]:
    """vLLM's and flashinfer's fused add + RMSNorm, where they can be imported; both write in place."""
    found: dict[tuple[str, str], Run] = {}
    if importlib.util.find_spec("vllm"):
        from vllm import _custom_ops

        found["add_steer_rmsnorm", "vllm"] = lambda c, x, residual: _custom_ops.fused_add_rms_norm(
            x, residual, c.weight, EPS
        )
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        found["add_steer_rmsnorm", "flashinfer"] = lambda c, x, residual: flashinfer.norm.fused_add_rmsnorm(
            x, residual, c.weight, EPS
        )
    return found


def bytes_moved(op: str, rows: int, hidden: int, steering: str) -> int:
    """The fewest bytes an op can move: every row in and out once; the vectors of one plan stay in the cache."""
    transfers = {"steer_": 2, "add_steer": 3, "add_steer_rmsnorm": 4}[op]
    if op == "steer_" and steering == "none":
        return 0
    return transfers * rows * hidden * DTYPE.itemsize


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """One record per op, implementation, shape, steering and number of plans."""
    bandwidth = copy_bandwidth()
    yield {"op": "copy", "who": "torch", "gb_per_s": round(bandwidth / 1e9, 1)}
    backends = [name for name in ("cuda", "triton") if ops.states()[name].works]  # type: ignore[index]
    shapes = itertools.product(HIDDEN[1:2] if quick else HIDDEN, ROWS[::3] if quick else ROWS)
    for hidden, rows in shapes:
        for steering, plans in itertools.product(STEERINGS, (1, min(rows, 1024))):
            if (plans == 1 and rows > 1) or (steering != "none" and rows > 1) or rows == 1:
                yield from _measure_case(hidden, rows, steering, plans, backends, bandwidth)


def _measure_case(
    hidden: int, rows: int, steering: str, plans: int, backends: list[Any], bandwidth: float
) -> Iterator[dict[str, Any]]:
    made = case(steering, rows, hidden, DTYPE, "cuda", n_plans=plans)
    sets = rotated(made.x, made.residual)
    runs = {(op, str(name)): run for name in backends for op, run in ours(name).items()}
    if plans == 1 and hidden == HIDDEN[1]:
        runs |= baselines(steering, hidden)
    for (op, who), run in runs.items():
        seconds = timed(lambda i, run=run: run(made, *sets[i]), len(sets))  # type: ignore[misc]
        moved = bytes_moved(op, rows, hidden, steering)
        yield {
            "op": op,
            "who": who,
            "steering": steering,
            "plans": plans,
            "rows": rows,
            "hidden": hidden,
            "dtype": str(DTYPE),
            "us": round(seconds * 1e6, 3),
            "gb_per_s": round(moved / seconds / 1e9, 1),
            "percent_of_copy": round(100 * moved / seconds / bandwidth, 1),
        }


def host_cost(calls: int = 2000) -> Iterator[dict[str, Any]]:
    """Microseconds of host time per eager call, the GPU left behind."""
    made = case("add", 1, 64, DTYPE, "cuda")
    for name in ("cuda", "triton"):
        if not ops.states()[name].works:  # type: ignore[index]
            continue
        op = ops.dispatch._op("steer_", name)  # type: ignore[arg-type]
        arguments = made.x, *ops.dispatch._tensors(made.tables, made.rows, None), None
        times = []
        for _ in range(9):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls // 20):
                op(*arguments)
            times.append((time.perf_counter() - start) / (calls // 20))
        yield {
            "op": "steer_ host cost",
            "who": name,
            "rows": 1,
            "hidden": 64,
            "us": round(statistics.median(times) * 1e6, 2),
        }


def summary(records: list[dict[str, Any]]) -> Table:
    """The lines that the goals speak of: bandwidth at 16k rows, and steered against unsteered."""
    table = Table("op", "who", "rows", "hidden", "plans", *STEERINGS, title="us (and % of copy bandwidth)")
    groups: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in records:
        if "steering" in r and r["rows"] in (1, 64, 256, 16384) and r["hidden"] == HIDDEN[1]:
            key = r["op"], r["who"], r["rows"], r["hidden"], r["plans"]
            groups.setdefault(key, {})[r["steering"]] = f"{r['us']:.1f} ({r['percent_of_copy']:.0f})"
    for key, times in sorted(groups.items(), key=str):
        table.add_row(*map(str, key), *(times.get(s, "") for s in STEERINGS))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--quick", action="store_true", help="one hidden size, a third of the rows")
    arguments = parser.parse_args()
    found = [*measure(arguments.quick), *host_cost()]
    path = results.write("kernels_gpu", found, arguments.out)
    Console(width=150).print(summary(found), f"written to {path}")
