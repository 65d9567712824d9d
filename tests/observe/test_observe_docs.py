"""docs/observe.md: its examples run one after the other, and its figures are those of the results file."""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path

import torch

import faststeer as fs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "observe.md").read_text(encoding="utf-8")


def test_the_examples_run():
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(example, "docs/observe.md", "exec"), names)
    assert names["taken"][0]["resid_pre", 5].shape == (len(names["taken"][0].positions), 128)
    assert any(row.flips.any() for row in names["found"])
    assert names["change"].shape[0] == names["width"]
    assert len(names["tops"]) == 4 * 4
    assert names["texts"] == names["served"]
    width = names["batch"]["input_ids"].shape[1]
    decoded = [names["tokenizer"].decode(row, skip_special_tokens=True) for row in names["out"][:, width:]]
    assert decoded == names["texts"]
    assert names["texts"] != fs.evaluate.complete(
        names["model"], names["tokenizer"], names["prompts"], max_new_tokens=8
    )
    assert torch.equal(names["part"].base.isfinite(), torch.ones_like(names["part"].base, dtype=torch.bool))


def test_the_figures_are_measured():
    with (ROOT / "benchmarks" / "results" / "freezing_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["rows"], row["new_tokens"]) for row in rows} == {("16", "256")}
    seconds = {}
    for row in rows:
        seconds.setdefault(row["case"], []).append(float(row["seconds"]))
        assert row["tokens_as_with_caches"] in ("", "1.0000")
    lines = {
        "steered, not frozen": "steered",
        "QK frozen, with caches": "with caches",
        "QK frozen, recomputed, both halves in one pass per token": "recomputing, one pass",
        "QK frozen, recomputed, two passes per token": "recomputing, two passes",
    }
    for line, case in lines.items():
        assert f"| {line} | {statistics.median(seconds[case]):.1f} |" in PAGE
    slowest = max(seconds["with caches"])
    assert min(*seconds["recomputing, one pass"], *seconds["recomputing, two passes"]) >= 5 * slowest


def test_the_studys_figures_are_those_of_its_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "observe" / "refusal.json").read_text(encoding="utf-8"))
    assert f"`{found['command']}`" in PAGE
    assert (found["layer"], found["position"], found["n_prompts"]) == (3, -1, {"induce": 48, "suppress": 48})
    for row in found["answers"]:  # the table has one line for all vectors
        steered = row["vector"] in found["methods"]
        shown = [round(100 * row["shown"][key]) for key in ("rate", "low", "high")]
        assert shown == ([100, 93, 100] if steered else [0, 0, 7])
    curves = {(r["vector"], r["circuit"], r["share"]): r for r in found["faithfulness"]}

    def line(name, cells):
        assert f"| {name} | " + " | ".join(cells) + " |" in PAGE, (name, cells)

    def share(row, digits=0):
        value, low, high = (f"{100 * row[key]:.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} % [{low}, {high}]"

    names = found["methods"]
    line("faithfulness of the one edge steering -> logits", [share(curves[n, "own", 0.01]) for n in names])
    line("of all edges but that one", [share(curves[n, "complement", 0.01], 1) for n in names])
    line("of 10 % of the edges", [share(curves[n, "own", 0.1]) for n in names])
    kinds = {name: {row["kind"]: row for row in found["patching"][name]["kinds"]} for name in names}
    line("share of abs(score) that enters the logits", [share(kinds[n]["logits"]) for n in names])
    line("... values", [share(kinds[n]["v"], 1) for n in names])
    line("... queries and keys", [f"{100 * (kinds[n]['q']['value'] + kinds[n]['k']['value']):.1f} %" for n in names])
    for name in names:
        (top, *_) = found["patching"][name]["top"]
        assert (top["sender"], top["receiver"], curves[name, "own", 0.01]["edges"]) == ("steering", "logits", 1)
        assert found["patching"][name]["n_edges"] == 190
    overlaps = {(r["a"], r["b"]): r for r in found["overlap"] if r["share"] == 0.1}
    for (a, b), row in overlaps.items():
        if b != "random":
            random = ", ".join(f"{100 * overlaps[each, 'random']['iou']:.0f} %" for each in (a, b))
            ours = [f"{row['cosine']:.2f}", *(share(row["intervals"][key]) for key in ("fraction", "iou")), random]
            line(f"{a.upper()}, {b.upper()}", ours)
            assert all(2.5 < row["shared"] / overlaps[each, "random"]["shared"] <= 5 for each in (a, b))
    crossed = [100 * r["value"] for r in found["faithfulness"] if r["circuit"] in names]
    assert (round(min(crossed)), round(max(crossed))) == (95, 101)
    rates = {(r["vector"], r["side"], r["rule"], r["sparsity"], r["seed"]): r for r in found["sparsity"]}
    assert (
        rates["dim", "induce", "effect", 0.9, 0]["rate"] == 1 and rates["dim", "induce", "effect", 0.9, 0]["kept"] == 13
    )
    assert rates["dim", "suppress", "effect", 0.9, 0]["rate"] < 0.5
    assert not any(rates["dim", "induce", "random", 0.9, seed]["rate"] for seed in range(5))
    assert not any(row["rate"] for (_, _, rule, zeros, _), row in rates.items() if rule and zeros >= 0.95)
    for rule in ("paper", "code"):
        assert rates["dim", "induce", rule, 0.9, 0]["high"] < rates["dim", "induce", "effect", 0.9, 0]["low"]
    words = {word for head in found["tokens"]["dim"]["heads"] for word in head["raises"]}
    assert {" sorry", " unable", " unsafe", " law"} <= words - set(found["tokens"]["dim"]["vector"]["raises"])


def test_half_the_strength():
    found = json.loads((ROOT / "benchmarks" / "results" / "observe" / "refusal-half.json").read_text(encoding="utf-8"))
    assert f"`{found['command']}`" in PAGE
    rows = {(r["context"], r["side"]): r for r in found["answers"] if r["vector"] == "dim"}
    names = {"steered": "it answers", "qk": "QK frozen", "ov": "OV frozen", "svv": "SVV ablated"}
    names["mlp"] = "MLP-direct ablated"
    for context, name in names.items():
        value, low, high = (f"{100 * rows[context, 'suppress']['shown'][key]:.0f}" for key in ("rate", "low", "high"))
        assert f"{name} {value} % [{low}, {high}]" in PAGE
        assert rows[context, "induce"]["shown"]["rate"] == 1
        change = rows[context, "suppress"]["change"]
        assert context == "steered" or change["low"] <= 0 <= change["high"]
