"""The sweep of 7 choices of layers x 9 coefficients x 3 methods x 64 prompts: killed, and looked at in a browser."""

from __future__ import annotations

import random

import pytest
from browsers import drawn
from on_the_page import choose, count, rows, sql
from sweeps import contents, killed, of_thousands, rows_in, work
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app
from faststeer.evaluate.sweep import Store

BATCH = 256

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def demo():
    return fs.demo.load()


@pytest.fixture(scope="module")
def sweep(demo):
    return of_thousands(demo)


@pytest.fixture(scope="module")
def whole(demo, sweep, tmp_path_factory):
    """Its store, when nothing interrupts it."""
    path = tmp_path_factory.mktemp("whole") / "sweep.db"
    work(sweep, demo, path, BATCH)
    return path


def test_three_kills_at_random_end_in_the_same_table(demo, sweep, whole, tmp_path):
    """Two kills while it answers, one while it judges and measures."""
    with Store(whole) as store:
        (facts,) = store.runs()
    assert facts["done"] and facts["answers"] == (1 + 7 * 8 * 3) * 64  # coefficient 0 is answered once
    path, total, seed = tmp_path / "killed.db", rows_in(whole), random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    moments = [*draw.sample(range(1, facts["answers"]), 2), draw.randrange(facts["answers"], total - 500)]
    killed(sweep, demo, path, moments, total, BATCH)
    work(sweep, demo, path, BATCH)
    assert contents(path) == contents(whole), f"seed {seed}, killed at {moments}"


def test_its_page_says_what_its_store_says(sweep, whole, tmp_path):
    """Filters clicked, the table read off the page."""
    page = tmp_path / "r.html"
    made = CliRunner().invoke(app, ["report", str(whole), "--out", str(page), "--judge", "refusal"])
    assert made.exit_code == 0, made.output
    with drawn(page, tmp_path / "profile") as browser:
        shown = rows(browser)
        assert [shown[n][0].removeprefix("★ ") for n in sorted(shown)] == [setting.name for setting in sweep.settings]
        rates = sql(
            whole,
            "SELECT setting, avg(score), count(score) FROM verdicts JOIN judges USING (run, judge) "
            "WHERE name = 'refusal' GROUP BY setting",
        )
        assert len(rates) == 169 and len({rate for _, rate, _ in rates}) > 3
        for number, rate, n in rates:
            assert float(shown[number][1].split(" %")[0]) == pytest.approx(100 * rate, rel=5e-3)
            assert int(shown[number][4]) == n == 64
        for name in ("vector", "layers", "coefficient", "verdict"):
            choose(browser, f"answers-{name}", "")
        assert count(browser) == 168 * 64
        choose(browser, "answers-vector", "pca")
        assert count(browser) == 7 * 8 * 64
        choose(browser, "answers-layers", "3")
        choose(browser, "answers-coefficient", "1.5")
        assert count(browser) == 64
        judges = [name for (name,) in sql(whole, "SELECT name FROM judges ORDER BY name")]
        choose(browser, "answers-verdict", f"{judges.index('refusal')} changed")
        changed = sql(
            whole,
            "SELECT count(*) FROM verdicts a JOIN verdicts b USING (run, judge, prompt) JOIN judges j "
            "USING (run, judge) JOIN settings s ON s.setting = b.setting WHERE j.name = 'refusal' AND a.setting = 0 "
            "AND s.name = 'pca L3 c1.5' AND a.score != b.score",
        )[0][0]
        assert count(browser) == changed
