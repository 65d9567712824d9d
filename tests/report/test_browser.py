"""The page in a real browser: what is clicked, what is read off it, and what the store says."""

from __future__ import annotations

import json
import re
import time

import made_up
import pytest
from browsers import drawn
from made_up import NASTY
from on_the_page import cards, choose, count, maps, rows, sql, text, toggle, write
from typer.testing import CliRunner

from faststeer.cli import app


@pytest.fixture(scope="module")
def browser(database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    made = CliRunner().invoke(app, ["report", str(database), "--out", str(folder / "report.html"), "--title", NASTY])
    assert made.exit_code == 0, made.output
    with drawn(folder / "report.html", folder / "profile") as driver:
        yield driver


def test_the_table_of_settings_is_the_stores(browser, database):
    shown = rows(browser)
    settings = sql(database, "SELECT setting, name FROM settings")
    assert set(shown) == {number for number, _ in settings}
    for number, name in settings:
        cells = shown[number]
        assert cells[0].removeprefix("★ ") == name
        rate, unread, kl = sql(
            database,
            "SELECT avg(score), sum(score IS NULL), (SELECT kl FROM effects e WHERE e.setting = v.setting) "
            "FROM verdicts v WHERE judge = 'j1' AND setting = ?",
            number,
        )[0]
        errors = sql(database, "SELECT count(error) FROM answers WHERE setting = ?", number)[0][0]
        assert float(cells[1].split(" %")[0]) == pytest.approx(100 * rate, rel=5e-3)
        low, high = map(float, re.findall(r"([\d.]+) %", cells[1])[1:])
        assert low <= float(cells[1].split(" %")[0]) <= high
        assert float(cells[3]) == pytest.approx(kl, rel=5e-3) and int(cells[5]) == unread + errors


def test_recommended(browser, database):
    def setting():
        return browser.execute_script("return document.getElementById('recommended').dataset.setting")

    def name(number):
        return sql(database, "SELECT name FROM settings WHERE setting = ?", int(number))[0][0]

    assert name(setting()) == "up L2 c1"
    write(browser, "limit", "0.15")  # KL is 0.1 x coefficient x (layers + 1): 0.5 costs 0.1 at one layer, 1 costs 0.2
    assert name(setting()) == "up L2 c0.5"
    write(browser, "limit", "0.01")  # the plan costs nothing
    assert name(setting()) == "whole"
    choose(browser, "goal", "less")
    assert setting() == "" and "None" in text(browser, "recommended")
    write(browser, "limit", "")
    assert name(setting()) == "up L2 c-1"
    choose(browser, "goal", "more")
    assert name(setting()) == "up L2 c1"


def test_figures_draw_the_stores_values(browser, database):
    names = {name: n for n, name in sql(database, "SELECT setting, name FROM settings")}
    shares = dict(sql(database, "SELECT setting, avg(score) FROM verdicts WHERE judge = 'j1' GROUP BY setting"))
    kl = dict(sql(database, "SELECT setting, kl FROM effects"))
    choose(browser, "vector", "up")
    heat = "const t = document.getElementById(arguments[0]).data[0]; return [t.x, t.y, t.z]"
    for figure, values in (("heat-behaviour", shares), ("heat-price", kl)):
        x, y, z = browser.execute_script(heat, figure)
        assert x == ["-1", "0", "0.5", "1"] and y == ["2", "2,3", "3"]
        for layers, line in zip(y, z, strict=True):
            for coefficient, value in zip(x, line, strict=True):
                setting = 0 if coefficient == "0" else names[f"up L{layers} c{coefficient}"]
                assert value == pytest.approx(values[setting], abs=1e-12)
    choose(browser, "dose-layers", "2,3")
    dose = browser.execute_script(
        "const t = document.getElementById('dose').data.filter((t) => t.meta !== undefined);"
        "return [t.length, t[0].x, t[0].y]"
    )
    assert dose[0] == 1 and dose[1] == [-1, 0, 0.5, 1]
    expected = [shares[0 if c == "0" else names[f"up L2,3 c{c}"]] for c in ("-1", "0", "0.5", "1")]
    assert dose[2] == pytest.approx(expected, abs=1e-12)
    points = browser.execute_script(
        "return document.getElementById('pareto').data.filter((t) => t.customdata)"
        ".flatMap((t) => t.x.map((x, i) => [t.customdata[i][0], x, t.y[i]]))"
    )
    assert {int(n) for n, _, _ in points} == set(names.values())
    for n, x, y in points:
        assert (x, y) == (pytest.approx(kl[n] - kl[0], abs=1e-12), pytest.approx(shares[n], abs=1e-12))


def test_answers_are_filtered_and_searched(browser, database):
    for name in ("vector", "layers", "coefficient", "tag", "verdict"):
        choose(browser, f"answers-{name}", "")
    assert count(browser) == sql(database, "SELECT count(*) FROM answers WHERE setting > 0")[0][0]
    choose(browser, "answers-vector", NASTY)
    choose(browser, "answers-layers", "2,3")
    choose(browser, "answers-coefficient", "1")
    setting = sql(database, "SELECT setting FROM settings WHERE name = ?", f"{NASTY} L2,3 c1")[0][0]
    assert count(browser) == 24 and len(cards(browser)) == 10
    for number, prompt, unsteered, steered in cards(browser):
        assert number == setting
        for which, (answer, verdict) in ((0, unsteered), (setting, steered)):
            expected = sql(
                database,
                "SELECT text, label, score FROM answers JOIN verdicts USING (run, setting, prompt) WHERE judge = 'j1' "
                "AND setting = ? AND prompt = ?",
                which,
                prompt,
            )[0]
            label = "could not be read" if expected[2] is None else expected[1]
            assert (answer, verdict) == (expected[0], f"refusal: {label}")
    # Judges are in the store's order, by name: 1 is refusal.
    judge = "1 "
    changed = (
        "SELECT count(*) FROM verdicts a JOIN verdicts b ON a.prompt = b.prompt AND a.judge = b.judge "
        "WHERE a.judge = 'j1' AND a.setting = 0 AND b.setting = ? AND (a.score >= 1) != (b.score >= 1)"
    )
    choose(browser, "answers-verdict", judge + "changed")
    assert count(browser) == sql(database, changed, setting)[0][0] > 0
    choose(browser, "answers-verdict", judge + "unread")
    assert count(browser) == 1
    choose(browser, "answers-verdict", "")
    choose(browser, "answers-tag", "plain")
    assert count(browser) == 12
    write(browser, "answers-search", "NEEDLE12")
    assert count(browser) == 1 and cards(browser)[0][1] == 12
    assert browser.execute_script("return document.querySelector('#answers mark').textContent") == "needle12"
    write(browser, "answers-search", "")
    choose(browser, "answers-vector", "up~random0")
    choose(browser, "answers-tag", "")
    choose(browser, "answers-verdict", "failed")
    assert count(browser) == 1 and "could not be generated" in text(browser, "answers")


def test_projections_of_any_size(browser, database):
    """Numbers beyond half precision's, one that is none, and tokens that try to be markup."""
    for name in ("vector", "layers", "coefficient", "tag", "verdict"):
        choose(browser, f"answers-{name}", "")
    (setting,) = sql(database, "SELECT vector, layers, coefficient FROM settings WHERE setting = 2")
    for name, value in zip(("vector", "layers", "coefficient"), setting, strict=True):
        choose(browser, f"answers-{name}", value.strip("[]") if name == "layers" else str(value))
    toggle(browser, 2, 1)
    found = maps(browser)
    assert found.keys() == {(2, 0), (2, 1)}
    scale = sql(database, "SELECT max(scale), min(scale) FROM projections")[0]
    assert scale[0] > scale[1] == 1
    for (number, prompt), sides in found.items():
        direction = sql(database, "SELECT direction FROM projections WHERE setting = 2 AND prompt = ?", prompt)[0][0]
        for side, of in zip(sides, (0, number), strict=True):
            expected = made_up.projected(of, prompt, direction).tolist()
            expected[2][3] = None
            assert side["z"] == expected and side["end"] == 1.5
            assert side["tokens"][2:] == ["⏎", "b", "c"] and side["tokens"][1].startswith("&lt;/script&gt;")


def test_answers_come_in_pages(browser):
    for name in ("vector", "layers", "coefficient", "tag", "verdict"):
        choose(browser, f"answers-{name}", "")
    first = [card[:2] for card in cards(browser)]
    browser.execute_script("[...document.querySelectorAll('#answers-pager button')].at(-1).click()")
    second = [card[:2] for card in cards(browser)]
    assert len(second) == 10 and not {*map(tuple, first)} & {*map(tuple, second)}


def test_phone_and_paper(browser):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        time.sleep(0.5)  # figures are drawn anew when the width has settled
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        widths = (
            "return [...document.querySelectorAll('.plot svg.main-svg')].map((s) => s.getBoundingClientRect().width)"
        )
        assert max(browser.execute_script(widths)) <= 360
        columns = "return getComputedStyle(document.querySelector('.sides')).gridTemplateColumns.split(' ').length"
        assert browser.execute_script(columns) == 1
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    paper = "return getComputedStyle(document.body).backgroundColor"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {**dark, "media": "screen"})
    assert browser.execute_script(paper) != "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {**dark, "media": "print"})
    assert browser.execute_script(paper) == "rgb(255, 255, 255)"
    width = "window.paper = document.getElementById('dose')._fullLayout.width"
    browser.execute_script(f"addEventListener('beforeprint', () => {{ {width} }})")
    browser.execute_cdp_cmd("Page.printToPDF", {})
    assert browser.execute_script("return window.paper") == 680
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [], "media": ""})


def test_nothing_of_the_data_ran_and_nothing_was_asked_of_the_network(browser):
    """Last: after everything above has been drawn."""
    assert browser.execute_script("return window.hit === undefined")
    write(browser, "answers-search", "onerror")
    assert count(browser) > 0 and NASTY in text(browser, "answers") and text(browser, "settings").count("onerror") > 0
    assert browser.execute_script("return document.querySelector('h1').textContent") == NASTY
    assert not browser.execute_script("return document.querySelectorAll('img, iframe, [onerror]').length")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own first page asks for its parts; what counts is what this page asks for.
    asked = [request["request"]["url"] for request in requests if request["documentURL"].startswith("file:")]
    assert any(url.startswith("file:") for url in asked)
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
