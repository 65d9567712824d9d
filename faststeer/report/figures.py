"""The report's figures as PNGs for papers, in colours that survive colour blindness and a grey printer."""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

from faststeer.extras import needed_for

with needed_for("a picture", "report"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from faststeer.evaluate.sweep import Line
from faststeer.report.choice import SettingChoice
from faststeer.report.findings import Findings, Measure
from faststeer.report.projections import Projected, colour_range

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
GREYS = ["#8a8a8a", "#c4c4c4"]  # of controls
GREY = GREYS[0]
IN_CELLS = 80  # more cells than these get no number
TOKENS_NAMED = 60  # at most, along an axis


def figures(
    findings: Findings,
    behaviour: Measure,
    price: Measure | None,
    choice: SettingChoice,
    projections: Projected | None = None,
) -> dict[str, bytes]:
    """Return PNGs by file name: `dose-response-NAME.png` and `heatmap-NAME.png` for every vector, `pareto.png`, and
    `projections.png` of an answer where one is given (`projected`).

    Without a price there is no front, and the heat map shows the behaviour alone.
    """
    made = {}
    names = file_names([*dict.fromkeys(line.vector for line in findings.lines if line.kind == "vector")])
    for vector, name in names.items():
        made[f"dose-response-{name}.png"] = _dose_response(findings, behaviour, vector)
        made[f"heatmap-{name}.png"] = _heat_maps(findings, behaviour, price, vector)
    if price is not None:
        made["pareto.png"] = _pareto(findings, behaviour, price, choice)
    if projections is not None:
        made["projections.png"] = _projections(projections)
    return made


def file_names(names: list[str]) -> dict[str, str]:
    """Names that are safe in file names and distinct, whatever a vector is called."""
    made: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "vector"
        lower = {other.lower() for other in made.values()}
        tries = (plain if n == 1 else f"{plain}-{n}" for n in range(1, len(names) + 2))
        made[name] = next(t for t in tries if t.lower() not in lower)
    return made


def doses(
    findings: Findings, vector: str, control: int | None = None
) -> dict[tuple[int, ...], list[tuple[float, int]]]:
    """`{layers: [(coefficient, setting), ...]}` of a vector, by rising coefficient.

    The unsteered model is coefficient 0, but for `clamp`, which has no coefficient that leaves the model alone.
    """
    curves: dict[tuple[int, ...], list[tuple[float, int]]] = {}
    for line in findings.lines:
        if line.kind in ("vector", "control") and (line.vector, line.control) == (vector, control):
            curves.setdefault(line.layers, []).append((_coefficient(line), line.setting))
    if findings.facts["description"].get("intervention") != "clamp":
        for curve in curves.values():
            curve.append((0.0, 0))
    return {layers: sorted(curve) for layers, curve in sorted(curves.items())}


def _coefficient(line: Line) -> float:
    assert line.coefficient is not None  # only the unsteered model and plans have none
    return line.coefficient


def _dose_response(findings: Findings, measure: Measure, vector: str) -> bytes:
    figure, axes = _axes("coefficient", measure.title, f"Dose and response: {_short(vector)}")
    for control in sorted({line.control for line in findings.lines if line.control is not None}):
        for curve in doses(findings, vector, control).values():
            _curve(axes, measure, curve, color=GREY, lw=0.8, ls=":", label="random vectors")
    for i, (layers, curve) in enumerate(doses(findings, vector).items()):
        colour = _colour(i, len(doses(findings, vector)))
        label = f"layer {','.join(map(str, layers))}"
        points = _curve(axes, measure, curve, color=colour, marker=MARKERS[i % len(MARKERS)], ms=4, label=label)
        band = [(x, p.low, p.high) for x, p in points if p.low is not None]
        if band:
            xs, low, high = zip(*band, strict=True)
            axes.fill_between(xs, low, high, color=colour, alpha=0.13, lw=0)
    base = measure.points[0]
    if base is not None:
        axes.axhline(base.value, color=GREY, ls="--", lw=1, label="unsteered")
    return with_legend(figure, axes)


def _curve(axes: Axes, measure: Measure, curve: list[tuple[float, int]], **style: Any) -> list[tuple[float, Any]]:
    points = [(x, measure.points[n]) for x, n in curve if measure.points[n] is not None]
    axes.plot([x for x, _ in points], [p.value for _, p in points if p is not None], **style)
    return points


def _heat_maps(findings: Findings, behaviour: Measure, price: Measure | None, vector: str) -> bytes:
    shown = [behaviour] if price is None else [behaviour, price]
    curves = doses(findings, vector)
    xs = sorted({x for curve in curves.values() for x, _ in curve})
    figure = Figure(
        figsize=(max(3.6, 0.62 * len(xs) + 1.4) * len(shown), 0.42 * len(curves) + 1.7), layout="constrained"
    )
    for axes, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        table = [[_value(measure, dict(curve).get(x)) for x in xs] for curve in curves.values()]
        span = {"vmin": 0, "vmax": 1} if measure.share else {}
        image = axes.imshow(table, cmap="cividis", aspect="auto", origin="lower", **span)
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(curves)), [",".join(map(str, layers)) for layers in curves])
        axes.set_title(plain(_wrapped(measure.title)), fontsize=9)
        axes.set(xlabel="coefficient", ylabel="layer")
        if len(xs) * len(curves) <= IN_CELLS:
            _numbers(axes, table, image)
        figure.colorbar(image, ax=axes)
    figure.suptitle(_short(vector), fontsize=11)
    return saved(figure)


