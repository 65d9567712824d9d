"""The demonstration's pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from faststeer.extras import needed_for

with needed_for("a picture", "report"):
    from matplotlib.figure import Figure

RED, BLUE, GREY = "#c0392b", "#2471a3", "#7f8c8d"


def tone_dose_response(entries: Sequence[dict[str, Any]], layer: int) -> bytes:
    """VADER's score and the answers' perplexity against the coefficient, next to random vectors of the same norm."""
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2.2, 1))
    at = [entry["coefficient"] for entry in entries]
    for name, color, label in (
        ("", RED, f"tone vector, layer {layer}"),
        ("random_", GREY, "random vectors, same norm"),
    ):
        upper.plot(at, [e[f"{name}score"] for e in entries], color=color, marker="o", label=label)
        upper.fill_between(
            at, [e[f"{name}low"] for e in entries], [e[f"{name}high"] for e in entries], color=color, alpha=0.15, lw=0
        )
    upper.set(ylabel="VADER score of the answers", ylim=(-1.03, 1.03), title="SmolLM2-135M: dose and response")
    upper.legend(fontsize=8, loc="lower right", frameon=False)
    lower.plot(at, [entry["perplexity"] for entry in entries], color=BLUE, marker="o")
    top = 1.1 * max(entry["perplexity"] for entry in entries)
    lower.set(xlabel="coefficient (1: the difference of the means, once)", ylabel="perplexity", ylim=(0, top))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    return _saved(figure)


def tone_layers(points: Sequence[dict[str, Any]], chosen: int, unsteered: float) -> bytes:
    """VADER's score at +1 and -1 against the layer, on the questions that the layer is chosen by."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    at = [point["layer"] for point in points]
    axes.plot(at, [point["added"] for point in points], color=RED, marker="o", label="added (+1)")
    axes.plot(at, [point["subtracted"] for point in points], color=BLUE, marker="o", label="subtracted (-1)")
    axes.axhline(unsteered, color=GREY, lw=1, label="unsteered")
    axes.axvline(chosen, color=GREY, linestyle=":", label="chosen")
    axes.set(xlabel="layer", ylabel="VADER score of the answers", ylim=(-1.03, 1.03), xticks=at)
    axes.set_title(f"SmolLM2-135M: which layer ({points[0]['n']} questions)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _saved(figure)


def refusal_dose_response(series: dict[str, list[dict[str, Any]]]) -> bytes:
    """Refusal rate against the coefficient: the vector added on harmless prompts, subtracted on harmful ones."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = {"added": (RED, "added, harmless prompts"), "subtracted": (BLUE, "subtracted, harmful prompts")}
    for name, (color, label) in labels.items():
        points = series[name]
        at = [point["coefficient"] for point in points]
        axes.plot(at, [point["rate"] for point in points], color=color, marker="o", label=label)
        axes.fill_between(at, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.15, lw=0)
    axes.set(xlabel="coefficient", ylabel="share of answers that refuse", ylim=(-0.03, 1.03), title="The toy's refusal")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _saved(figure)


def _saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
