"""What a CPU takes for an op now, over what it took at an earlier commit: two checkouts, in turns.

    git worktree add /tmp/before <commit> && (cd /tmp/before && python faststeer/build.py cpu)
    python benchmarks/kernels/before.py --before /tmp/before --commit <commit>

Each checkout has a process of its own, which times a batch of calls when it is asked to; the two take turns within
milliseconds, since a machine's speed drifts by more than what is compared, and other work may run beside them. A ratio
is the median over the rounds of the ratios within one round; `least` is the ratio of the shortest times.
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
OPS = ("steer", "add_steer_rmsnorm", "steer_pair_")
HIDDEN, ROWS, DTYPES = (576, 4096), (1, 16, 512), ("float32", "bfloat16", "float16")
ELEMENTS_PER_BATCH = 2**21  # about a millisecond of the quickest op
MOST_CALLS = 500


class Worker:
    """A process that imports faststeer from a checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.checkout = checkout

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures {self.checkout} ended with {self.process.wait()}")
        return json.loads(answer)


def work() -> None:
    """The worker: a line of JSON in, what to prepare or nothing; the checkout or nanoseconds per call out."""
    import torch

    # The checkout's own cases, too: what they are made of may have changed.
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "benchmarks" / "kernels")]
    from cases import case

    import faststeer
    from faststeer import ops

    run, calls, x, before = None, 0, None, None
    for line in sys.stdin:
        if question := json.loads(line):
            made = case(
                question["steering"], question["rows"], question["hidden"], getattr(torch, question["dtype"]), "cpu"
            )
            norm = made.weight, 1e-6, 0.0, False
            first = {"steer": (made.x,), "steer_pair_": (made.x, made.residual)}
            arguments = *first.get(question["op"], (made.x, made.residual, *norm)), made.tables, made.rows
            op = getattr(ops, question["op"])
            run = lambda op=op, arguments=arguments: op(*arguments, backend="cpu")  # noqa: E731
            calls = max(1, min(MOST_CALLS, ELEMENTS_PER_BATCH // made.x.numel()))
            x, before = made.x, made.x.clone()
            print(json.dumps(str(Path(faststeer.__file__).parents[1])), flush=True)
            continue
        with torch.inference_mode():
            x.copy_(before)
            run()
            start = time.perf_counter_ns()
            for _ in range(calls):
                run()
            taken = time.perf_counter_ns() - start
        print(json.dumps(taken / calls), flush=True)


def compare(before: Worker, now: Worker, rounds: int) -> list[dict[str, Any]]:
    """A line for each op, steering, shape and dtype."""
    lines = []
    for op, steering, rows, hidden, dtype in product(OPS, ("add", "ablate"), ROWS, HIDDEN, DTYPES):
        what = {"op": op, "steering": steering, "rows": rows, "hidden": hidden, "dtype": dtype}
        for worker in (before, now):
            found = Path(worker.ask(what))
            assert found == worker.checkout, f"faststeer was imported from {found}, not from {worker.checkout}"
        times: dict[Worker, list[float]] = {before: [], now: []}
        for number in range(rounds + 1):
            for worker in (before, now) if number % 2 else (now, before):
                nanoseconds = worker.ask({})
                if number:  # the first warms up
                    times[worker].append(nanoseconds)
        ratios = sorted(ours / theirs for ours, theirs in zip(times[now], times[before], strict=True))
        lines.append(
            what
            | {"rounds": rounds, "before_us": round(median(times[before]) / 1e3, 3)}
            | {"now_us": round(median(times[now]) / 1e3, 3), "over_before": round(median(ratios), 4)}
            | {"lower_quartile": round(ratios[rounds // 4], 4), "upper_quartile": round(ratios[-1 - rounds // 4], 4)}
            | {"least": round(min(times[now]) / min(times[before]), 4)}
        )
        print(lines[-1]["over_before"], lines[-1]["least"], what, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with, built")
    parser.add_argument("--commit", default="", help="what it is called in the results")
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

    workers = [Worker(checkout, arguments.threads) for checkout in (arguments.before.resolve(), ROOT)]
    lines = [{"before": arguments.commit} | line for line in compare(*workers, arguments.rounds)]
    print("over before, median of all:", median(line["over_before"] for line in lines))
    name = f"before_cpu_{arguments.threads}_threads"
    print("written to", results.write(name, lines, *([arguments.out] if arguments.out else [])))


if __name__ == "__main__":
    main()
