"""From pytest-benchmark's JSON to benchmarks/results/kernels_cpu.csv, with each time as a ratio to the hook's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
import results


def collect(path: Path) -> list[dict[str, object]]:
    runs = json.loads(path.read_text())["benchmarks"]
    rows = [
        dict(run["extra_info"]) | {"median_us": run["stats"]["median"] * 1e6, "rounds": run["stats"]["rounds"]}
        for run in runs
    ]
    key = ("steering", "rows", "hidden", "dtype")
    medians = {(r["how"], *(r[k] for k in key)): r["median_us"] for r in rows}
    for row in rows:
        for hook in ("eager hook", "in-place hook"):
            median = medians.get((hook, *(row[k] for k in key)))
            row[f"times_as_fast_as_{hook.split()[0]}"] = round(median / row["median_us"], 2) if median else ""
        row["median_us"] = round(row["median_us"], 2)
    return rows


if __name__ == "__main__":
    found = collect(Path(sys.argv[1]))
    written = results.write("kernels_cpu", found)
    table = Table(*found[0], title=f"Written to {written}")
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
