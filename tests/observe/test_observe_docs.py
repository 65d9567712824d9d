"""docs/observe.md: its examples run one after the other, and its figures are those of the results file."""

from __future__ import annotations

import json
import re
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


def test_the_studys_figures_are_those_of_its_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "observe" / "refusal.json").read_text(encoding="utf-8"))
    assert f"`{found['command']}`" in PAGE
    assert (found["layer"], found["position"], found["n_prompts"]) == (1, -1, {"induce": 48, "suppress": 48})
    for row in found["answers"]:  # the table has one line for all vectors
        steered = row["vector"] in found["methods"]
        shown = [round(100 * row["shown"][key]) for key in ("rate", "low", "high")]
        assert shown == ([100, 93, 100] if steered else [0, 0, 7])
    coherent = {(r["vector"], r["context"], r["side"]): round(100 * r["both"]["rate"]) for r in found["answers"]}
    whole = [
        share for (name, context, _), share in coherent.items() if name in found["methods"] and context == "steered"
    ]
    less = {key: share for key, share in coherent.items() if key[0] in found["methods"] and key[1] != "steered"}
    assert (min(whole), max(whole), min(less.values()), max(less.values())) == (85, 100, 71, 100)
    least = [coherent["po", context, "suppress"] for context in ("steered", "ov", "svv")]
    assert least == [92, 77, 71] and sorted(less.values())[:2] == [71, 77]
    curves = {(r["vector"], r["circuit"], r["share"]): r for r in found["faithfulness"]}

    def line(name, cells):
        assert f"| {name} | " + " | ".join(cells) + " |" in PAGE, (name, cells)

    def share(row, digits=0):
        value, low, high = (f"{100 * row[key]:.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} % [{low}, {high}]"

    names = found["methods"]
    line("faithfulness of the one edge steering -> logits", [share(curves[n, "own", 0.002]) for n in names])
    line("of all edges but that one", [share(curves[n, "complement", 0.002], 1) for n in names])
    line("of 1 % of the edges", [share(curves[n, "own", 0.01]) for n in names])
    line("of 10 % of the edges", [share(curves[n, "own", 0.1]) for n in names])
    kinds = {name: {row["kind"]: row for row in found["patching"][name]["kinds"]} for name in names}
    line("share of abs(score) that enters the logits", [share(kinds[n]["logits"]) for n in names])
    line("... MLPs", [share(kinds[n]["mlp"], 1) for n in names])
    line("... values", [share(kinds[n]["v"], 1) for n in names])
    line("... queries and keys", [f"{100 * (kinds[n]['q']['value'] + kinds[n]['k']['value']):.1f} %" for n in names])
    for name in names:
        (top, *_) = found["patching"][name]["top"]
        assert (top["sender"], top["receiver"], curves[name, "own", 0.002]["edges"]) == ("steering", "logits", 1)
        assert found["patching"][name]["n_edges"] == 541
        attention = kinds[name]["q"]["value"] + kinds[name]["k"]["value"]
        assert 0.035 <= attention < 0.08 and (attention < kinds[name]["v"]["value"]) == (name != "po")
    overlaps = {(r["a"], r["b"]): r for r in found["overlap"] if r["share"] == 0.1}
    for (a, b), row in overlaps.items():
        if b != "random":
            random = ", ".join(f"{100 * overlaps[each, 'random']['iou']:.0f} %" for each in (a, b))
            ours = [f"{row['cosine']:.2f}", *(share(row["intervals"][key]) for key in ("fraction", "iou")), random]
            line(f"{a.upper()}, {b.upper()}", ours)
            times = [round(row["shared"] / overlaps[each, "random"]["shared"]) for each in (a, b)]
            assert set(times) <= {4, 5}
    crossed = [100 * r["value"] for r in found["faithfulness"] if r["circuit"] in names]
    assert (round(min(crossed)), round(max(crossed))) == (88, 100)
    controls = [100 * r["value"] for r in found["faithfulness"] if r["circuit"].startswith("random") and r["share"] < 1]
    with_edge = [value for value in controls if value > 50]
    assert (round(min(with_edge)), round(max(with_edge))) == (77, 98)
    assert all(abs(value) < 4 for value in controls if value <= 50)
    rates = {(r["vector"], r["side"], r["rule"], r["sparsity"], r["seed"]): r for r in found["sparsity"]}
    assert (
        rates["dim", "induce", "effect", 0.9, 0]["rate"] == 1 and rates["dim", "induce", "effect", 0.9, 0]["kept"] == 13
    )
    assert rates["dim", "suppress", "effect", 0.9, 0]["rate"] < 0.5
    assert not any(rates["dim", "induce", "random", 0.9, seed]["rate"] for seed in range(5))
    assert round(100 * max(r["rate"] for (_, _, rule, zeros, _), r in rates.items() if rule and zeros >= 0.95)) == 15
    for rule in ("paper", "code"):
        assert rates["dim", "induce", rule, 0.9, 0]["high"] < rates["dim", "induce", "effect", 0.9, 0]["low"]
    words = {word for head in found["tokens"]["dim"]["heads"] for word in head["raises"]}
    assert {" sorry", " cannot", " apologize", " unsafe"} <= words - set(found["tokens"]["dim"]["vector"]["raises"])


def test_where_half_of_the_answers_tip():
    """Each cell of the table; attention works against the vector on both sides, the MLPs with it where subtracted."""

    def read(name):
        text = (ROOT / "benchmarks" / "results" / "observe" / f"refusal-{name}.json").read_text(encoding="utf-8")
        return json.loads(text)

    induce, suppress = read("half-induce"), read("half")
    assert f"`{suppress['command']}`" in PAGE
    assert induce["command"] == suppress["command"].replace("--coefficient 0.65", "--coefficient 0.4")
    assert "suppress" in induce["without_examples"]["train"]["dim"] and not suppress["without_examples"]["train"]
    sides = ({r["context"]: r for r in induce["answers"] if (r["vector"], r["side"]) == ("dim", "induce")},)
    sides += ({r["context"]: r for r in suppress["answers"] if (r["vector"], r["side"]) == ("dim", "suppress")},)
    names = {"steered": "steered", "qk": "QK frozen", "ov": "OV frozen", "svv": "SVV ablated"}
    names["mlp"] = "MLP-direct ablated"

    def signed(value):
        points = round(100 * value)
        return f"{points:+d}" if points else "0"

    for context, name in names.items():
        cells = []
        for rows in sides:
            value, low, high = (f"{100 * rows[context]['shown'][key]:.0f}" for key in ("rate", "low", "high"))
            cells.append(f"{value} % [{low}, {high}]")
            if context != "steered":
                mean, low, high = (signed(rows[context]["change"][key]) for key in ("mean", "low", "high"))
                cells[-1] += f", {mean} [{low}, {high}]"
        assert f"| {name} | " + " | ".join(cells) + " |" in PAGE, (name, cells)
    assert all(0.4 < rows["steered"]["shown"]["rate"] < 0.6 for rows in sides)
    assert all(rows[context]["change"]["low"] > 0 for rows in sides for context in ("ov", "svv"))
    added, subtracted = sides
    assert added["qk"]["change"]["low"] > 0 and subtracted["qk"]["change"]["high"] >= 0
    assert added["mlp"]["change"]["high"] >= 0 and subtracted["mlp"]["change"]["high"] < 0


def test_what_is_said_of_the_real_model():
    """The sentences; the tables are tests/benchmarks/test_tables.py's."""
    found = json.loads((ROOT / "benchmarks" / "results" / "observe" / "tone.json").read_text(encoding="utf-8"))
    assert f"`{found['command']}`" in PAGE
    assert (found["model"], found["layer"], found["n_prompts"]["suppress"]) == ("smollm2", 18, 24)
    assert all(graph["n_edges"] == 10_981 for graph in found["patching"].values())
    assert all(row["coherent"]["rate"] == 1 for row in found["answers"])
    rows = {(r["vector"], r["context"]): r for r in found["answers"] if r["side"] == "suppress"}
    for method in found["methods"]:
        assert 0.33 <= rows[method, "steered"]["shown"]["rate"] <= 0.6
        frozen, taken = rows[method, "qk"]["change"], [rows[method, c]["change"] for c in ("ov", "svv")]
        assert frozen["low"] < 0 < frozen["high"] and all(each["high"] < 0 for each in taken)
        assert all(29 <= round(-100 * each["mean"]) <= 46 for each in taken)
    without = found["without_examples"]
    assert set(without["train"]) == {"ntp"} and set(without["test"]["dim"]) == {"induce", "suppress"}
    curves = {(r["vector"], r["circuit"], r["share"]): r["value"] for r in found["faithfulness"]}
    assert round(100 * curves["po", "own", 0.2]) == 88 and round(100 * curves["po", "dim", 0.1]) == 78
    assert max(curves["po", f"random {i}", 0.5] for i in (0, 1)) < 0.125
    (pair,) = (r for r in found["overlap"] if {r["a"], r["b"]} == {"dim", "po"} and r["share"] == 0.1)
    assert [round(100 * pair[key]) for key in ("cosine", "fraction", "iou")] == [17, 64, 47]
    assert {round(100 * r["iou"]) for r in found["overlap"] if r["b"] == "random" and r["share"] == 0.1} == {6}
    for scores in found["patching"].values():
        kinds = {row["kind"]: row["value"] for row in scores["kinds"]}
        assert 0.16 <= kinds["q"] + kinds["k"] < 0.225 < kinds["v"]
        assert (scores["top"][0]["sender"], scores["top"][0]["receiver"]) == ("steering", "L18.V1")
    rates = {
        (r["rule"], r["seed"]): 100 * r["rate"]
        for r in found["sparsity"]
        if (r["vector"], r["side"], r["sparsity"]) == ("dim", "suppress", 0.9)
    }
    assert min(rates["magnitude", 0], rates["effect", 0]) > 29
    assert max(rate for (rule, _), rate in rates.items() if rule in ("paper", "code", "random")) == 12.5
    utility = {(r["vector"], r["context"]): r for r in found["utility"] if r["side"] == "suppress"}
    costs = [-utility[m, "unsteered"]["loss_change"]["mean"] for m in found["methods"]]
    assert (round(min(costs), 2), round(max(costs), 2)) == (0.06, 0.18)
    assert [round(-utility[m, "qk"]["loss_change"]["mean"], 2) for m in found["methods"]] == [0.02, 0.01, 0.03]
    assert utility["po", "qk"]["loss_change"]["high"] < 0
    assert round(utility["none", "unsteered"]["loss"]["mean"], 2) == 4.63
    change = utility["po", "qk"]["right_change"]
    assert [round(100 * change[key]) for key in ("mean", "low", "high")] == [8, 2, 17]
