"""GPU time of the ops against copy bandwidth and against what people use today.

    python benchmarks/kernels/gpu.py --out results --seconds 180

Each time is the median over replays of one CUDA graph, in which every call has rows, tables and results of its own and
finds none of them in the L2 cache: launches are free and memory is as cold as it is between the layers of a model.
Ratios compare runs of one process. What counts as moved is what an op cannot do without: each row and each vector read
once, each result written once.

Without a GPU this is a dry run: tiny sizes, one repetition, on the CPU. It measures nothing, and everything that it
writes says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import STEERINGS, Case, eager_hook, rows_of, tables
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

from faststeer import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAME = "kernels_gpu" if CUDA else "dry_run_kernels"
LABEL = "gpu" if CUDA else "dry run on the CPU, measures nothing"
BACKENDS = ("cuda", "triton") if CUDA else ("cpu", "triton")
OPS = ("steer_", "add_steer", "add_steer_rmsnorm", "steer_pair_")  # the last one leaves zeros in x
IN_PLACE = ("steer_", "steer_pair_")  # they write only the rows that something acts on
DTYPE = torch.bfloat16
EPS = 1e-6
MAIN = 4096 if CUDA else 64  # the hidden size at which everything is measured
MANY_ROWS = 16384 if CUDA else 5
MAX_PLANS = 1024
REPLAYS = 11 if CUDA else 1
MAX_CALLS, REPLAYED_BYTES = (64, 2**30) if CUDA else (1, 0)

Run = Callable[[Case], Any]


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int


def shapes(full: bool) -> list[Shape]:
    """The core grid has every number of rows at one hidden size and a few at others; the full one has all."""
    if not CUDA:
        return [Shape(1, MAIN), Shape(MANY_ROWS, MAIN)]
    every, few = (1, 16, 64, 256, 512, 1024, 4096, 16384, 32768), (1, 64, 512, 16384)
    if full:
        every = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
        return [Shape(rows, hidden) for hidden in (2048, 3584, 4096, 5120, 8192) for rows in every]
    found = [Shape(rows, hidden) for hidden in (MAIN, 8192, 2048) for rows in (every if hidden == MAIN else few)]
    return sorted(found, key=lambda shape: (shape.hidden != MAIN, shape.rows not in few))


# Time -----------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[int], Any], calls: int) -> dict[str, Any]:
    """Microseconds per call: median and quartiles over the replays of a graph of run(0), ..., run(calls - 1), after
    something else has filled the cache."""
    seconds = _graph_seconds(run, calls) if CUDA else _host_seconds(run, calls)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    found = {"us": middle, "us_low": low, "us_high": high}
    return {name: round(value * 1e6, 3) for name, value in found.items()} | {"calls": calls, "replays": len(seconds)}


def _graph_seconds(run: Callable[[int], Any], calls: int) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads what the capture must not
        for i in range(min(3, calls)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(i) for i in range(calls)]  # or each call would write where the last one did
    seconds = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _fill_cache()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / calls)
    del kept
    return seconds


def _host_seconds(run: Callable[[int], Any], calls: int) -> list[float]:
    start = time.perf_counter()
    for i in range(calls):
        run(i)
    return [(time.perf_counter() - start) / calls]


_filler: list[Tensor] = []


def _fill_cache() -> None:
    """Read several times what the L2 cache holds. Not written, which would have to be written back later."""
    if not _filler:
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        _filler.append(torch.ones(max(size, 2**26) // 4, dtype=torch.int32, device=DEVICE))
    _filler[0].amax()


def copy_bandwidth() -> dict[str, Any]:
    """A copy of 1 GiB: the bytes read and written per second that everything else is compared with."""
    source = torch.randn(2**29 if CUDA else 2**10, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    found = timed(lambda i: target.copy_(source), 4 if CUDA else 1)
    return {"op": "copy 1 GiB", "who": "torch"} | found | {"gb_per_s": _gb_per_s(2 * source.nbytes, found)}


def _gb_per_s(n_bytes: int, found: dict[str, Any]) -> float:
    return round(n_bytes / max(found["us"], 1e-3) / 1e3, 1)


# What is timed --------------------------------------------------------------------------------------------------------


def ours(op: str, backend: ops.Backend) -> Run:
    if op == "steer_":
        return lambda c: ops.steer_(c.x, c.tables, c.rows, backend=backend)
    if op == "add_steer":
        return lambda c: ops.add_steer(c.x, c.residual, c.tables, c.rows, backend=backend)
    if op == "steer_pair_":
        return lambda c: ops.steer_pair_(c.x, c.residual, c.tables, c.rows, backend=backend)
    return lambda c: ops.add_steer_rmsnorm(
        c.x, c.residual, c.weight, EPS, 0.0, False, c.tables, c.rows, backend=backend
    )


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as transformers writes it."""
    h = hidden.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(hidden.dtype)