def _numbers(axes: Axes, table: list[list[float]], image: Any) -> None:
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                colour = "black" if image.norm(value) > 0.5 else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)


def _value(measure: Measure, setting: int | None) -> float:
    point = None if setting is None else measure.points[setting]
    return float("nan") if point is None else point.value


def _pareto(findings: Findings, behaviour: Measure, price: Measure, choice: SettingChoice) -> bytes:
    figure, axes = _axes(cost_title(price), behaviour.title, "Behaviour against its price")
    groups: dict[str, list[int]] = {}
    for line in findings.lines[1:]:
        if choice.costs[line.setting] is not None and behaviour.points[line.setting] is not None:
            groups.setdefault("" if line.kind == "control" else line.vector, []).append(line.setting)

    def at(numbers: tuple[int, ...] | list[int]) -> tuple[list[float], list[float]]:
        return [choice.costs[n] or 0.0 for n in numbers], [_value(behaviour, n) for n in numbers]

    axes.scatter(*at(groups.pop("", [])), s=12, marker="x", color=GREY, lw=0.8, label="random vectors")
    for i, (name, numbers) in enumerate(groups.items()):
        style: dict[str, Any] = {"s": 22, "marker": MARKERS[i % len(MARKERS)], "edgecolor": _colour(i, len(groups))}
        inside, outside = [n for n in numbers if n in choice.eligible], [n for n in numbers if n not in choice.eligible]
        axes.scatter(*at(inside), color=_colour(i, len(groups)), **style, label=_short(name))
        axes.scatter(*at(outside), facecolor="none", **style, label=f"{_short(name)}, no better than chance")
    if choice.front:
        axes.step(*at((0, *choice.front)), where="post", color="black", lw=1, label="front")
    if choice.recommended is not None:
        name = findings.lines[choice.recommended].name
        axes.scatter(*at([choice.recommended]), s=150, marker="*", color="black", label=f"use {_short(name)}", zorder=5)
    return with_legend(figure, axes)


def _projections(shown: Projected) -> bytes:
    """Layers by tokens, the unsteered answer above the steered one, on one scale; the line is the prompt's end."""
    n_tokens, low_high = max(len(texts) for texts in shown.texts), colour_range(*shown.values)
    height = 0.16 * len(shown.values[0]) + 1.5
    figure = Figure(figsize=(min(max(6.0, 0.16 * n_tokens + 1.6), 14.0), 2 * height), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, name, texts, values in zip(panels, ("unsteered", "steered"), shown.texts, shown.values, strict=True):
        image = axes.imshow(
            values,
            cmap="cividis",
            aspect="auto",
            origin="lower",
            interpolation="none",
            vmin=low_high[0],
            vmax=low_high[1],
        )
        every = -(-n_tokens // TOKENS_NAMED)
        labels = [plain(token_label(text)) for text in texts]
        axes.set_xticks(range(0, len(texts), every), labels[::every], rotation=90, fontsize=6)
        axes.set_xlim(-0.5, n_tokens - 0.5)
        axes.axvline(shown.of_prompt - 0.5, color="white", lw=1.2, ls=":")
        axes.set_title(name, fontsize=9)
        axes.set_yticks(*_site_ticks(len(values)), fontsize=7)
        axes.set_ylabel("enters layer", fontsize=8)
    figure.colorbar(image, ax=panels)
    figure.suptitle(plain("\n".join(textwrap.wrap(shown.title, 80)[:3])), fontsize=10)
    return saved(figure)


def _site_ticks(n: int) -> tuple[list[int], list[str]]:
    """Up to 16 of the layers that are entered, and what leaves the last one."""
    places = [*range(0, n - 1, -(-n // 16)), n - 1]
    return places, [*map(str, places[:-1]), "out"]


def token_label(text: str) -> str:
    """A token as a label: line ends and lone spaces are seen."""
    text = text.replace("\n", "⏎").strip() or "␣"
    return text if len(text) <= 14 else f"{text[:13]}…"


def cost_title(price: Measure) -> str:
    """What a cost is the amount of."""
    what = {"increase": "increase of", "drop": "drop of", "change": "change of"}[price.price]
    return f"{what} {price.title}"


def _axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=plain(_wrapped(x)), ylabel=plain(_wrapped(y)), title=title)
    axes.grid(alpha=0.25)
    return figure, axes


def _colour(i: int, n: int) -> Any:
    return COLOURS[i % len(COLOURS)] if n <= len(COLOURS) else mpl.colormaps["viridis"](0.92 * i / (n - 1))


def plain(text: str) -> str:
    """Text of others is never read as mathematics."""
    return text.replace("$", r"\$")


def _short(name: str) -> str:
    return plain(name if len(name) <= 40 else name[:39] + "…")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 46)[:3])


def with_legend(figure: Figure, axes: Axes) -> bytes:
    """The figure as a PNG, with a legend beside it that names each label once."""
    labels: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        labels.setdefault(label, handle)
    axes.legend(labels.values(), labels.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return saved(figure)


def saved(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
