"""Where a benchmark's numbers go: a log that every measurement is appended to as it is made, and at the end a long-form
CSV with one row per measurement, with the machine beside it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from records import csv_lines

from faststeer import build, measure, ops
from faststeer.files import write_atomically

FOLDER = Path(__file__).parent / "results"
COMMIT = "FASTSTEER_COMMIT"  # environment variable: what to name as the commit where there is no git
LOGS = Path(__file__).parents[1] / "out" / "bench"


class Log:
    """The measurements of one benchmark, a JSON line each, appended as they are made.

    A run with the same settings on the same machine and commit goes on where the last one was stopped: `has` says what
    is there already. Anything else, or `fresh`, begins anew. A line that was cut off by a kill is dropped. The
    reference is refused: `refuse_reference`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        refuse_reference()
        head = {"job": hashlib.sha256(json.dumps([settings, machine()], sort_keys=True).encode()).hexdigest()[:16]}
        self._path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().split("\n")[:-1] if path.is_file() and not fresh else []
        if lines and json.loads(lines[0]) == head:
            self.rows = [json.loads(line) for line in lines[1:]]
        self._head = head
        self._rewrite()

    def has(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, **key: Any) -> None:
        """Drop the rows that have all of these values."""
        self.rows = [row for row in self.rows if not key.items() <= row.items()]
        self._rewrite()

    def _rewrite(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in [self._head, *self.rows]))


def measure_in_turn(
    log: Log,
    cases: Mapping[str, Callable[[], Mapping[str, Any] | None]],
    repeats: int,
    **where: Any,
) -> None:
    """Run every case once a repeat and log its seconds and what it returns, beside `where`.

    Cases run in order, and backwards every second repeat, so that a machine that slows down slows all of them. What the
    log has already is not run again, and neither is warmed up.
    """
    for repeat in range(repeats):
        for case in list(cases) if repeat % 2 == 0 else list(cases)[::-1]:
            key = {**where, "case": case, "repeat": repeat}
            if log.has(**key):
                continue
            start = time.perf_counter()
            more = cases[case]() or {}
            row = {**key, "seconds": round(time.perf_counter() - start, 4), **more}
            log.add(row)
            print(f"  {' '.join(f'{k}={v}' for k, v in row.items())}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Processor, GPU, versions, commit and back end that a measurement belongs to."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure.machine() | {"commit": _commit(), "back_end": ops.backend_for(device)}


def refuse_reference() -> None:
    """End the program if the reference would be measured, or the C++ without the module that calls it quickly, unless
    FASTSTEER_BACKEND asks for a back end by name."""
    back_end = machine()["back_end"]
    reason = ops.states()["cpu"].reason if back_end == "reference" else build.obstacle("native")
    if reason and back_end != "triton" and os.environ.get("FASTSTEER_BACKEND", "auto") == "auto":
        sys.exit(f"nothing is measured without the C++: {reason}; FASTSTEER_BACKEND=reference measures the reference")


def write(
    name: str, rows: Iterable[Mapping[str, Any]], folder: Path = FOLDER, more: Mapping[str, Any] | None = None
) -> Path:
    """Write `<name>.csv` and `<name>.machine.json`, the machine and `more`, to the folder."""
    refuse_reference()
    rows = list(rows)
    text = csv_lines(list(dict.fromkeys(column for row in rows for column in row)), rows)
    path = folder / f"{name}.csv"
    write_atomically(path, text)
    write_machine(folder / f"{name}.machine.json", more or {})
    return path


def write_machine(path: Path, more: Mapping[str, Any] = {}) -> None:
    """`more`: what the benchmark knows beside `machine()`."""
    write_atomically(path, json.dumps(machine() | dict(more), indent=2) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _commit() -> str:
    if named := os.environ.get(COMMIT):
        return named
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"
