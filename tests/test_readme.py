"""The README's example runs, and its numbers are those of the results files."""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

import faststeer as fs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_example_does_what_its_comments_say(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    steered, unsteered = eval(capsys.readouterr().out)
    assert fs.evaluate.is_refusal(steered)
    assert not fs.evaluate.is_refusal(unsteered)


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
    measured = json.loads((RESULTS / "demo" / "demo.json").read_text())["refusal"][cell]
    (row,) = re.findall(rf"^\| {re.escape(line)} \|(.*)\|$", README, re.MULTILINE)
    rate, interval, coherent, n = (value.strip() for value in row.split("|"))
    assert rate == f"{measured['rate']:.1%}"
    assert interval == f"{measured['low']:.0%} to {measured['high']:.0%}"
    assert coherent == f"{measured['coherent']:.1%}"
    assert n == str(measured["n"])


def test_the_cpu_figures_are_measured():
    with (RESULTS / "kernels_cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["how"] == "steer_" and row["rows"] == "512"]
    ratio = {(r["steering"], r["dtype"]): f"{float(r['times_as_fast_as_eager']):.1f}" for r in rows}
    ablations = (
        f"an ablation {ratio['ablate', 'fp32']} times as fast in fp32 and {ratio['ablate', 'bf16']} times in bf16"
    )
    assert f"{ablations}, an addition {ratio['add', 'fp32']} and {ratio['add', 'bf16']} times" in README


def test_the_engine_figures_are_measured():
    """Medians over repeats of the ratios within a repeat."""
    with (RESULTS / "generation_cpu_fp32.csv").open() as file:
        runs = list(csv.DictReader(file))
    rates = {
        tuple(run[name] for name in ("workload", "threads", "case", "repeat")): int(run["tokens"])
        / float(run["seconds"])
        for run in runs
    }
    repeats = {run["repeat"] for run in runs}

    def ratio(workload, threads, other):
        mine, others = (
            [rates[workload, threads, case, repeat] for repeat in sorted(repeats)]
            for case in ("Engine, steered", other)
        )
        return statistics.median(a / b for a, b in zip(mine, others, strict=True))

    found = re.findall(r"^\|.*\| ([12])(?: \(its default here\))? \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    expected = [
        (
            threads,
            f"{ratio(workload, threads, 'generate, hooks'):.2f}",
            f"{ratio(workload, threads, 'Engine, unsteered'):.3f}",
        )
        for workload in ("answers", "fixed")
        for threads in "21"
    ]
    assert found == expected


def test_its_pictures_and_pages_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
