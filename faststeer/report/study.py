"""A study (`faststeer observe`) as one HTML page and as PNGs: the tables and figures of arXiv 2604.08524's kinds.

All of it is drawn from the study's JSON alone; no model is needed, and no number is made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from faststeer.extras import needed_for

with needed_for("a picture", "report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

from faststeer.report.document import render
from faststeer.report.figures import COLOURS, GREY, GREYS, MARKERS, plain, with_legend

CONTEXTS = {
    "unsteered": "unsteered",
    "steered": "steered",
    "qk": "QK frozen",
    "ov": "OV frozen",
    "svv": "SVV ablated",
    "mlp": "MLP-direct ablated",
}
KINDS = {"q": "queries", "k": "keys", "v": "values", "mlp": "MLPs", "logits": "logits"}
SIDES = {"induce": "the behaviour, vector added", "suppress": "its opposite, vector subtracted"}
RULES = {
    "paper": "paper's text: effect / coordinate",
    "code": "paper's code",
    "effect": "smallest effects out",
    "magnitude": "smallest coordinates out",
    "random": "random",
}
SIZE = "share of the edges in the circuit"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
HIGH = 0.85  # of the effect: "carries it", as the paper says it


@dataclass(frozen=True)
class Series:
    """A curve, bars or points. `low` and `high` are 95 % intervals, where there are any. A control is grey."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    control: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure, drawn on the page and as PNG alike.

    Args:
        unit: of y: "share" is written in percent.
        level: a dashed line across. log: of the x axis's shares.
        part: section of the page.
        range: of the y axis; filled in by `charts`.
    """

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    kind: Literal["lines", "bars", "points"] = "lines"
    unit: Literal["share", "nats"] = "share"
    level: float | None = None
    log: bool = False
    part: str = field(default="", repr=False)
    range: tuple[float, float] = (0.0, 1.0)


def charts(study: Mapping[str, Any]) -> list[Chart]:
    """Every figure of a study."""
    made = [_answers(study, side) for side in SIDES] + [_loss(study, side) for side in SIDES if study.get("utility")]
    if study["faithfulness"]:
        made += [_faithfulness(study, "own"), _faithfulness(study, "complement")]
    if study["overlap"]:
        made.append(_overlap(study))
    if study["patching"]:
        made.append(_kinds(study))
    pairs = dict.fromkeys((row["vector"], row["side"]) for row in study["sparsity"])
    made += [_sparsity(study, vector, side) for vector, side in pairs]
    return [replace(chart, range=_range(chart)) for chart in made]


def _range(chart: Chart) -> tuple[float, float]:
    """From 0 to 1 for shares, further where a value lies outside (faithfulness may); what there is for nats. Values
    decide, and the intervals of bars and points: a curve's band may be cut off."""
    values = [y for series in chart.series for y in series.y if y is not None]
    values += [] if chart.level is None else [chart.level]
    if chart.kind != "lines":
        values += [end for series in chart.series for end in (*series.low, *series.high) if end is not None]
    low, high = min(values), max(values)
    if chart.unit == "share":
        low, high = min(0.0, low), max(1.0, high)
    room = 0.05 * (high - low)
    return low - room if low != 0 else 0.0, high + room


def _answers(study: Mapping[str, Any], side: str) -> Chart:
    rows = [row for row in study["answers"] if row["side"] == side]
    series = []
    for vector in dict.fromkeys(row["vector"] for row in rows):
        own = [row for row in rows if row["vector"] == vector]
        x = [CONTEXTS[row["context"]] for row in own]
        series.append(_with_interval(vector, x, [row["shown"] for row in own], "rate", vector in ("none", "random")))
    title = f"Answers with {SIDES[side]}"
    return Chart(f"answers-{side}", title, "", "answers", series, "bars", part="answers")


def _loss(study: Mapping[str, Any], side: str) -> Chart:
    rows, series = [row for row in study["utility"] if row["side"] == side], []
    for vector in study["methods"]:
        own = [row for row in rows if row["vector"] == vector]
        x = [CONTEXTS[row["context"]] for row in own]
        series.append(_with_interval(vector, x, [row["loss"] for row in own], "mean"))
    (base,) = (row["loss"]["mean"] for row in rows if row["vector"] == "none")
    title = f"Loss on neutral text, {'vector added' if side == 'induce' else 'vector subtracted'}"
    return Chart(f"loss-{side}", title, "", "nats per token", series, "points", "nats", base, part="utility")


def _faithfulness(study: Mapping[str, Any], which: str) -> Chart:
    rows, series = study["faithfulness"], []
    for vector in study["patching"]:
        own = [row for row in rows if row["vector"] == vector and row["circuit"] == which]
        if own:
            series.append(_with_interval(vector, [row["share"] for row in own], own, "value"))
    if which == "own":
        for vector, name in dict.fromkeys(
            (r["vector"], r["circuit"]) for r in rows if r["circuit"].startswith("random")
        ):
            own = [row for row in rows if (row["vector"], row["circuit"]) == (vector, name)]
            series.append(Series("random circuits", [r["share"] for r in own], [r["value"] for r in own], control=True))
    title = {"own": "Faithfulness of circuits", "complement": "Faithfulness of what is outside the circuit"}[which]
    level = HIGH if which == "own" else 0.0
    return Chart(
        f"faithfulness-{which}", title, SIZE, "faithfulness", series, level=level, log=True, part="faithfulness"
    )


def _overlap(study: Mapping[str, Any]) -> Chart:
    rows, series = study["overlap"], []
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in rows):
        own = [row for row in rows if (row["a"], row["b"]) == (a, b)]
        name = "with random circuits" if b == "random" else f"{a} and {b}"
        series.append(Series(name, [r["share"] for r in own], [r["iou"] for r in own], control=b == "random"))
    y = "edges in both / in either"
    return Chart("overlap", "How alike circuits are", SIZE, y, series, log=True, part="overlap")


