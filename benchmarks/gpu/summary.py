"""Tables of what run.py measured, from its CSV file:

python benchmarks/gpu/summary.py DIR/first.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import records

Row = dict[str, str]


def tables(rows: Sequence[Row]) -> str:
    """All of them that there are rows for."""
    good = [row for row in rows if "failed" not in row]
    kernels = [row for row in good if row.get("what") == "kernel"]
    own, swept = ([row for row in kernels if ("launch" in row) is swept] for swept in (False, True))
    parts = [
        _copies(good),
        pivot("us per call (% of copy), cold", _of(own, x="cold"), _shape, "who", _us_percent),
        pivot("us per call, x warm", _of(own, x="warm"), _shape, "who", _us),
        pivot("us per call, columns per thread", swept, _shape, _launch, _us),
        pivot("decode step, ms (% of reading the weights)", _of(good, what="step"), _step, "steering", _ms_percent),
        pivot("host time of an eager call, us", _of(good, what="host cost"), lambda r: r["op"], "who", _us),
        "\n".join(f"{row.get('us', '?'):>10} us  {row['op']}" for row in _of(good, what="counters")),
        _failures([row for row in rows if "failed" in row]),
    ]
    return "\n\n".join(part for part in parts if part)


def pivot(
    title: str, rows: Sequence[Row], line: Callable[[Row], str], column: str | Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:  # fmt: skip
    """A line per `line(row)`, a column per value of `column`; what was measured more than once shows the last time."""
    if not rows:
        return ""
    name = (lambda row: row.get(column, "")) if isinstance(column, str) else column
    cells = {(line(row), name(row)): cell(row) for row in rows}
    heads = list(dict.fromkeys(head for _, head in cells))
    lines = [[title, *heads]]
    lines += [
        [label, *(cells.get((label, head), "-") for head in heads)] for label in dict.fromkeys(k for k, _ in cells)
    ]
    widths = [max(len(one[i]) for one in lines) for i in range(len(heads) + 1)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(one, widths, strict=True))
        )
        for one in lines
    )


def _of(rows: Iterable[Row], **values: str) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def _copies(rows: Sequence[Row]) -> str:
    return "\n".join(f"{row['stage']}: {row['op']}: {row['gb_per_s']} GB/s" for row in _of(rows, what="copy"))


def _shape(row: Row) -> str:
    plans = "" if row.get("plans") in (None, "1") else f", {row['plans']} plans {row.get('order', '')}"
    return f"{row['op']}, {row['rows']} x {row['hidden']}, {row['steering']}{plans}"


def _launch(row: Row) -> str:
    return f"{row['who']} {row['launch'].split()[0]}"


def _step(row: Row) -> str:
    attention = "" if row.get("attention") == "cuDNN last" else f", {row.get('attention', '')}"
    return f"{row['model']}, {row['rows']} rows, {row['prompt']}+{row['new']}, {row['who']}{attention}"


def _us(row: Row) -> str:
    return row["us"]


def _us_percent(row: Row) -> str:
    return f"{row['us']} ({row.get('percent_of_copy', '-')})"


def _ms_percent(row: Row) -> str:
    return f"{row['step_ms']} ({row.get('percent_of_weights', '-')})"


def _failures(rows: Sequence[Row], most: int = 12) -> str:
    def text(row: Row) -> str:
        names = ("stage", "op", "who", "rows", "steering", "plans")
        return f"{', '.join(row[name] for name in names if name in row)}: {row['failed']}"

    if not rows:
        return ""
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return "\n".join([f"{len(rows)} measurements failed:", *(text(row)[:200] for row in rows[:most]), *more])


if __name__ == "__main__":
    print(tables(records.read(Path(sys.argv[1]))))
