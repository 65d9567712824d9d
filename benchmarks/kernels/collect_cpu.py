"""From pytest-benchmark's JSON to benchmarks/results/kernels_cpu.csv.

A time is the median over the passes of each pass's median; a ratio is the median over the passes of the ratios within
one pass, where both were measured within a second of each other. Each way has a ratio to the PyTorch that does the
same."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

PYTORCH = {"in-place hook": "eager hook", "steer": "eager hook", "add_steer_rmsnorm": "sum, hook and norm"}


def collect(path: Path) -> list[dict[str, object]]:
    passes: dict[tuple[object, ...], list[float]] = defaultdict(list)  # (how, steering, rows, hidden, dtype): in order
    for run in json.loads(path.read_text())["benchmarks"]:
        passes[tuple(run["extra_info"].values())].append(run["stats"]["median"] * 1e6)
    rows = []
    for (how, *what), times in passes.items():
        row = dict(zip(("how", "steering", "rows", "hidden", "dtype"), (how, *what), strict=True))
        row |= {"median_us": round(median(times), 2), "passes": len(times)}
        theirs = passes.get((PYTORCH.get(str(how)), *what))
        ratios = [t / ours for t, ours in zip(theirs, times, strict=True)] if theirs else None
        row["times_as_fast_as_pytorch"] = round(median(ratios), 2) if ratios else ""
        rows.append(row)
    return rows


if __name__ == "__main__":
    found = collect(Path(sys.argv[1]))
    written = results.write("kernels_cpu", found)
    table = Table(*found[0], title=f"Written to {written}")
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
