"""GPU time of the ops against copy bandwidth and against what people use today.

    python benchmarks/kernels/gpu.py ours --csv kernels.csv --seconds 45

The parts:

    ours      each op on each back end: rows, steering, plans; x cold and warm; rows of one plan together and in turn
    sweep     the same op with other numbers of columns per thread, a process for each
    others    hooks, torch.compile, torch's rms_norm, and liger-kernel's and vLLM's norm where they can be imported
    host      host time of an eager call
    profile   four kernels once each, for a profiler to look at; measures nothing itself

Each time is the median over replays of one CUDA graph, in which every call has rows, tables and results of its own and
finds none of them in the L2 cache (`x` cold), as between the layers of a model. `x` warm: something wrote x just
before, as the product before a norm does, and its time is subtracted. Ops that work in place get fresh rows before
each replay. Ratios compare runs of one process. What counts as moved is what an op cannot do without: each row and
each vector read once, each result written once.

Without a GPU this is a dry run: tiny sizes, one repetition, on the CPU. It measures nothing, and everything that it
writes says so. A back end that does not work is a failure, there as on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cases import STEERINGS, Case, eager_hook, rows_of, tables
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import records

from faststeer import measure, ops

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") == "1":  # a dry run, whose interpreter the tests mend
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "kernels"))
    importlib.import_module("triton_interpreter").mend()
DEVICE = "cuda" if CUDA else "cpu"
RUN = "gpu" if CUDA else "dry run"
BACKENDS: tuple[ops.Backend, ...] = ("cuda", "triton") if CUDA else ("cpu", "triton")
IN_PLACE = "steer_pair_"  # it leaves zeros in x, and writes only the rows that something acts on
OPS = ("steer", "add_steer", "add_steer_rmsnorm", IN_PLACE)
WARM = ("steer", "add_steer_rmsnorm")  # measured with x in the cache, too
DTYPE = torch.bfloat16
EPS = 1e-6
MAIN = 4096 if CUDA else 64  # the hidden size at which everything is measured
ROWS = (64, 16384, 1, 256, 512) if CUDA else (5, 1)
OTHER_HIDDEN, OTHER_ROWS = ((8192, 2048), (64, 16384)) if CUDA else ((), ())
SWEPT_ROWS = (64, 256, 512, 16384) if CUDA else (5,)
COMPARED_ROWS = (64, 16384) if CUDA else (5,)
MAX_PLANS = 1024 if CUDA else 2
COLUMNS = (8, 16, 32)  # per thread
REPLAYS = 11 if CUDA else 1
VARIABLES = ("FASTSTEER_CUDA_COLUMNS", "FASTSTEER_TRITON_ELEMENTS")

Run = Callable[[Case], Any]


# Rows and tables ------------------------------------------------------------------------------------------------------


class Buffers:
    """Rows for every call of a replay, used for all that is measured at one shape.

    Raises:
        MemoryError: they do not fit.
    """

    def __init__(self, rows: int, hidden: int) -> None:
        self.rows, self.hidden = rows, hidden
        self.bytes_per_call = 4 * rows * hidden * DTYPE.itemsize  # x and residual, and as much of results
        self.sets = measure.tensor_sets(self.bytes_per_call) if CUDA else 1
        if CUDA:
            # x and residual and fresh ones, and results in the graph's pool.
            needed, free = 2 * self.sets * self.bytes_per_call, torch.cuda.mem_get_info()[0]
            if needed > 0.8 * free:
                raise MemoryError(f"{rows} rows need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        sizes = self.sets, rows, hidden
        self._fresh = [torch.randn(sizes, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        self.x, self.residual = (tensor.clone() for tensor in self._fresh)
        self.weight = torch.randn(self.sets, hidden, device=DEVICE, dtype=DTYPE)

    def restore(self) -> None:
        for tensor, fresh in zip((self.x, self.residual), self._fresh, strict=True):
            tensor.copy_(fresh)

    def write_x(self, i: int) -> None:
        self.x[i].copy_(self._fresh[0][i])

    def cases(self, steering: str, n_plans: int, contiguous: bool = False) -> list[Case]:
        """One per call, each with tables of its own."""
        self.restore()
        one = tables(steering, self.hidden, DEVICE, n_plans)
        rows = rows_of(self.rows, n_plans, DEVICE, contiguous)
        sets = min(self.sets, measure.tensor_sets(self.bytes_per_call + one.bank.nbytes))
        return [
            Case(
                self.x[i], self.residual[i], self.weight[i],
                one._replace(bank=one.bank.clone(), entries=one.entries.clone(), ranges=one.ranges.clone()),
                rows.clone(),
            )
            for i in range(sets)
        ]  # fmt: skip


# What is timed --------------------------------------------------------------------------------------------------------


def ours(op: str, backend: ops.Backend) -> Run:
    if op == "steer":
        return lambda c: ops.steer(c.x, c.tables, c.rows, backend=backend)
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
    """(op, who) -> the same work by others. Those that compile come last."""
    hook = eager_hook(steering, hidden, DTYPE, DEVICE)

    def whole(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = hook(x + residual)
        return norm(h, weight), h

    def fused_norm(c: Case) -> Any:
        h = hook(c.x + c.residual)
        return torch.nn.functional.rms_norm(h, (hidden,), c.weight, EPS), h

    runs: dict[tuple[str, str], Run] = {
        ("add_steer", "eager hook"): lambda c: hook(c.x + c.residual),
        ("add_steer_rmsnorm", "eager hook"): lambda c: whole(c.x, c.residual, c.weight),
        ("add_steer_rmsnorm", "torch rms_norm"): fused_norm,
    }
    if steering == "none":
        runs |= _others()
    # A number of rows has a kernel of its own, as the compiler would have it. The dry run compiles nothing.
    torch._dynamo.reset()
    compiled = torch.compile(whole, dynamic=False, backend="inductor" if CUDA else "eager")
    runs["add_steer_rmsnorm", "compiled hook"] = lambda c: compiled(c.x, c.residual, c.weight)
    return runs


def _others() -> dict[tuple[str, str], Run]:
    """liger-kernel's and vLLM's fused add + RMSNorm, where they can be imported. vLLM's writes in place."""
    runs: dict[tuple[str, str], Run] = {}
    if CUDA and _is_installed("liger_kernel"):
        runs["add_steer_rmsnorm", "liger-kernel"] = _liger()
    if CUDA and _is_installed("vllm"):
        runs["add_steer_rmsnorm", "vllm"] = _vllm()
    return runs


