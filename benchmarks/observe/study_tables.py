"""The tables of docs/observe.md on the study of SmolLM2's tone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Study = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # head, lines
CONTEXTS = {
    "steered": "steered",
    "qk": "QK frozen",
    "ov": "OV frozen",
    "svv": "SVV ablated",
    "mlp": "MLP-direct ablated",
}


def share(row: Mapping[str, float], digits: int = 0, key: str = "value") -> str:
    value, low, high = (f"{round(100 * row[name], digits) + 0.0:.{digits}f}" for name in (key, "low", "high"))
    return f"{value} % [{low}, {high}]"


def signed(row: Mapping[str, float], scale: float, digits: int) -> str:
    """ "mean [low, high]", each with its sign."""
    values = (round(scale * row[name], digits) for name in ("mean", "low", "high"))
    mean, low, high = (f"{value:+.{digits}f}" if value else f"{0:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def answers(study: Study) -> Table:
    """The asked behaviour and its absence, each beside the paired change against steered, in points."""
    sides = ("induce", "suppress")
    rows = {(r["vector"], r["context"], r["side"]): r for r in study["answers"]}
    lines = [
        [name, *(share(rows[vector, context, side]["shown"], key="rate") for side in sides)]
        for name, vector, context in (("unsteered", "none", "unsteered"), ("random vector", "random", "steered"))
    ]
    for method in study["methods"]:
        for context, name in CONTEXTS.items():
            cells = []
            for side in sides:
                row = rows[method, context, side]
                change = "" if context == "steered" else f", {signed(row['change'], 100, 0)}"
                cells.append(share(row["shown"], key="rate") + change)
            lines.append([f"{method.upper()}, {name}", *cells])
    return (["", "cheerful, vector added", "not cheerful, subtracted"], lines)


def circuits(study: Study) -> Table:
    """How much of the effect circuits have, where there are test examples, and where their scores lie."""
    found = {(r["vector"], r["circuit"], r["share"]): r for r in study["faithfulness"]}
    (method,) = {vector for vector, circuit, _ in found if circuit == "own"}
    lines = []
    for part in (0.01, 0.05, 0.1, 0.2, 0.5):
        kinds = ("own", "complement", "random 0", "random 1")
        cells = [share(found[method, kind, part], 1) for kind in kinds]
        lines.append([f"{100 * part:g} % of the edges", *cells])
    names = [method.upper(), "all other edges", "random", "random, another"]
    return (["", *names], lines)


def kinds(study: Study) -> Table:
    """Shares of abs(score) by the kind of edge."""
    of = {"values": "v", "MLPs": "mlp", "the logits": "logits", "queries": "q", "keys": "k"}
    methods = list(study["patching"])
    scores = {method: {row["kind"]: row for row in study["patching"][method]["kinds"]} for method in methods}
    lines = [[name, *(share(scores[method][kind]) for method in methods)] for name, kind in of.items()]
    return (["share of abs(score) of edges into", *(method.upper() for method in methods)], lines)


def utility(study: Study) -> Table:
    """Loss, what the steering adds to it, and the change against steered with something withheld; vector subtracted."""
    rows = {(r["vector"], r["context"]): r for r in study["utility"] if r["side"] == "suppress"}
    lines = []
    for method in study["methods"]:
        costs = rows[method, "unsteered"]["loss_change"]
        added = {"mean": -costs["mean"], "low": -costs["high"], "high": -costs["low"]}
        cells = [signed(rows[method, name]["loss_change"], 1, 2) for name in list(CONTEXTS)[1:]]
        right = [share(rows[method, name]["right"], key="rate") for name in ("steered", "qk")]
        lines.append([method.upper(), signed(added, 1, 2), *cells, *right])
    head = ["subtracted", "steering adds", *list(CONTEXTS.values())[1:], "right answers, steered", "right, QK frozen"]
    return (head, lines)


TABLES: dict[str, tuple[str, Callable[[Study], Table]]] = {
    "tone_answers": ("observe/tone.json", answers),
    "tone_circuits": ("observe/tone.json", circuits),
    "tone_kinds": ("observe/tone.json", kinds),
    "tone_utility": ("observe/tone.json", utility),
}
