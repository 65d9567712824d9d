"""Measurements as rows of a CSV file, written one by one.

Standard library alone: who only reads them needs no PyTorch.
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Of the one CSV file that all benchmarks for GPUs append to. `run` says whether a GPU was measured or nothing at all;
# `what` is kernel, copy, host cost, counters or step; percentages are of the copy and of the weight-streaming limit
# measured in the same process.
GPU_COLUMNS = (
    "run", "stage", "what", "model", "op", "who", "back_end", "steering", "plans", "order", "x", "launch", "attention",
    "rows", "hidden", "prompt", "new", "dtype", "us", "us_low", "us_high", "calls", "replays", "gb_per_s",
    "percent_of_copy", "prefill_ms", "step_ms", "step_ms_low", "step_ms_high", "repeats", "percent_of_weights",
    "tokens_per_second", "peak_gib", "failed",
)  # fmt: skip


class Appended:
    """A CSV file that gains a row as soon as something is measured, from any number of processes: whatever ends them,
    what was measured is there. Lines are appended whole.

    Args:
        columns: of every row; a row has some of them.

    Raises:
        ValueError: the file is there and has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        header = csv_lines(self.columns, [])
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with path.open() as file:
                first = file.readline()
            if first == header:
                return
            if first:
                raise ValueError(
                    f"{path} has the columns {first.strip()!r}, not {header.strip()!r}: name another file"
                ) from None
            descriptor = os.open(path, os.O_WRONLY)  # whoever created it was killed at once
        os.write(descriptor, header.encode())
        os.close(descriptor)

    def __call__(self, row: Mapping[str, Any]) -> None:
        if unknown := set(row) - set(self.columns):
            raise ValueError(f"no column for {', '.join(sorted(unknown))} in {self.path.name}")
        line = csv_lines(self.columns, [row], header=False).encode()
        with self._lock:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)


class GpuTable:
    """Rows of one stage in the CSV file of GPU_COLUMNS; `run` and `stage` are filled in."""

    def __init__(self, path: Path, run: str, stage: str) -> None:
        self._append, self._base = Appended(path, GPU_COLUMNS), {"run": run, "stage": stage}
        self.failures = 0

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.failures += "failed" in row
        self._append(self._base | dict(row))


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without the columns that a row leaves empty; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [{k: v for k, v in row.items() if v} for row in csv.DictReader(io.StringIO(whole))]


def csv_lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = True) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()