def _liger() -> Run:
    def run(c: Case) -> Any:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(c.x, c.residual, c.weight, EPS, 0.0, "llama", False)

    return run


def _vllm() -> Run:
    def run(c: Case) -> None:
        from vllm import _custom_ops

        _custom_ops.fused_add_rms_norm(c.x, c.residual, c.weight, EPS)

    return run


def _is_installed(package: str) -> bool:
    """A folder of that name, such as benchmarks/vllm, is no package: it comes from no file."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def bytes_moved(op: str, rows: int, hidden: int, c: Case) -> int:
    """The fewest bytes that an op can move on this case. In place, rows without entries are not touched."""
    row_bytes, vectors = rows * hidden * DTYPE.itemsize, c.tables.bank.nbytes
    if len(c.tables.entries) == 0:
        vectors = 0
        if op == IN_PLACE:
            return 0
    weight = c.weight.nbytes if op == "add_steer_rmsnorm" else 0
    return measure.TENSORS_MOVED[op] * row_bytes + vectors + weight


# Measurements ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """Where records go, until when, and the copy bandwidth (bytes per second) that they are compared with."""

    table: records.GpuTable
    end: float
    copy: float

    @classmethod
    def begin(cls, table: records.GpuTable, end: float) -> Session:
        n_bytes = 2**30 if CUDA else 2**12
        copy, timing = measure.copy_bandwidth(DEVICE, n_bytes, replays=REPLAYS)
        table({"what": "copy", "op": "copy", "who": "torch", **asdict(timing), "gb_per_s": round(copy / 1e9, 1)})
        return cls(table, end, copy)

    def out_of_time(self, what: str) -> bool:
        if late := time.monotonic() > self.end:
            print(f"out of time at {what}", flush=True)
        return late

    def record(
        self,
        op: str,
        who: str,
        run: Run,
        buffers: Buffers,
        cases: list[Case],
        about: dict[str, Any],
        warm: bool = False,
    ) -> None:
        """Time `run` and write it down; what goes wrong is written down, too, and the others go on."""
        row = {"what": "kernel", "op": op, "who": who, **about, "x": "warm" if warm else "cold"}
        row |= {"rows": buffers.rows, "hidden": buffers.hidden, "dtype": str(DTYPE).removeprefix("torch.")}
        try:
            timing = measure.time_calls(
                lambda i: run(cases[i]), len(cases), DEVICE, replays=REPLAYS, cold=CUDA,
                before=buffers.write_x if warm else None,
                restore=buffers.restore if op == IN_PLACE or who == "vllm" else None,
            )  # fmt: skip
        except Exception as error:
            self.table(row | {"failed": records.reason(error)})
            return
        speed = bytes_moved(op, buffers.rows, buffers.hidden, cases[0]) / max(timing.us, 1e-3) * 1e6
        row |= {**asdict(timing), "gb_per_s": round(speed / 1e9, 1)}
        self.table(row | {"percent_of_copy": round(100 * speed / self.copy, 1)})

    def buffers(self, rows: int, hidden: int) -> Buffers | None:
        if CUDA:
            torch.cuda.empty_cache()
        print(f"{rows} rows of {hidden}", flush=True)
        try:
            return Buffers(rows, hidden)
        except (MemoryError, torch.OutOfMemoryError) as error:
            about = {"rows": rows, "hidden": hidden, "failed": records.reason(error)}
            self.table({"what": "kernel"} | about)
            return None


def working(table: records.GpuTable) -> list[ops.Backend]:
    """The back ends that work; of each other one a record says why not."""
    states = ops.states()
    for name in BACKENDS:
        if not states[name].works:
            table({"what": "kernel", "who": name, "failed": f"does not work here: {states[name].reason}"})
    return [name for name in BACKENDS if states[name].works]


def plan_numbers(steering: str, rows: int) -> Iterator[tuple[int, str]]:
    """(plans, order of the rows): one, as many as rows, and where there are more rows than plans both orders."""
    yield 1, ""
    many = min(rows, MAX_PLANS)
    if steering != "none" and many > 1:
        yield many, "round robin"
        if rows > many:
            yield many, "contiguous"


def measure_ours(session: Session) -> None:
    shapes = [(rows, MAIN) for rows in ROWS] + list(itertools.product(OTHER_ROWS, OTHER_HIDDEN))
    backends = working(session.table)
    for rows, hidden in shapes:
        if (buffers := session.buffers(rows, hidden)) is None:
            continue
        fits = not CUDA or 4 * rows * hidden * DTYPE.itemsize < torch.cuda.get_device_properties(0).L2_cache_size
        for steering in STEERINGS:
            for plans, order in plan_numbers(steering, rows):
                if session.out_of_time(f"{rows} rows of {hidden}, {steering}"):
                    return
                cases = buffers.cases(steering, plans, order == "contiguous")
                about = {"steering": steering, "plans": plans, "order": order}
                if steering == "none":
                    session.record("copy", "torch", lambda c: c.residual.copy_(c.x), buffers, cases, about)
                    buffers.restore()
                for op, backend in itertools.product(OPS, backends):
                    session.record(op, backend, ours(op, backend), buffers, cases, about)
                    if op in WARM and fits:
                        session.record(op, backend, ours(op, backend), buffers, cases, about, warm=True)
        del buffers


def measure_sweep(options: argparse.Namespace, end: float) -> int:
    """A process per number of columns, since the launchers read it once."""
    failures = 0
    for columns in COLUMNS:
        left = end - time.monotonic()
        if left < (5 if CUDA else 0):
            print(f"out of time at {columns} columns per thread", flush=True)
            break
        command = [sys.executable, __file__, "swept", "--csv", str(options.csv), "--stage", options.stage]
        environment = os.environ | dict.fromkeys(VARIABLES, str(columns))
        failures += subprocess.run([*command, "--seconds", str(left)], env=environment, check=False).returncode != 0
    return failures


def measure_swept(session: Session) -> None:
    """The op that layers are made of, with what the environment says."""
    backends = working(session.table)
    for rows in SWEPT_ROWS:
        if (buffers := session.buffers(rows, MAIN)) is None:
            continue
        for steering in ("none", "ablate", "mixed4"):
            if session.out_of_time(f"{rows} rows, {steering}"):
                return
            cases = buffers.cases(steering, 1)
            about = {"steering": steering, "plans": 1, "launch": f"{os.environ.get(VARIABLES[0])} columns per thread"}
            for backend in backends:
                run = ours("add_steer_rmsnorm", backend)
                session.record("add_steer_rmsnorm", backend, run, buffers, cases, about)


def measure_others(session: Session) -> None:
    for rows, steering in itertools.product(COMPARED_ROWS, ("none", "ablate", "mixed4")):
        if session.out_of_time(f"{rows} rows, {steering}"):
            return
        if (buffers := session.buffers(rows, MAIN)) is None:
            continue
        about = {"steering": steering, "plans": 1}
        cases = buffers.cases(steering, 1)
        for backend in working(session.table):  # in the same process, for ratios
            run = ours("add_steer_rmsnorm", backend)
            session.record("add_steer_rmsnorm", backend, run, buffers, cases, about)
        for (op, who), run in baselines(steering, MAIN).items():
            session.record(op, who, run, buffers, cases, about)
            buffers.restore()


def measure_host(session: Session) -> None:
    """Host time per eager call on one short row, the GPU left behind: of the operator itself and of the function around
    it."""
    buffers = Buffers(1, 64)
    case = buffers.cases("add", 1)[0]
    hook = eager_hook("ablate", 64, DTYPE, DEVICE)
    tensors = *case.tables[:3], case.rows, None
    norm_arguments = case.x, case.residual, case.weight, EPS, 0.0, False
    runs: dict[tuple[str, str], Callable[[], Any]] = {("an ablating hook", "torch"): lambda: hook(case.x)}
    for name in working(session.table):
        steer, rmsnorm = (
            getattr(getattr(torch.ops.faststeer, op), "triton" if name == "triton" else "cpp")
            for op in ("steer", "add_steer_rmsnorm")
        )
        runs["operator steer", name] = lambda op=steer: op(case.x, *tensors, None, 0)
        runs["operator add_steer_rmsnorm", name] = lambda op=rmsnorm: op(*norm_arguments, *tensors, None, 0)
        run = ours("steer", name)
        runs["ops.steer", name] = lambda run=run: run(case)
    for (op, who), run in runs.items():
        row = {"what": "host cost", "op": op, "who": who, "rows": 1, "hidden": 64}
        try:
            calls, repetitions = (100, 21) if CUDA else (1, 2)
            session.table(row | asdict(measure.time_host(run, DEVICE, calls=calls, repetitions=repetitions)))
        except Exception as error:
            session.table(row | {"failed": records.reason(error)})


def profile(table: records.GpuTable) -> None:
    """Each kernel once between the profiler's start and stop."""
    runs = []
    for backend, (rows, steering) in itertools.product(working(table), ((ROWS[1], "ablate"), (ROWS[0], "mixed4"))):
        case = Buffers(rows, MAIN).cases(steering, 1)[0]
        runs.append((ours("add_steer_rmsnorm", backend), case))
    for run, case in runs:  # compiles
        run(case)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for run, case in runs:
        run(case)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    print(f"{len(runs)} kernels ran", flush=True)


PARTS = {"ours": measure_ours, "swept": measure_swept, "others": measure_others, "host": measure_host}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "sweep", "profile"))
    parser.add_argument("--csv", type=Path, required=True, help="file that records are appended to")
    parser.add_argument("--stage", default="kernels", help="what the records are labelled with")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if options.part == "sweep":
        return 1 if measure_sweep(options, end) else 0
    table = records.GpuTable(options.csv, RUN, options.stage)
    with torch.no_grad():
        if options.part == "profile":
            profile(table)
        else:
            PARTS[options.part](Session.begin(table, end))
    if table.failures:
        print(f"{table.failures} failed")
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
