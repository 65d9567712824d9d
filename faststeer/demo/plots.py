"""The demonstration's two pictures, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RED, BLUE, GREY = "#c0392b", "#2471a3", "#7f8c8d"


def dose_response(series: dict[str, list[dict[str, Any]]]) -> bytes:
    """Refusal rate against the coefficient: the vector added on harmless prompts, subtracted on harmful ones."""
    figure, axes = _axes("coefficient", "Dose and response")
    _curves(axes, series, "coefficient")
    return _png(figure, axes)


def layer_sweep(series: dict[str, list[dict[str, Any]]], chosen: int) -> bytes:
    """Refusal rate against the layer whose direction is used there, at coefficient 1."""
    figure, axes = _axes("layer", "Which layer")
    _curves(axes, series, "layer")
    axes.axvline(chosen, color=GREY, linestyle=":", label="selected on validation prompts")
    axes.set_xticks([point["layer"] for point in series["added"]])
    return _png(figure, axes)


def _axes(x: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel="share of answers that refuse", title=title, ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25)
    return figure, axes


def _curves(axes: Axes, series: dict[str, list[dict[str, Any]]], x: str) -> None:
    labels = {"added": (RED, "added, harmless prompts"), "subtracted": (BLUE, "subtracted, harmful prompts")}
    for name, (color, label) in labels.items():
        points = series[name]
        at = [point[x] for point in points]
        axes.plot(at, [point["rate"] for point in points], color=color, marker="o", label=label)
        axes.fill_between(at, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.15, lw=0)
        axes.plot(
            at, [p["coherent"] for p in points], color=color, lw=1, ls="--", alpha=0.6, label=f"  {name}: coherent"
        )


def _png(figure: Figure, axes: Axes) -> bytes:
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
