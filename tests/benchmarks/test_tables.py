"""The tables in README and docs are those of the results files; ratios are taken within a repeat."""

from __future__ import annotations

import random
import statistics

import pytest
import results
import tables

NAMES = list(tables.TABLES)


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_have_the_tables_of_their_results(page):
    text = (tables.ROOT / page).read_text(encoding="utf-8")
    assert tables.PLACE.search(text)
    assert tables.filled(text) == text, "run python benchmarks/tables.py --write"


def test_every_table_has_a_place_in_the_page_of_results():
    text = (tables.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [place[2] for place in tables.PLACE.finditer(text)] == NAMES


def timed(draw, case, repeats=3, **more):
    return [{**more, "case": case, "repeat": r, "seconds": draw.uniform(1, 9), "tokens": 100} for r in range(repeats)]


def test_a_ratio_is_the_median_of_those_within_a_repeat(tmp_path):
    draw = random.Random(0)
    rows = timed(draw, "a", 5) + timed(draw, "b", 4)
    path = results.write("x", rows, tmp_path)
    seconds = {case: [r["seconds"] for r in rows if r["case"] == case] for case in "ab"}
    each = [b / a for a, b in zip(seconds["a"], seconds["b"], strict=False)]
    expected = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
    assert tables.faster(results.read(path), "a", "b") == expected
    assert tables.faster(results.read(path), "a", "none of these") == "-"


def generation_rows():
    draw, rows = random.Random(1), []
    for threads, dtype, batch in ((2, "fp32", 1), (2, "bf16", 16), (1, "fp32", 16)):
        for case in ("generate, unsteered", "generate, hooks", "generate, fs.steer", "Engine, unsteered",
                     "Engine, steered"):  # fmt: skip
            rows += timed(draw, case, threads=threads, dtype=dtype, batch=batch)
        if batch > 1:
            for case in ("generate, fs.steer, 32 plans", "Engine, 32 plans"):
                rows += timed(draw, case, threads=threads, dtype=dtype, batch=batch)
    return rows


def test_the_table_of_generation(tmp_path):
    rows = results.read(results.write("x", generation_rows(), tmp_path))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.generation(rows).splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert [line[:3] for line in lines[2:]] == [["2", "fp32", "1"], ["2", "bf16", "16"], ["1", "fp32", "16"]]
    assert lines[2][7:9] == ["-", "-"] and "-" not in lines[3]
    hooks = [100 / float(r["seconds"]) for r in tables.where(rows, threads=2, batch=1, case="generate, hooks")]
    assert lines[2][3] == f"{statistics.median(hooks):.0f}"


@pytest.mark.parametrize(
    ("name", "cases", "more"),
    [
        ("extraction", ["plain loop", "faststeer"], {"work": "short", "prompts": 64, "tokens_each": 40, "shared": 30}),
        (
            "selection",
            ["mixed rows", "one at a time", "one at a time, hooks"],
            {"prompts": 2, "candidates": 16, "largest_difference": "3e-06"},
        ),
        (
            "sharing",
            ["whole passes", "shared"],
            {
                "prompts": 64,
                "threads": 2,
                "candidates": 30,
                "layer": 15,
                "largest_difference": "2e-05",
                "cpu_seconds": 9.0,
            },
        ),
        ("sweep", ["sweep", "`generate` with hooks, a setting at a time"], {"settings": 25}),
        ("vllm", ["off", "on, unsteered", "on, every layer"], {}),
        (
            "freezing",
            ["with caches", "steered", "unsteered", "recomputing, one pass", "recomputing, two passes"],
            {},
        ),
    ],
)
def test_other_tables(name, cases, more, tmp_path):
    draw = random.Random(2)
    rows = [row for case in cases for row in timed(draw, case, **more)]
    file, _ = tables.TABLES[name]
    results.write(file, rows, tmp_path)
    lines = tables.text_of(name, tmp_path).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) >= 3
    page = f"before\n<!-- table: {name} -->\nold\nlines\n<!-- end -->\nafter\n"
    filled = tables.filled(page, tmp_path)
    assert filled == f"before\n<!-- table: {name} -->\n" + "\n".join(lines) + "\n<!-- end -->\nafter\n"
    assert tables.filled(filled, tmp_path) == filled


def test_the_table_of_the_host(tmp_path):
    rows = [
        {"way": way, "positions": "all", "layer_us_median": us, "layer_us_of_least": us - 1}
        for way, us in (("none", 0.0), ("fused", 4.5))
    ]
    results.write("host_layer", rows, tmp_path)
    assert tables.text_of("host", tmp_path).splitlines()[2:] == ["| fused | all | 4.5 | 3.5 |"]


def test_without_results_a_place_says_so(tmp_path):
    assert tables.text_of("peers", tmp_path) == "Not measured yet."
