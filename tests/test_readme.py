"""The README's numbers are those of the results files (its example runs in tests/real)."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def demo() -> dict[str, Any]:
    return json.loads((RESULTS / "demo" / "demo.json").read_text())


def test_the_tone_figures_are_measured():
    table = README[README.index("| coefficient | score |") :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n\n")[0].splitlines()[2:]]
    entries = demo()["tone"]
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        steered = bool(entry["coefficient"])
        assert row == [
            f"{entry['coefficient']:+g}" if steered else "0 (unsteered)",
            f"{entry['score']:+.2f}",
            f"{entry['low']:+.2f} to {entry['high']:+.2f}",
            f"{entry['change']:+.2f}" if steered else "",
            f"{entry['change_low']:+.2f} to {entry['change_high']:+.2f}" if steered else "",
            f"{entry['random_score']:+.2f}" if steered else "",
            f"{entry['perplexity']:.1f}",
            str(entry["n"]),
        ]
    assert f"added at layer {demo()['tone_layer']} while" in " ".join(README.split())
    assert f"layers={demo()['tone_layer']})" in README


def test_the_tone_vector_does_what_the_demonstration_is_for():
    entries = {entry["coefficient"]: entry for entry in demo()["tone"]}
    unsteered = entries[0.0]
    assert entries[-1.0]["change"] <= -0.5 and entries[-1.0]["change_high"] < 0
    assert entries[1.0]["change"] >= 0.1
    for entry in entries.values():
        assert unsteered["low"] <= entry["random_score"] <= unsteered["high"]
        assert entry["n"] == 64
    assert demo()["tone_rank_correlation"] >= 0.9


@pytest.mark.parametrize(
    ("line", "cell"),
    [
        ("harmful, unsteered", "base_harmful"),
        ("harmless, unsteered", "base_harmless"),
        ("harmless, direction added", "induced"),
        ("harmful, direction subtracted", "bypassed"),
        ("harmful, direction ablated everywhere", "ablated"),
        ("harmless, random vector added", "random_induced"),
        ("harmful, random vector subtracted", "random_bypassed"),
    ],
    ids=str,
)
def test_the_demo_figures_are_measured(line, cell):
    measured = demo()["refusal"][cell]
    (row,) = re.findall(rf"^\| {re.escape(line)} \|(.*)\|$", README, re.MULTILINE)
    rate, interval, coherent, n = (value.strip() for value in row.split("|"))
    assert rate == f"{measured['rate']:.1%}"
    assert interval == f"{measured['low']:.0%} to {measured['high']:.0%}"
    assert coherent == f"{measured['coherent']:.1%}"
    assert n == str(measured["n"])


@pytest.mark.parametrize("how", ["steer", "add_steer_rmsnorm"])
def test_the_cpu_figures_are_measured(how):
    with (RESULTS / "kernels_cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["how"] == how and row["rows"] == "512"]
    ratio = {(r["steering"], r["dtype"]): f"{float(r['times_as_fast_as_pytorch']):.1f}" for r in rows}
    ablations = (
        f"an ablation {ratio['ablate', 'fp32']} times as fast in fp32 and {ratio['ablate', 'bf16']} times in bf16"
    )
    text = " ".join(README.split())
    assert f"{ablations}, an addition {ratio['add', 'fp32']} and {ratio['add', 'bf16']} times" in text


def test_its_pictures_and_pages_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
