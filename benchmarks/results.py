"""Where a benchmark's numbers go: long-form CSV with one row per measurement, and the machine beside it."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from faststeer.files import write_atomically

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, GPU, versions and commit that a measurement belongs to."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return found


def write(name: str, rows: Iterable[Mapping[str, Any]], folder: Path = FOLDER) -> Path:
    """Write `<name>.csv` and `<name>.machine.json` to the folder."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path = folder / f"{name}.csv"
    write_atomically(path, text.getvalue())
    write_atomically(folder / f"{name}.machine.json", json.dumps(machine(), indent=2) + "\n")
    return path


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
