"""What it costs a CPU that the ops note rows that are not finite: an earlier commit against this one, without flags and
with them, in turns. Run alone on the machine:

    git worktree add /tmp/before <commit> && (cd /tmp/before && python -m faststeer.build cpu)
    python benchmarks/kernels/nonfinite.py --before /tmp/before

Each checkout has a process of its own, which times a batch of calls when it is asked to; the ways take turns within a
second, since a machine's speed drifts by more than what is compared. A ratio is the median over the rounds of the
ratios within one round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
BEFORE, WITHOUT, WITH = "before", "without flags", "with flags"
OPS = ("steer_", "add_steer_rmsnorm", "steer_pair_")
HIDDEN, ROWS, DTYPES = (576, 4096), (1, 16, 512), ("float32", "bfloat16", "float16")
ELEMENTS_PER_BATCH = 2**21  # about a millisecond of the quickest op
MOST_CALLS = 500


class Worker:
    """A process that imports faststeer from a checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures ended with {self.process.wait()}")
        return json.loads(answer)


def work() -> None:
    """The worker: a line of JSON in, `prepare` or nanoseconds per call out."""
    import torch
    from cases import case

    import faststeer
    from faststeer import ops

    prepared: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "op" in question:
            rows = question["rows"]
            made = case(question["steering"], rows, question["hidden"], getattr(torch, question["dtype"]), "cpu")
            flags = {"nonfinite": torch.zeros(rows, dtype=torch.int32)}
            norm = made.weight, 1e-6, 0.0, False
            first = {"steer_": (made.x,), "steer_pair_": (made.x, made.residual)}
            arguments = *first.get(question["op"], (made.x, made.residual, *norm)), made.tables, made.rows
            calls = max(1, min(MOST_CALLS, ELEMENTS_PER_BATCH // made.x.numel()))
            prepared = {"op": getattr(ops, question["op"]), "arguments": arguments, "flags": flags, "calls": calls}
            prepared["written"] = made.x, made.x.clone()
            print(json.dumps(str(Path(faststeer.__file__).parents[1])), flush=True)
            continue
        options = prepared["flags"] if question["way"] == WITH else {}
        op, arguments, calls = prepared["op"], prepared["arguments"], prepared["calls"]
        x, before = prepared["written"]
        with torch.inference_mode():
            x.copy_(before)
            op(*arguments, backend="cpu", **options)
            start = time.perf_counter_ns()
            for _ in range(calls):
                op(*arguments, backend="cpu", **options)
            taken = time.perf_counter_ns() - start
        print(json.dumps(taken / calls), flush=True)


def compare(workers: dict[str, Worker], rounds: int) -> list[dict[str, Any]]:
    found = []
    for op, steering, rows, hidden, dtype in product(OPS, ("add", "ablate"), ROWS, HIDDEN, DTYPES):
        what = {"op": op, "steering": steering, "rows": rows, "hidden": hidden, "dtype": dtype}
        for way, checkout in ((way, worker.ask(**what)) for way, worker in workers.items()):
            assert (Path(checkout) == ROOT) == (way != BEFORE), f"{way}: faststeer was imported from {checkout}"
        times: dict[str, list[float]] = {way: [] for way in workers}
        for number in range(rounds + 1):
            for way in workers if number % 2 else reversed(workers):
                nanoseconds = workers[way].ask(way=way)
                if number:  # the first warms up
                    times[way].append(nanoseconds)
        for way, taken in times.items():
            ratios = sorted(ours / theirs for ours, theirs in zip(taken, times[BEFORE], strict=True))
            found.append(
                what
                | {"way": way, "rounds": rounds, "median_us": round(median(taken) / 1e3, 3)}
                | {"least_us": round(min(taken) / 1e3, 3), "over_before": round(median(ratios), 4)}
                | {
                    "lower_quartile": round(ratios[rounds // 4], 4),
                    "upper_quartile": round(ratios[-1 - rounds // 4], 4),
                }
            )
        print(found[-2]["over_before"], found[-1]["over_before"], what, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with, built")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    if arguments.before is None:
        parser.error("--before is missing: expected a checkout of the commit to compare with")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import results

    # Flags or not is asked of two processes of this checkout, so that what differs is the call alone.
    checkouts = {BEFORE: arguments.before.resolve(), WITHOUT: ROOT, WITH: ROOT}
    workers = {way: Worker(checkout, arguments.threads) for way, checkout in checkouts.items()}
    name = f"nonfinite_cpu_{arguments.threads}_threads"
    rows = compare(workers, arguments.rounds)
    print("written to", results.write(name, rows, *([arguments.out] if arguments.out else [])))


if __name__ == "__main__":
    main()