def _kinds(study: Mapping[str, Any]) -> Chart:
    series = []
    for vector, patched in study["patching"].items():
        x = [KINDS[row["kind"]] for row in patched["kinds"]]
        series.append(_with_interval(vector, x, patched["kinds"], "value"))
    title = "What edges enter: share of the sum of abs(score)"
    return Chart("kinds", title, "edges into", "share of abs(score)", series, "bars", part="kinds")


def _sparsity(study: Mapping[str, Any], vector: str, side: str) -> Chart:
    rows = [row for row in study["sparsity"] if (row["vector"], row["side"]) == (vector, side)]
    series = []
    for rule, seed in dict.fromkeys((row["rule"], row["seed"]) for row in rows if row["rule"] is not None):
        own = sorted((r for r in rows if (r["rule"], r["seed"]) == (rule, seed)), key=lambda r: r["sparsity"])
        series.append(_with_interval(RULES[rule], [r["sparsity"] for r in own], own, "rate", rule == "random"))
    base = next(row["rate"] for row in rows if row["rule"] is None)
    title = f"{vector}: {SIDES[side]}, against sparsity"
    x, name = "share of coordinates that are zero", f"sparsity-{vector}-{side}"
    return Chart(name, title, x, "answers", series, level=base, part="sparsity")


def _with_interval(name: str, x: Sequence[Any], rows: Iterable[Any], value: str, control: bool = False) -> Series:
    listed = list(rows)
    y, low, high = ([row[key] for row in listed] for key in (value, "low", "high"))
    return Series(name, x, y, low, high, control)


# The page -------------------------------------------------------------------------------------------------------------


def study_page(study: Mapping[str, Any], title: str | None = None) -> str:
    """Return the HTML of a study, from its JSON.

    Raises:
        ImportError: Jinja or Plotly is not installed.
    """
    drawn = charts(study)
    context = {
        "title": title or f"What drives {study['behaviour']} steering of {study['model'] or 'the model'}",
        "study": study,
        "charts": {part: [c for c in drawn if c.part == part] for part in dict.fromkeys(c.part for c in drawn)},
        "contexts": CONTEXTS,
        "kinds": KINDS,
        "sides": SIDES,
        "reached": {vector: reached(study, vector) for vector in study["patching"]},
        "compared": [row for row in study["overlap"] if "intervals" in row],
        "others": [row for row in study["faithfulness"] if row["circuit"] in study["patching"]],
        "share": _share,
        "high": HIGH,
    }
    return render("study", context, {"charts": json.dumps([asdict(chart) for chart in drawn], allow_nan=False)})


def reached(study: Mapping[str, Any], vector: str) -> dict[str, Any] | None:
    """The smallest of a vector's own circuits that carries HIGH of its effect; None if none was tried that does."""
    own = (row for row in study["faithfulness"] if (row["vector"], row["circuit"]) == (vector, "own"))
    return next((row for row in own if row["value"] >= HIGH), None)


def _share(row: Mapping[str, Any], key: str = "value") -> str:
    """A share in percent with its interval."""
    return f"{100 * row[key]:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


# PNGs -----------------------------------------------------------------------------------------------------------------


def study_figures(study: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the same figures as PNGs by file name."""
    return {f"{chart.name}.png": _png(chart) for chart in charts(study)}


def _png(chart: Chart) -> bytes:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=plain(chart.x), ylabel=plain(chart.y), title=plain(chart.title))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.set_ylim(*chart.range)
    if chart.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    (_lines if chart.kind == "lines" else _groups)(axes, chart)
    if chart.log:
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{100 * tick:g} %" for tick in TICKS])
    if chart.level is not None:
        axes.axhline(chart.level, color=GREY, ls="--", lw=1)
    return with_legend(figure, axes)


def _lines(axes: Axes, chart: Chart) -> None:
    for series, colour in zip(chart.series, _colours(chart), strict=True):
        y = [float("nan") if value is None else value for value in series.y]
        style: dict[str, Any] = {"ls": ":", "lw": 0.9}
        if not series.control:
            style = {"marker": MARKERS[COLOURS.index(colour)], "ms": 4}
        axes.plot(series.x, y, color=colour, label=plain(series.name), **style)
        if series.low and not series.control:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.13)  # type: ignore[arg-type]


def _groups(axes: Axes, chart: Chart) -> None:
    places = list(dict.fromkeys(x for series in chart.series for x in series.x))
    at = {place: [s for s in chart.series if place in s.x] for place in places}
    for series, colour in zip(chart.series, _colours(chart), strict=True):
        for i, place in enumerate(series.x):
            width = 0.8 / len(at[place])
            x = places.index(place) + (at[place].index(series) + 0.5) * width - 0.4
            y, low, high = series.y[i] or 0.0, series.low[i] or 0.0, series.high[i] or 0.0
            if chart.kind == "bars":
                axes.bar(x, y, width * 0.92, color=colour, label=plain(series.name))
            else:
                axes.plot(x, y, "o", color=colour, label=plain(series.name))
            axes.vlines(x, low, high, color="black" if chart.kind == "bars" else colour, lw=1)
    axes.set_xticks(range(len(places)), [plain(str(place)) for place in places], fontsize=8)


def _colours(chart: Chart) -> list[str]:
    """Of each series; a name keeps its own."""
    names = {of: list(dict.fromkeys(s.name for s in chart.series if s.control == of)) for of in (False, True)}
    shades = {False: COLOURS, True: GREYS}
    return [shades[s.control][names[s.control].index(s.name) % len(shades[s.control])] for s in chart.series]
