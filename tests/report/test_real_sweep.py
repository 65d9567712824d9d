"""The page of a sweep that ran on the demo model, in a real browser: what it says against the store, and the store's
answers and projections against hooks on the model."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from browsers import drawn
from on_the_page import cards, choose, count, maps, rows, sql, text, toggle
from sweeps import watched_by_hooks, work
from typer.testing import CliRunner

import faststeer as fs
from faststeer import report
from faststeer.cli import app
from faststeer.evaluate import is_refusal
from faststeer.evaluate.sweep import Store, Sweep, SweepPrompt

NEW = 24
PER_TAG = 8


@pytest.fixture(scope="module")
def demo():
    return fs.demo.load()


@pytest.fixture(scope="module")
def sweep(demo):
    harmful, harmless = fs.demo.prompts("refusal", "train")
    vector = fs.extract.dim(*demo, harmful[:48], harmless[:48])
    asked = dict(zip(("harmful", "harmless"), fs.demo.prompts("refusal", "test"), strict=True))
    tags = ("harmless", "harmful")
    return Sweep(
        [SweepPrompt(f"{tag}-{i}", asked[tag][i], tag) for i in range(PER_TAG) for tag in tags],
        vectors={"refusal": vector},
        layers=[2, 4, [3, 4]],
        coefficients=[-1, 0, 0.2, 1],
        plans={"wiped": fs.Plan([fs.Ablate(vector[4], layers="all", at="resid_pre")])},
        judges=["refusal", "demo-coherent", "perplexity"],
        text=("Water boils at a lower temperature in the mountains.",),
        projections=3,
        max_new_tokens=NEW,
    )


@pytest.fixture(scope="module")
def database(demo, sweep, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "sweep.db"
    work(sweep, demo, path, 64)
    return path


@pytest.fixture(scope="module")
def store(database):
    with Store(database, create=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    arguments = ["report", database, "--out", folder / "r.html", "--png", folder / "png", "--tag", "harmless"]
    made = CliRunner().invoke(app, [*map(str, arguments), "--judge", "refusal"])
    assert made.exit_code == 0, made.output
    assert (folder / "png" / "projections.png").read_bytes()[:4] == b"\x89PNG"
    with drawn(folder / "r.html", folder / "profile") as driver:
        yield driver


def shown_everywhere(browser):
    for name in ("vector", "layers", "coefficient", "tag", "verdict"):
        choose(browser, f"answers-{name}", "")


def test_the_recommended_setting_answers_as_hooks_do(browser, store, database, demo, sweep):
    """What the page recommends is what is chosen in Python, and its answers are those that hooks on the model give."""
    found = report.findings(store)
    behaviour = found.measure("refusal", "harmless")
    choice = report.choose(found, behaviour, found.price(behaviour, None))
    number = int(browser.execute_script("return document.getElementById('recommended').dataset.setting"))
    setting, vector = sweep.settings[number], sweep.vectors["refusal"]
    assert number == choice.recommended and setting.kind == "vector" and setting.coefficient > 0
    shown = cards(browser)
    assert [card[0] for card in shown] == [number] * PER_TAG and count(browser) == PER_TAG
    add = [setting.coefficient * vector[layer] for layer in setting.layers]
    refused = 0
    for _, prompt, unsteered, steered in shown[:4]:
        asked = sweep.prompts[prompt].prompt
        _, plain = watched_by_hooks(demo, asked, vector[1], (), (), NEW)
        _, moved = watched_by_hooks(demo, asked, vector[1], setting.layers, add, NEW)
        assert (unsteered[0], steered[0]) == (plain, moved) and not is_refusal(plain)
        refused += is_refusal(moved)
    assert refused > 2
    rate = sql(
        database,
        "SELECT avg(score) FROM verdicts JOIN judges USING (run, judge) JOIN prompts USING (run, prompt) "
        "WHERE name = 'refusal' AND tag = 'harmless' AND setting = ?",
        number,
    )[0][0]
    assert text(browser, "recommended-behaviour").startswith(f"{float(f'{100 * rate:.3g}'):g} %")


def test_the_table_is_the_stores(browser, store, database, sweep):
    shown = rows(browser)
    assert [shown[n][0].removeprefix("★ ") for n in sorted(shown)] == [setting.name for setting in sweep.settings]
    kl = dict(sql(database, "SELECT setting, kl FROM effects"))
    rates = sql(
        database,
        "SELECT setting, avg(score), count(score) FROM verdicts JOIN judges USING (run, judge) JOIN prompts USING "
        "(run, prompt) WHERE name = 'refusal' AND tag = 'harmless' GROUP BY setting",
    )
    assert len(rates) == len(sweep.settings) and len({rate for _, rate, _ in rates}) > 2
    for number, rate, n in rates:
        cells = shown[number]
        assert float(cells[1].split(" %")[0]) == pytest.approx(100 * rate, rel=5e-3) and int(cells[4]) == n == PER_TAG
        assert float(cells[3]) == pytest.approx(kl[number], rel=5e-3, abs=1e-6)


def test_filters_count_what_the_store_counts(browser, database, sweep):
    shown_everywhere(browser)
    assert count(browser) == (len(sweep.settings) - 1) * 2 * PER_TAG
    choose(browser, "answers-tag", "harmful")
    choose(browser, "answers-vector", "refusal")
    judges = [name for (name,) in sql(database, "SELECT name FROM judges ORDER BY name")]
    choose(browser, "answers-verdict", f"{judges.index('refusal')} changed")
    changed = sql(
        database,
        "SELECT count(*) FROM verdicts a JOIN verdicts b USING (run, judge, prompt) JOIN judges j USING (run, judge) "
        "JOIN prompts p USING (run, prompt) JOIN settings s ON s.setting = b.setting WHERE j.name = 'refusal' AND "
        "a.setting = 0 AND s.kind = 'vector' AND p.tag = 'harmful' AND a.score != b.score",
    )[0][0]
    assert count(browser) == changed > 0
    shown_everywhere(browser)
    choose(browser, "answers-verdict", "projected")
    assert count(browser) == (len(sweep.settings) - 1) * 3
    assert {card[1] for card in cards(browser)} <= {0, 1, 2}


def test_projections_on_the_page_are_the_stores_and_those_of_hooks(browser, store, demo, sweep):
    """Every projected answer of two settings and of the plan."""
    digest, vector = store.run(), sweep.vectors["refusal"]
    shown_everywhere(browser)
    choose(browser, "answers-verdict", "projected")
    base = {(row["prompt"], row["direction"]): row for row in store.projections(digest, 0)}
    names = {setting.name: number for number, setting in enumerate(sweep.settings)}
    for name, layers, coefficient in (("refusal", "2", "-1"), ("refusal", "3,4", "1"), ("wiped", "", "")):
        for which, value in (("vector", name), ("layers", layers), ("coefficient", coefficient)):
            choose(browser, f"answers-{which}", value)
        number = names[f"{name} L{layers} c{coefficient}" if layers else name]
        at = sweep.settings[number].layers
        assert maps(browser).keys() == {(number, 0)}  # the first is open
        assert toggle(browser, number, 1).startswith(f"Projection on {name}")
        toggle(browser, number, 2)
        found = maps(browser)
        assert found.keys() == {(number, prompt) for prompt in range(3)}
        for (_, prompt), (unsteered, steered) in found.items():
            (row,) = store.projections(digest, number, prompt)
            first = base[prompt, row["direction"]]
            for side, stored in ((unsteered, first), (steered, row)):
                assert np.array_equal(np.array(side["z"], dtype=np.float32), stored["values"])
                assert side["end"] == stored["of_prompt"] - 0.5 and len(side["tokens"]) == len(stored["texts"])
            both = np.concatenate([first["values"][:, 1:], row["values"][:, 1:]], 1)
            assert unsteered["range"] == steered["range"] == [both.min(), both.max()]
            asked, watched = sweep.prompts[prompt].prompt, vector[4] if name == "wiped" else vector[at[0]]
            plain, _ = watched_by_hooks(demo, asked, watched, (), (), NEW)
            torch.testing.assert_close(torch.tensor(unsteered["z"]), plain, rtol=2**-10, atol=1e-3)
            if name == "wiped":
                assert np.abs(np.array(steered["z"])[:-1]).max() < 1e-4  # no layer is given any of it
                continue
            moved, _ = watched_by_hooks(demo, asked, watched, at, [float(coefficient) * vector[n] for n in at], NEW)
            torch.testing.assert_close(torch.tensor(steered["z"]), moved, rtol=2**-10, atol=1e-3)
        toggle(browser, number, 1)
        assert maps(browser).keys() == {(number, 0), (number, 2)}


def test_projections_on_a_phone_and_on_paper(browser):
    shown_everywhere(browser)
    assert len(maps(browser)) == 1
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        narrow = """
            const plots = [...document.querySelectorAll('.projections .js-plotly-plot')];
            const look = () => plots.every((p) => p._fullLayout.width <= 336)
              ? arguments[0](plots.map((p) => p.getBoundingClientRect().top)) : setTimeout(look, 50);
            look();
        """
        browser.set_script_timeout(20)
        first, second = browser.execute_async_script(narrow)
        assert second > first + 300  # one below the other
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    widths = "window.paper = [...document.querySelectorAll('.projections .js-plotly-plot')].map((p) => p.clientWidth)"
    browser.execute_script(f"addEventListener('beforeprint', () => {{ {widths} }})")
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed[:5] == b"%PDF-" and browser.execute_script("return window.paper.length") == 2
