"""The page of a study: what it says and draws against the JSON it was made of, with names and words that want to be
markup."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsers import drawn
from made_up import NASTY

from faststeer import report
from faststeer.report.study import Chart, Series, _range, charts, reached

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "observe" / "refusal.json"


@pytest.fixture(scope="module")
def study():
    """The demo model's, with one nasty word where texts of models and users go."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    found["model"] = NASTY
    found["tokens"]["dim"]["vector"]["raises"][0] = NASTY
    found["skipped"]["methods"]["reps"] = NASTY
    return found


class Text(HTMLParser):
    """The rows of every table with an id, and the tags there are."""

    def __init__(self):
        super().__init__()
        self.tables, self.tags, self.table, self.cell = {}, [], None, None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs)["id"], [])
        elif tag == "tr" and self.table is not None:
            self.table.append([])
        elif tag in ("td", "th") and self.table is not None:
            self.table[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag == "table":
            self.table = None
        elif tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.table[-1][-1] += data


def test_tables_say_what_the_study_says(study):
    page = Text()
    page.feed(html := report.study_page(study))
    tables = page.tables
    assert len(tables["answers"]) == 1 + len(study["answers"])
    for cells, row in zip(tables["answers"][1:], study["answers"], strict=True):
        rate, low, high = (float(number) for number in re.findall(r"\d+\.\d", cells[3]))
        assert cells[0] == row["vector"]
        for shown, key in ((rate, "rate"), (low, "low"), (high, "high")):
            assert shown == pytest.approx(100 * row["shown"][key], abs=0.051)
    for cells in tables["circuits"][1:]:
        best = reached(study, cells[0])
        own = [
            r for r in study["faithfulness"] if (r["vector"], r["circuit"]) == (cells[0], "own") and r["value"] >= 0.85
        ]
        assert best == min(own, key=lambda r: r["share"]) and cells[1].startswith(f"{best['edges']} of ")
    assert len(tables["overlaps"]) == 1 + 3 and len(tables["edges"]) == 1 + 3 * 8
    assert NASTY in tables["tokens"][1][3]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "link"} == set()
    packed = re.search(r'id="data-charts">([^<]*)<', html)[1]
    drawn = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert [chart["name"] for chart in drawn] == [chart.name for chart in charts(study)]


def test_charts_hold_the_studys_numbers(study):
    found = {chart.name: chart for chart in charts(study)}
    assert len(found) == len(charts(study)) == 2 + 2 + 1 + 1 + 6
    own = next(s for s in found["faithfulness-own"].series if s.name == "ntp")
    rows = [r for r in study["faithfulness"] if (r["vector"], r["circuit"]) == ("ntp", "own")]
    assert (list(own.x), list(own.y)) == ([r["share"] for r in rows], [r["value"] for r in rows])
    assert all(low <= y <= high for low, y, high in zip(own.low, own.y, own.high, strict=True))
    sparse = found["sparsity-po-suppress"]
    base = [r for r in study["sparsity"] if (r["vector"], r["side"], r["rule"]) == ("po", "suppress", None)]
    assert sparse.level == base[0]["rate"] and {s.control for s in sparse.series} == {True, False}
    few = {**study, "sparsity": [], "overlap": [], "faithfulness": [], "patching": {}}
    assert [chart.name for chart in charts(few)] == ["answers-induce", "answers-suppress"]
    pictures = report.study_figures(few)
    assert pictures.keys() == {"answers-induce.png", "answers-suppress.png"}
    assert all(picture[:4] == b"\x89PNG" for picture in pictures.values())


def test_the_page_of_a_real_models_study():
    """In which some vectors have no examples."""
    found = json.loads((RESULTS.parent / "tone.json").read_text(encoding="utf-8"))
    page = Text()
    page.feed(html := report.study_page(found))
    assert len(page.tables["answers"]) == 1 + len(found["answers"])
    packed = re.search(r'id="data-charts">([^<]*)<', html)[1]
    names = [chart["name"] for chart in json.loads(gzip.decompress(base64.b64decode(packed)))]
    assert names == [chart.name for chart in charts(found)] and "sparsity-po-suppress" in names
    assert "steering changed none of 8 answers" in html


def test_in_a_browser(study, tmp_path):
    (tmp_path / "observe.html").write_text(report.study_page(study), encoding="utf-8")
    with drawn(tmp_path / "observe.html", tmp_path / "profile") as browser:
        for chart in charts(study):
            shown = browser.execute_script(
                "return document.getElementById(arguments[0]).data.filter((t) => t.hoverinfo !== 'skip')"
                ".map((t) => [t.name, t.y])",
                f"chart-{chart.name}",
            )
            assert shown == [[series.name, list(series.y)] for series in chart.series]
        assert browser.execute_script(
            "return window.hit === undefined && document.querySelectorAll('img').length === 0"
        )
        assert browser.execute_script("return document.querySelector('h1').textContent").endswith(NASTY)
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [each["request"]["url"] for each in asked if each["documentURL"].startswith("file:")]
        assert urls and not [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("name", ["refusal", "tone"])
def test_axes_fit_the_quantity(name):
    """Shares from 0 to 1, further only where a value lies outside; losses as far as they and their intervals go,
    in nats and not in percent."""
    drawn = charts(json.loads(RESULTS.with_name(f"{name}.json").read_text(encoding="utf-8")))
    for chart in drawn:
        low, high = chart.range
        values = [y for series in chart.series for y in series.y if y is not None]
        assert low <= min(values) and max(values) <= high, chart.name
        assert chart.unit == ("nats" if chart.name.startswith("loss") else "share")
        if chart.unit == "nats":
            ends = [end for series in chart.series for end in (*series.low, *series.high)]
            assert chart.kind == "points" and low < min(ends) and max(ends) < high
            assert high - low < 1.2 * (max(ends) - min(ends))
        elif min(values) >= 0 and max(values) <= 1:
            assert low == 0 and 1 <= high <= 1.3
    assert any(chart.unit == "nats" for chart in drawn) is (name == "tone")
    wide = Chart("c", "", "", "", [Series("s", [0.1], [1.2], [-0.5], [1.5])])
    assert _range(wide) == pytest.approx((0.0, 1.26))
    below = Chart("c", "", "", "", [Series("s", [0.1], [-0.2])], level=0.85)
    assert _range(below) == pytest.approx((-0.26, 1.06))
