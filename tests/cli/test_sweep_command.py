"""`faststeer sweep`, run as a user would: a description, a store, a table; what is wrong, and exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app
from faststeer.cli.sweep import results_table
from faststeer.evaluate.statistics import Estimate, Rate
from faststeer.evaluate.sweep import Line, Store, shows_share, table
from faststeer.evaluate.sweep.table import Score

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    fs.SteeringVector({n: 0.2 * torch.randn(128, generator=generator) for n in (2, 3)}, at="resid_pre").save(
        tmp_path / "v.safetensors"
    )
    (tmp_path / "sweep.yaml").write_text(
        "model: demo\nprompts: {demo: harmless, limit: 2, tag: d}\nvectors: {v: v.safetensors}\n"
        "layers: [3]\ncoefficients: [0, 1]\njudges: [refusal, length]\ntext: false\nmax_new_tokens: 4\n"
    )
    return tmp_path


def test_a_sweep_from_the_description_to_the_table(folder):
    store = folder / "rows.db"
    result = invoke("sweep", folder / "sweep.yaml", "--store", store, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    with Store(store, create=False) as opened:
        assert printed["run"] == opened.run()
        assert printed["lines"] == json.loads(json.dumps([line.to_dict() for line in table(opened)]))
    assert [line["name"] for line in printed["lines"]] == ["unsteered", "v L3 c1", "v~random0 L3 c1"]
    again = invoke("sweep", folder / "sweep.yaml", "--store", store, "--json")
    assert json.loads(again.stdout) == printed
    shown = invoke("sweep", "--show", printed["run"][:6], "--store", store, "--judge", "length", "--lines", "2")
    assert shown.exit_code == 0 and "1 more lines" in shown.stdout and "unsteered" in shown.stdout


def test_checking_runs_nothing(folder):
    result = invoke("sweep", folder / "sweep.yaml", "--check", "--json", "--store", folder / "none.db")
    assert json.loads(result.stdout) == {"settings": 3, "prompts": 2, "rows": 6}
    assert not (folder / "none.db").exists()


def test_what_is_wrong_is_said_and_exits_1(folder):
    path = folder / "sweep.yaml"
    path.write_text(path.read_text() + "coefficient: 2\n")
    result = invoke("sweep", path, "--store", folder / "s.db")
    assert result.exit_code == 1 and "line 9" in result.stderr and "did you mean 'coefficients'" in result.stderr
    assert not (folder / "s.db").exists()
    (folder / "s.db").write_text("no database " * 200)
    assert invoke("sweep", "--show", "newest", "--store", folder / "s.db").exit_code == 1
    assert invoke("sweep", "--show", "newest", "--store", folder / "none.db").exit_code == 1
    assert invoke("sweep").exit_code == 2 and invoke("sweep", path, "--show", "x").exit_code == 2


def test_verdicts_that_could_not_be_read_exit_3(folder):
    path = folder / "sweep.yaml"
    path.write_text(path.read_text().replace("[refusal, length]", "[length, 'python:math:isnan']"))
    assert invoke("sweep", path, "--store", folder / "s.db").exit_code != 0  # a judge that cannot read texts
    (folder / "judges_for_a_test.py").write_text("def none(text):\n    return None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        path.write_text(path.read_text().replace("python:math:isnan", "python:judges_for_a_test:none"))
        result = invoke("sweep", path, "--store", folder / "t.db")
    assert result.exit_code == 3, result.output
    assert "unread: 2" in result.stdout


def test_help_has_an_example_and_the_exit_codes():
    for command in ("sweep", "evaluate"):
        text = invoke(command, "--help").stdout
        assert "Example" in text and "Exit codes" in text and "--json" in text


def made_up(kind, mean, rate, over=0.0):
    score = Score(
        20, 0, Estimate(mean, mean - 0.1, mean + 0.1, 20), None if rate is None else Rate(rate, 20),
        Estimate(over, over - 0.01, over + 0.01, 20), None,
    )  # fmt: skip
    return Line(0, kind, kind, "v", (1,), 1.0, None, 20, 0, {"j": score})


def test_a_column_has_one_unit():
    """A share where it can move or is all there is to say, else mean scores; never both in one column."""
    for lines, share in (
        ([made_up("unsteered", 0.5, 10), made_up("vector", -0.2, 3)], True),
        ([made_up("unsteered", 0.57, 20), made_up("vector", -0.01, 11)], False),
        ([made_up("unsteered", 1.0, 20), made_up("vector", 0.5, 10)], True),  # a score of 0 or 1
        ([made_up("unsteered", 12.0, None), made_up("vector", 15.0, None)], False),
    ):
        assert shows_share(lines, "j") is share
        cells = list(results_table(lines, "").columns[1].cells)
        assert all(("%" in cell) is share for cell in cells), cells


def test_only_vectors_and_plans_are_starred():
    lines = [made_up(kind, 0.5, 10, over=0.3) for kind in ("unsteered", "control", "vector", "plan")]
    cells = list(results_table(lines, "").columns[1].cells)
    assert [cell.endswith("*") for cell in cells] == [False, False, True, True]
