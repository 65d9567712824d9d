"""From the peers' measurements to rows for a CSV file, the table of README and docs, and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BASELINE = "hand-written hooks"
CASES = ("unsteered", "one layer", "every layer", "plan per row")
Row = Mapping[str, Any]


def rows_of(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row per measurement: peer, measure, case, repeat, seconds, tokens, value, scale, note; peers in the
    order in which they come first.

    `value` of "difference" is the largest absolute difference of logits from the baseline's in the same case and, in
    `scale`, the largest absolute logit of the baseline. A note says why there is no value.
    """
    logits = {(x["peer"], x["case"]): x["file"] for x in lines if x["measure"] == "logits" and "file" in x}
    rows: list[dict[str, Any]] = []
    for line in lines:
        note = line.get("unsupported") or line.get("failed") or ""
        row = {"peer": line["peer"], "measure": line["measure"], "case": line.get("case", "")}
        row |= {"repeat": "" if line["repeat"] is None else line["repeat"], "seconds": ""}
        row |= {"tokens": line.get("tokens", ""), "value": "", "scale": ""}
        row["note"] = ("no: " if "unsupported" in line else "failed: " if note else "") + note
        if "seconds" in line:
            row["seconds"] = f"{line['seconds']:.4f}"
        if line["measure"] == "logits":
            row["measure"] = "difference"
            mine, base = (logits.get((peer, line["case"])) for peer in (line["peer"], BASELINE))
            if mine and base:
                a, b = np.load(mine), np.load(base)
                row |= {"value": f"{np.abs(a - b).max():.2e}", "scale": f"{np.abs(b).max():.1f}"}
        if line["measure"] in ("vector", "generate", "logits") or note:
            rows.append(row)
    order = list(dict.fromkeys(row["peer"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["peer"]))


def values(rows: Sequence[Row], peer: str, measure: str, case: str = "") -> dict[int, float]:
    """Return seconds to a vector, or tokens per second, by repeat."""
    of_case = [row for row in rows if (row["peer"], row["measure"], row["case"]) == (peer, measure, case)]
    seconds = {int(row["repeat"]): (row, float(row["seconds"])) for row in of_case if row["seconds"]}
    return {n: took if measure == "vector" else float(row["tokens"]) / took for n, (row, took) in seconds.items()}


def ratios(rows: Sequence[Row], peer: str, case: str) -> list[float]:
    """Return the tokens per second over those of hand-written hooks in the same case and repeat."""
    mine, base = values(rows, peer, "generate", case), values(rows, BASELINE, "generate", case)
    return [rate / base[repeat] for repeat, rate in mine.items() if repeat in base]


def note(rows: Sequence[Row], peer: str, case: str = "") -> str:
    """Return why the peer has no value for the case: its own note, or why its process ended."""
    notes = [row["note"] for row in rows if row["peer"] == peer and row["note"]]
    own = [row["note"] for row in rows if row["peer"] == peer and row["note"] and row["case"] == case]
    return (own or notes or ["not measured"])[0]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table: the median seconds to a vector; of the baseline the median tokens per second, of each peer its
    ratio to them, the median and in brackets the lowest and the highest."""
    head = ["", "s to a vector", "unsteered", "one layer", "every layer", "a plan per row", "largest difference"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    reasons = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        seconds = list(values(rows, peer, "vector").values())
        cells = [f"{statistics.median(seconds):.1f}" if seconds else _why(rows, peer)]
        for case in CASES:
            if peer == BASELINE and (rates := values(rows, peer, "generate", case)):
                cells.append(f"1 ({statistics.median(rates.values()):.0f} tokens/s)")
            elif factors := ratios(rows, peer, case):
                cells.append(f"{statistics.median(factors):.2f} ({min(factors):.2f} to {max(factors):.2f})")
            else:
                cells.append(_why(rows, peer, case))
        differences = [row for row in rows if row["peer"] == peer and row["case"] == "every layer" and row["value"]]
        cells.append("-" if not differences else f"{max(float(row['value']) for row in differences):.0e}")
        if all(cell == "failed" for cell in cells[:2]):
            reasons.append(f"{peer}: {note(rows, peer)}")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _why(rows: Sequence[Row], peer: str, case: str = "") -> str:
    """A word for a missing value: the peer cannot do it, or it failed."""
    return "no" if note(rows, peer, case).startswith("no: ") else "failed"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw how many times as fast as hand-written hooks each peer is at one layer, at every layer and with a plan per
    row: a bar to the median, a line from the lowest to the highest; "no" where a peer cannot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    cases = CASES[1:]
    figure, axes = plt.subplots(1, len(cases), figsize=(10, 0.5 + 0.4 * len(peers)), sharey=True)
    top = max((ratio for p in peers for c in cases for ratio in ratios(rows, p, c)), default=1.0)
    for axis, case in zip(axes, cases, strict=True):
        for place, peer in enumerate(peers):
            factors = ratios(rows, peer, case)
            if not factors:
                axis.text(0.01 * top, place, _why(rows, peer, case), va="center", color="#666666")
                continue
            middle = statistics.median(factors)
            error = [[middle - min(factors)], [max(factors) - middle]]
            colour = "#0072b2" if peer.startswith("faststeer") else "#b0b0b0"
            axis.barh(place, middle, color=colour, xerr=error, error_kw={"lw": 1})
            axis.text(max(factors) + 0.02 * top, place, f"{middle:.2f}", va="center")
        axis.axvline(1, color="#666666", lw=0.8, zorder=0)
        axis.set_title({"plan per row": "a plan per row"}.get(case, f"steered at {case}"), fontsize=10)
        axis.set_xlim(0, 1.2 * top)
        axis.set_xlabel("times as fast as hooks")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(peers)), peers)
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)
