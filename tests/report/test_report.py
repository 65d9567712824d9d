"""What the report computes and writes, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from html.parser import HTMLParser

import made_up
import matplotlib.image
import numpy as np
import pytest
from made_up import NASTY, RUN
from on_the_page import sql
from typer.testing import CliRunner

from faststeer import report
from faststeer.cli import app
from faststeer.evaluate.statistics import Estimate, Rate
from faststeer.evaluate.sweep import Line, Store, StoreError
from faststeer.evaluate.sweep.table import Score
from faststeer.report.figures import file_names
from faststeer.report.findings import _judged
from faststeer.report.projections import colour_range


@pytest.fixture(scope="module")
def found(database):
    with Store(database, create=False) as store:
        return report.findings(store)


def test_measures_are_what_the_rows_say(database, found):
    """Every value against SQL's own counting."""
    tags = {None: "%"} | {tag: tag for (tag,) in sql(database, "SELECT DISTINCT tag FROM prompts")}
    assert len(tags) == 3
    for tag, like in tags.items():
        share, perplexity = found.measure("refusal", tag), found.measure("perplexity", tag)
        for line in found.lines:
            query = (
                "SELECT avg(score >= 1), count(score), avg(score) FROM verdicts JOIN prompts USING (run, prompt) "
                "WHERE judge = ? AND setting = ? AND tag LIKE ?"
            )
            rate, n, _ = sql(database, query, "j1", line.setting, like)[0]
            point = share.points[line.setting]
            assert (point.value, point.n) == (pytest.approx(rate, abs=1e-12), n) and point.low <= rate <= point.high
            mean = sql(database, query, "j2", line.setting, like)[0][2]
            assert perplexity.points[line.setting].value == pytest.approx(mean, rel=1e-12)
    kl = found.price(found.measure(None, None), None)
    assert kl.name == "kl" and not kl.share
    for setting, value in sql(database, "SELECT setting, kl FROM effects"):
        assert kl.points[setting].value == pytest.approx(value, rel=1e-12)


def test_the_recommended_setting_is_the_cheapest_strong_one(found):
    """By brute force over all settings, for every behaviour, goal, price, share and limit."""
    for behaviour in found.behaviours:
        for price in (None, *found.prices(behaviour)):
            for goal, sign in (("more", 1), ("less", -1)):
                choice = report.choose(found, behaviour, price, goal)
                for n in choice.front:
                    for m in choice.eligible:
                        better = choice.costs[m] <= choice.costs[n] and choice.gains[m] >= choice.gains[n]
                        assert not better or (choice.costs[m], choice.gains[m]) == (choice.costs[n], choice.gains[n])
                for share, limit in ((0.9, None), (0.5, 0.15), (1, None)):
                    strong = {
                        n: (choice.costs[n], -choice.gains[n])
                        for n in choice.eligible
                        if choice.gains[n] > 0 and (limit is None or choice.costs[n] <= limit)
                    }
                    top = max((choice.gains[n] for n in strong), default=0)
                    enough = [n for n in strong if choice.gains[n] >= share * top]
                    best = min(enough, key=lambda n: (*strong[n], n), default=None)
                    chosen = report.choose(found, behaviour, price, goal, share=share, limit=limit).recommended
                    assert chosen == best
                    if best is not None:
                        base, at = behaviour.points[0].value, behaviour.points[best]
                        assert sign * (at.value - base) > 0 and sign * at.over[0] > 0
    choice = report.choose(found, found.measure(None, None), found.price(found.measure(None, None), "kl"))
    assert found.lines[choice.recommended].name == "up L2 c1"  # NASTY costs twice as much, (2, 3) more, 0.5 is too weak


