"""Where a benchmark's numbers go: long-form CSV with one row per measurement, and the machine beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from records import csv_lines

from faststeer import measure
from faststeer.files import write_atomically

FOLDER = Path(__file__).parent / "results"
COMMIT = "FASTSTEER_COMMIT"  # environment variable: what to name as the commit where there is no git


def machine() -> dict[str, Any]:
    """Processor, GPU, versions and commit that a measurement belongs to."""
    return measure.machine() | {"commit": _commit()}


def write(name: str, rows: Iterable[Mapping[str, Any]], folder: Path = FOLDER) -> Path:
    """Write `<name>.csv` and `<name>.machine.json` to the folder."""
    rows = list(rows)
    text = csv_lines(list(dict.fromkeys(column for row in rows for column in row)), rows)
    path = folder / f"{name}.csv"
    write_atomically(path, text)
    write_machine(folder / f"{name}.machine.json")
    return path


def write_machine(path: Path, more: Mapping[str, Any] = {}) -> None:
    """`more`: what the benchmark knows beside `machine()`."""
    write_atomically(path, json.dumps(machine() | dict(more), indent=2) + "\n")


def _commit() -> str:
    if named := os.environ.get(COMMIT):
        return named
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"
