"""docs/observe.md: its examples run one after the other, and its figures are those of the results file."""

from __future__ import annotations

import csv
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