class Markup(HTMLParser):
    """Tags and every attribute of a page, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.attributes += attributes


def unpacked(html, name):
    packed = re.search(rf'id="data-{name}">([A-Za-z0-9+/=]*)</script>', html)[1]
    return gzip.decompress(base64.b64decode(packed)).decode()


@pytest.fixture(scope="module")
def html(database, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    arguments = ["report", str(database), "--out", f"{out}/r.html", "--png", f"{out}/png", "--json", "--title", NASTY]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["recommended"] == "up L2 c1" and facts["run"] == RUN
    for name in facts["figures"]:
        image = matplotlib.image.imread(name)
        assert image.shape[1] > 1000 and image[..., :3].std() > 0.05
    assert len(facts["figures"]) == 6
    return (out / "r.html").read_text(encoding="utf-8")


def test_the_page_holds_every_row_and_no_markup_of_others(database, html):
    plain = Markup(html)
    assert plain.found.count("script") == 5 and "img" not in plain.found and "iframe" not in plain.found
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in plain.attributes)
    assert "onerror='window.hit" not in html and "&lt;img src=x" in html
    data = json.loads(unpacked(html, "answers"))
    rows = [
        (s, p, data["texts"][t], data["errors"].get(str(i)))
        for i, (s, p, t) in enumerate(zip(data["setting"], data["prompt"], data["text"], strict=True))
    ]
    assert rows == sql(database, "SELECT setting, prompt, text, error FROM answers ORDER BY setting, prompt")


def test_the_projected_answer_of_a_setting(database):
    with Store(database, create=False) as store:
        directions = {d["direction"]: d for d in store.directions(RUN)}
        (row,) = store.projections(RUN, 2, 1)
        first, tagged = report.projected(store, RUN, 2), report.projected(store, RUN, 2, NASTY)
        assert report.projected(store, RUN, 0) is None and report.projected(store, RUN, 10**6) is None
    assert directions[row["direction"]]["vector"] == "up" and tagged.title.startswith("projection on up (its direction")
    for found, prompt in ((first, 0), (tagged, 1)):  # every second prompt has the nasty tag
        for values, setting in zip(found.values, (0, 2), strict=True):
            assert np.array_equal(values, made_up.projected(setting, prompt, row["direction"]), equal_nan=True)
        assert found.of_prompt == 2 and found.texts[0] == found.texts[1] and NASTY in found.texts[0]
        shown = np.concatenate([values[:, 1:].ravel() for values in found.values])
        assert colour_range(*found.values) == (np.nanmin(shown), np.nanmax(shown))


def test_what_cannot_be_shown_is_refused(tmp_path, database):
    def fails(*arguments):
        result = CliRunner().invoke(app, ["report", *map(str, arguments), "--out", str(tmp_path / "no.html")])
        assert result.exit_code == 1 and not (tmp_path / "no.html").exists()
        return " ".join(result.stderr.split())

    assert "no store at" in fails(tmp_path / "nothing.db")
    Store(tmp_path / "empty.db").close()
    assert "holds no sweep yet" in fails(tmp_path / "empty.db")
    assert "there is no judge 'kindness'" in fails(database, "--judge", "kindness")
    assert "has the tag 'nowhere'" in fails(database, "--tag", "nowhere")
    assert "nothing called 'gold' was measured" in fails(database, "--price", "gold")


def test_a_run_without_verdicts_is_refused(tmp_path):
    from made_up import described

    with Store(tmp_path / "s.db") as store:
        store.begin(RUN, 64, described(), {})
        with pytest.raises(StoreError, match="no verdict yet"):
            report.findings(store)


def test_file_names_are_safe_and_distinct():
    names = file_names(["../a", "a", "A", "$x$", "", "é"])
    assert len({name.lower() for name in names.values()}) == 6
    assert all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names.values())


def test_where_a_share_saturates_the_mean_score_is_shown_first_and_why(found):
    """As the table on the command line decides it."""

    def measured(unsteered):
        rates, means = (unsteered, 11), (0.6, 0.1)
        scores = [
            Score(20, 0, Estimate(m, m, m, 20), Rate(r, 20), None, None) for r, m in zip(rates, means, strict=True)
        ]
        lines = [
            Line(n, kind, kind, "v", (1,), 1.0, None, 20, 0, {"j": score})
            for n, (kind, score) in enumerate(zip(("unsteered", "vector"), scores, strict=True))
        ]
        return dataclasses.replace(found, lines=lines, measures=tuple(_judged(lines, None)))

    saturated, free = measured(20), measured(10)
    assert not saturated.measure(None, None).share and "100% of the unsteered answers" in saturated.reason(
        saturated.measure("j", None)
    )
    assert "only 0%" in measured(0).reason(measured(0).measure("j", None))
    assert free.measure("j", None).share and free.reason(free.measure("j", None)) == ""
    assert {m.share for m in saturated.behaviours} == {True, False}, "the other one can still be chosen"