def baselines(steering: str, hidden: int) -> dict[tuple[str, str], Run]:
    """(op, who) -> the same work by others."""
    hook = eager_hook(steering, hidden, DTYPE, DEVICE)

    def whole(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = hook(x + residual)
        return norm(h, weight), h

    def fused_norm(c: Case) -> Any:
        h = hook(c.x + c.residual)
        return torch.nn.functional.rms_norm(h, (hidden,), c.weight, EPS), h

    # A number of rows has a kernel of its own, as the compiler would have it. The dry run compiles nothing.
    compile_backend = "inductor" if CUDA else "eager"
    torch._dynamo.reset()
    compiled_hook = torch.compile(hook, dynamic=False, backend=compile_backend)
    compiled = torch.compile(whole, dynamic=False, backend=compile_backend)
    found: dict[tuple[str, str], Run] = {
        ("add_steer", "eager hook"): lambda c: hook(c.x + c.residual),
        ("add_steer_rmsnorm", "eager hook"): lambda c: whole(c.x, c.residual, c.weight),
        ("add_steer_rmsnorm", "compiled hook"): lambda c: compiled(c.x, c.residual, c.weight),
        ("add_steer_rmsnorm", "torch rms_norm"): fused_norm,
    }
    if steering == "none":
        return found | _others()
    found["steer_", "eager hook"] = lambda c: hook(c.x)
    found["steer_", "compiled hook"] = lambda c: compiled_hook(c.x)
    return found


def _others() -> dict[tuple[str, str], Run]:
    """vLLM's and flashinfer's fused add + RMSNorm, where they can be imported; both write in place."""
    found: dict[tuple[str, str], Run] = {}
    if _is_installed("vllm"):
        from vllm import _custom_ops

        found["add_steer_rmsnorm", "vllm"] = lambda c: _custom_ops.fused_add_rms_norm(c.x, c.residual, c.weight, EPS)
    if _is_installed("flashinfer"):
        import flashinfer

        found["add_steer_rmsnorm", "flashinfer"] = lambda c: flashinfer.norm.fused_add_rmsnorm(
            c.x, c.residual, c.weight, EPS
        )
    return found


def _is_installed(package: str) -> bool:
    """A folder of that name, such as benchmarks/vllm, is no package: it comes from no file."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def bytes_moved(op: str, shape: Shape, c: Case) -> int:
    """The fewest bytes that an op can move on this case. In place, rows without entries are not touched."""
    rows, vectors = shape.rows * shape.hidden * DTYPE.itemsize, c.tables.bank.nbytes
    if len(c.tables.fields) == 0:
        vectors = 0
        if op in IN_PLACE:
            return 0
    weight = c.weight.nbytes if op == "add_steer_rmsnorm" else 0
    tensors = {"steer_": 2, "add_steer": 3, "steer_pair_": 4, "add_steer_rmsnorm": 4, "copy": 2}[op]
    return tensors * rows + vectors + weight


# Measurements ---------------------------------------------------------------------------------------------------------


class Buffers:
    """Rows for every call of a replay, used for all that is measured at one shape."""

    def __init__(self, shape: Shape) -> None:
        per_call = 4 * shape.rows * shape.hidden * DTYPE.itemsize
        fewest = 2 if per_call > 2**30 else 4
        self.shape, self.calls = shape, max(fewest, min(MAX_CALLS, REPLAYED_BYTES // per_call))
        if not CUDA:
            self.calls = 1
        sizes = self.calls, shape.rows, shape.hidden
        self.x, self.residual = (torch.randn(sizes, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.weight = torch.randn(self.calls, shape.hidden, device=DEVICE, dtype=DTYPE)

    def cases(self, steering: str, n_plans: int) -> list[Case]:
        """One per call, each with tables of its own. The rows are random again: an entry does not act on zeros."""
        for tensor in (self.x, self.residual):
            tensor.normal_()
        made = tables(steering, self.shape.hidden, DEVICE, n_plans)
        rows = rows_of(self.shape.rows, n_plans, DEVICE)
        return [
            Case(
                self.x[i], self.residual[i], self.weight[i],
                made._replace(bank=made.bank.clone(), fields=made.fields.clone(), scalars=made.scalars.clone(),
                              ranges=made.ranges.clone()),
                type(rows)(*(t.clone() for t in rows)),
            )
            for i in range(self.calls)
        ]  # fmt: skip


def measure(full: bool, out_of_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """One record per op, implementation, shape, steering and number of plans. The most wanted come first."""
    copy = copy_bandwidth()
    yield copy
    backends = [name for name in BACKENDS if ops.states()[name].works]  # type: ignore[index]
    wanted = shapes(full)
    with_baselines = [shape for shape in wanted if shape.hidden == MAIN and shape.rows in (1, 64, 512, MANY_ROWS)]
    todo = [(shape, False) for shape in wanted]
    todo[len(with_baselines) : len(with_baselines)] = [(shape, True) for shape in with_baselines]
    for done, (shape, others) in enumerate(todo):
        if out_of_time():
            print(f"out of time: {done} of {len(todo)} parts done", flush=True)
            break
        print(f"{shape}{' by others' if others else ''}", flush=True)
        buffers = Buffers(shape)
        yield from _measure_others(buffers, copy) if others else _measure_ours(buffers, backends, copy)
        del buffers
        if CUDA:
            torch.cuda.empty_cache()
    yield copy_bandwidth() | {"op": "copy 1 GiB, at the end"}


def _measure_ours(buffers: Buffers, backends: list[Any], copy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    shape = buffers.shape
    for steering in STEERINGS:
        for plans in sorted({1, 1 if steering == "none" else min(shape.rows, MAX_PLANS)}):
            cases = buffers.cases(steering, plans)
            about = {"steering": steering, "plans": plans}
            if steering == "none":
                yield record("copy", "torch", lambda c: c.residual.copy_(c.x), shape, cases, about, copy)
            for op, backend in itertools.product(OPS, backends):
                yield record(op, backend, ours(op, backend), shape, cases, about, copy)


def _measure_others(buffers: Buffers, copy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for steering in ("none", "ablate", "mixed4"):
        cases = buffers.cases(steering, 1)
        for (op, who), run in baselines(steering, buffers.shape.hidden).items():
            about = {"steering": steering, "plans": 1}
            try:
                yield record(op, who, run, buffers.shape, cases, about, copy)
            except Exception as error:  # another project's kernel may not fit this machine
                yield {"op": op, "who": who, **about, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def record(
    op: str, who: str, run: Run, shape: Shape, cases: list[Case], about: dict[str, Any], copy: dict[str, Any]
) -> dict[str, Any]:
    found = timed(lambda i: run(cases[i]), len(cases))
    speed = _gb_per_s(bytes_moved(op, shape, cases[0]), found)
    return {
        "op": op,
        "who": who,
        **about,
        "rows": shape.rows,
        "hidden": shape.hidden,
        "dtype": str(DTYPE),
        **found,
        "gb_per_s": speed,
        "percent_of_copy": round(100 * speed / copy["gb_per_s"], 1),
    }


def host_cost(calls: int = 100, repetitions: int = 21) -> Iterator[dict[str, Any]]:
    """Microseconds of host time per eager call on one short row, the GPU left behind: of the operator itself and of
    the function around it."""
    shape = Shape(1, 64)
    made = Buffers(shape).cases("add", 1)[0]
    hook = eager_hook("ablate", shape.hidden, DTYPE, DEVICE)
    tensors = *made.tables[:4], *made.rows, None
    norm_arguments = made.x, made.residual, made.weight, EPS, 0.0, False
    runs: dict[tuple[str, str], Callable[[], Any]] = {("host cost of an ablating hook", "torch"): lambda: hook(made.x)}
    for name in BACKENDS:
        if not ops.states()[name].works:  # type: ignore[index]
            continue
        steer_, rmsnorm = (
            getattr(getattr(torch.ops.faststeer, op), "triton" if name == "triton" else "cpp")
            for op in ("steer_", "add_steer_rmsnorm")
        )
        runs["host cost of steer_", name] = lambda op=steer_: op(made.x, *tensors, None)
        runs["host cost of add_steer_rmsnorm", name] = lambda op=rmsnorm: op(*norm_arguments, *tensors, 0)
        run = ours("steer_", name)  # type: ignore[arg-type]
        runs["host cost of ops.steer_", name] = lambda run=run: run(made)
    for (op, who), run in runs.items():
        seconds = []
        for _ in range(repetitions if CUDA else 2):
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls if CUDA else 1):
                run()
            seconds.append((time.perf_counter() - start) / (calls if CUDA else 1))
        low, middle, high = (round(s * 1e6, 2) for s in statistics.quantiles(seconds, n=4, method="inclusive"))
        yield {"op": op, "who": who, "rows": 1, "hidden": 64, "dtype": str(DTYPE), "us": middle} | {
            "us_low": low, "us_high": high, "calls": calls, "replays": len(seconds),
        }  # fmt: skip


# The table ------------------------------------------------------------------------------------------------------------


def headlines(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What the goals speak of, from the records that there are: what, one column per back end, and the best of the
    others."""
    names = ("op", "who", "steering", "plans", "rows", "hidden")
    by_key = {tuple(r.get(name) for name in names): r for r in records if "us" in r}

    def value(op: str, who: str, steering: str, plans: int, rows: int, column: str = "us") -> float | None:
        found = by_key.get((op, who, steering, plans, rows, MAIN))
        return None if found is None else found[column]

    def ratio(a: float | None, b: float | None) -> str:
        return "-" if a is None or not b else f"{a / b:.3f}"

    def text(a: float | None) -> str:
        return "-" if a is None else f"{a:.4g}"

    lines: list[tuple[str, ...]] = []
    for r in records:
        if r["op"].startswith("copy 1 GiB"):
            lines.append((f"{r['op']}: GB/s", *("" for _ in BACKENDS), f"torch {text(r['gb_per_s'])}"))
    many = min(MANY_ROWS, MAX_PLANS)
    for op, steering, plans in itertools.product(OPS, STEERINGS, (1, many)):
        if (steering == "none" and (op in IN_PLACE or plans > 1)) or steering == "add":
            continue
        cells = (value(op, b, steering, plans, MANY_ROWS, "percent_of_copy") for b in BACKENDS)
        lines.append((f"{op}, {steering}, {plans} plans, {MANY_ROWS} rows: % of copy", *map(text, cells), ""))
    few = sorted({r["rows"] for r in records if r.get("hidden") == MAIN and "steering" in r} & {1, 64, 512, MANY_ROWS})
    for steering, rows in itertools.product(STEERINGS[1:], few):
        cells = (ratio(*(value("add_steer_rmsnorm", b, s, 1, rows) for s in (steering, "none"))) for b in BACKENDS)
        lines.append((f"add_steer_rmsnorm, {rows} rows: {steering} / none, time", *cells, ""))
    for rows in (256, 512) if CUDA else (MANY_ROWS,):
        cells = (ratio(*(value("add_steer_rmsnorm", b, "ablate", p, rows) for p in (rows, 1))) for b in BACKENDS)
        lines.append((f"add_steer_rmsnorm, ablate, {rows} rows: {rows} plans / 1 plan, time", *cells, ""))
    for op, steering in (("add_steer_rmsnorm", "none"), ("add_steer_rmsnorm", "ablate"), ("steer_", "ablate")):
        for rows in few:
            others = {
                key[1]: r["us"]
                for key, r in by_key.items()
                if key[0] == op and key[2:] == (steering, 1, rows, MAIN) and key[1] not in BACKENDS
            }
            best = min(others, key=others.__getitem__, default=None)
            cells = [text(value(op, b, steering, 1, rows)) for b in BACKENDS]
            beside = "-" if best is None else f"{best} {text(others[best])}"
            lines.append((f"{op}, {steering}, {rows} rows: us", *cells, beside))
    hosts: dict[str, dict[str, float]] = {}
    for r in records:
        if r["op"].startswith("host cost"):
            hosts.setdefault(r["op"], {})[r["who"]] = r["us"]
    for op, times in hosts.items():
        other = f"torch {times['torch']}" if "torch" in times else ""
        lines.append((f"{op}, us", *(text(times.get(b)) for b in BACKENDS), other))
    return lines


def table(lines: list[tuple[str, ...]]) -> str:
    header = (f"bf16, hidden {MAIN}, cold cache" + ("" if CUDA else f" ({LABEL})"), *BACKENDS, "others' best")
    cells = [header, *lines]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def details() -> dict[str, Any]:
    """What results.machine does not say of the GPU, and how these numbers were made."""
    found: dict[str, Any] = {"run": LABEL, "backends": {n: s.reason for n, s in ops.states().items()}}
    if CUDA:
        of = torch.cuda.get_device_properties(0)
        found |= {"capability": f"{of.major}.{of.minor}", "multiprocessors": of.multi_processor_count}
        found |= {"l2_bytes": of.L2_cache_size, "memory_bytes": of.total_memory}
    return found


def write(records: list[dict[str, Any]], folder: Path, commit: str | None) -> Path:
    path = results.write(NAME, [{"run": LABEL} | r for r in records], folder)
    beside = path.with_name(f"{NAME}.machine.json")
    machine = json.loads(beside.read_text()) | details() | ({"commit": commit} if commit else {})
    beside.write_text(json.dumps(machine, indent=2) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--full", action="store_true", help="every number of rows at five hidden sizes")
    parser.add_argument("--commit", help="what to write down as the commit, where there is no git")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if not CUDA and arguments.out == results.FOLDER:
        parser.error("there is no GPU: a dry run measures nothing, so give it another --out")
    end = time.monotonic() + arguments.seconds
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        for found in itertools.chain(host_cost(), measure(arguments.full, lambda: time.monotonic() > end)):
            records.append(found)
            if found["op"] == "copy":  # once per shape: what is there is kept should this be stopped
                write(records, arguments.out, arguments.commit)
    path = write(records, arguments.out, arguments.commit)
    text = table(headlines(records))
    if arguments.table:
        arguments.table.write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
