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
    """Return one row per measurement: peer, measure, case, round, repeat, seconds, tokens, value, note.

    `value` of "difference" is the largest absolute difference of logits from the baseline's in the same case and round
    as well as, in `scale`, the largest absolute logit of the baseline. A note says why there is no value.
    """
    logits = {
        (x["peer"], x["round"], x["case"]): x["file"] for x in lines if x.get("measure") == "logits" and "file" in x
    }
    rows: list[dict[str, Any]] = []
    for line in lines:
        if line["measure"] == "load":
            continue
        note = line.get("unsupported") or line.get("failed") or ""
        row = {"peer": line["peer"], "measure": line["measure"], "case": line.get("case", ""), "round": line["round"]}
        row |= {"repeat": line.get("repeat", ""), "seconds": "", "tokens": line.get("tokens", ""), "value": ""}
        row |= {"scale": "", "note": ("no: " if "unsupported" in line else "failed: " if note else "") + note}
        if "seconds" in line:
            row["seconds"] = f"{line['seconds']:.4f}"
        if line["measure"] == "logits":
            row["measure"] = "difference"
            mine, base = (logits.get((peer, line["round"], line["case"])) for peer in (line["peer"], BASELINE))
            if mine and base:
                a, b = np.load(mine), np.load(base)
                row |= {"value": f"{np.abs(a - b).max():.2e}", "scale": f"{np.abs(b).max():.1f}"}
        if line["measure"] in ("vector", "generate", "logits") or note:
            rows.append(row)
    return rows


def renewed(old: Sequence[Row], new: Sequence[Row], peers: Sequence[str]) -> list[Row]:
    """Return new rows of `peers` and the old ones of all others. New rounds are numbered behind the old ones, and the
    baseline keeps both, since ratios are of one round."""
    shift = 1 + max((int(row["round"]) for row in old), default=-1)
    kept = [row for row in old if row["peer"] == BASELINE or row["peer"] not in peers]
    later = [{**row, "round": int(row["round"]) + shift} for row in new]
    order = list(dict.fromkeys(row["peer"] for row in (*old, *new)))
    return sorted([*kept, *later], key=lambda row: order.index(row["peer"]))


def values(rows: Sequence[Row], peer: str, measure: str, case: str = "") -> dict[int, float]:
    """Return the median of each round: seconds to a vector, or tokens per second."""
    rounds: dict[int, list[float]] = {}
    for row in rows:
        if (row["peer"], row["measure"], row["case"]) == (peer, measure, case) and row["seconds"]:
            seconds = float(row["seconds"])
            rounds.setdefault(int(row["round"]), []).append(
                seconds if measure == "vector" else float(row["tokens"]) / seconds
            )
    return {round_: statistics.median(numbers) for round_, numbers in rounds.items()}


def ratios(rows: Sequence[Row], peer: str, case: str) -> list[float]:
    """Return the tokens per second over those of hand-written hooks in the same case and round."""
    mine, base = values(rows, peer, "generate", case), values(rows, BASELINE, "generate", case)
    return [mine[round_] / base[round_] for round_ in mine if round_ in base]


def note(rows: Sequence[Row], peer: str, case: str = "") -> str:
    """Return why the peer has no value for the case: its own note, or why its process ended."""
    notes = [row["note"] for row in rows if row["peer"] == peer and row["note"]]
    own = [row["note"] for row in rows if row["peer"] == peer and row["note"] and row["case"] == case]
    return (own or notes or ["not measured"])[0]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table: seconds to a vector, tokens per second and, in brackets, the median ratio to hooks."""
    lines = [
        "| | s to a vector | tokens/s unsteered | one layer | every layer | a plan per row | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    reasons = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        seconds = values(rows, peer, "vector")
        cells = [_number(seconds, rows, peer, "", ".1f")]
        for case in CASES:
            rates = values(rows, peer, "generate", case)
            text = _number(rates, rows, peer, case, ".0f")
            factors = ratios(rows, peer, case)
            if factors and peer != BASELINE:
                text += f" ({statistics.median(factors):.2f}x)"
            cells.append(text)
        found = [row for row in rows if row["peer"] == peer and row["case"] == "every layer" and row["value"]]
        cells.append("-" if not found else f"{max(float(row['value']) for row in found):.0e}")
        if all(cell == "failed" for cell in cells[:2]):
            reasons.append(f"{peer}: {note(rows, peer)}")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _number(numbers: Mapping[int, float], rows: Sequence[Row], peer: str, case: str, form: str) -> str:
    if numbers:
        return f"{statistics.median(numbers.values()):{form}}"
    return "no" if note(rows, peer, case).startswith("no: ") else "failed"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens per second at one layer, at every layer and with a plan per row, a bar per peer; "no" where a peer
    cannot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = list(dict.fromkeys(row["peer"] for row in rows))[::-1]
    cases = CASES[1:]
    figure, axes = plt.subplots(1, len(cases), figsize=(10, 0.5 + 0.4 * len(peers)), sharey=True)
    top = max((v for p in peers for c in cases for v in values(rows, p, "generate", c).values()), default=1.0)
    for axis, case in zip(axes, cases, strict=True):
        for place, peer in enumerate(peers):
            rounds = list(values(rows, peer, "generate", case).values())
            if not rounds:
                text = "no" if note(rows, peer, case).startswith("no: ") else "failed"
                axis.text(0.01 * top, place, text, va="center", color="#666666")
                continue
            middle = statistics.median(rounds)
            error = [[middle - min(rounds)], [max(rounds) - middle]]
            colour = "#0072b2" if peer.startswith("faststeer") else "#b0b0b0"
            axis.barh(place, middle, color=colour, xerr=error, error_kw={"lw": 1})
            axis.text(max(rounds) + 0.02 * top, place, f"{middle:.0f}", va="center")
        axis.set_title({"plan per row": "a plan per row"}.get(case, f"steered at {case}"), fontsize=10)
        axis.set_xlim(0, 1.2 * top)
        axis.set_xlabel("tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(peers)), peers)
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)
