"""`faststeer extract` with behaviours and methods, run as a user would."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(app, ["extract", *(str(a) for a in arguments)])


def succeeds(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = ("--prompts", 4, "--max-new-tokens", 4)


def test_methods_side_by_side(tmp_path):
    report = json.loads(
        succeeds(
            "--behaviour",
            "tone",
            "--method",
            "pca,dim",
            *SMALL,
            "--coefficients",
            "0.5,1",
            "--out",
            tmp_path / "v",
            "--json",
        )
    )
    assert [row["method"] for row in report["results"]] == ["pca", "dim", "random", "none"]
    assert (report["behaviour"], report["skipped"]) == ("tone", {})
    assert report["settings"]["coefficients"] == [0.5, 1.0]
    assert report["n_prompts"]["test_induce"] == 4
    assert json.loads((tmp_path / "v" / "comparison.json").read_text()) == report
    for row in report["results"][:3]:
        vector = fs.SteeringVector.load(tmp_path / "v" / f"{row['method']}.safetensors")
        assert vector.layers == (row["layer"],) and vector.method == row["method"]
        assert row["norm"] == pytest.approx(float(vector[row["layer"]].norm()) * row["coefficient"], rel=1e-5)
    # One length for all, that of the difference in means.
    pca, dim = report["results"][:2]
    assert dim["cosine"] == pytest.approx(1.0)
    found = fs.extract.candidates(*fs.demo.load(), *fs.demo.prompts("tone", "train"))
    expected = found.vector(pca["position"], pca["layer"])[pca["layer"]].norm().item()
    assert pca["norm"] == pytest.approx(expected * pca["coefficient"], rel=1e-4)


def test_the_table_names_what_was_measured():
    table = succeeds("--method", "dim", *SMALL)
    for word in ("method", "induce", "bypass", "coherent", "random", "refusal", "4 prompts"):
        assert word in table


def test_files_of_prompts_make_a_behaviour(tmp_path):
    harmful, harmless = fs.demo.prompts("refusal", "train")
    (tmp_path / "harmful.csv").write_text(
        "goal,target\n" + "\n".join(f"{p},Sure" for p in harmful[:15] if "," not in p)
    )
    (tmp_path / "harmless.json").write_text(
        json.dumps([{"instruction": p, "input": "", "output": "x"} for p in harmless[:15]])
    )
    sets = ("--positive", tmp_path / "harmful.csv", "--negative", tmp_path / "harmless.json")
    report = json.loads(succeeds(*sets, "--method", "dim,caa", *SMALL, "--json"))
    assert report["n_prompts"]["train"] < 30
    assert "has no training pairs" in report["skipped"]["caa"]


def test_a_behaviours_prompts_without_a_method(tmp_path):
    report = json.loads(
        succeeds("--behaviour", "sentiment", "--layer", 2, "--out", tmp_path / "v.safetensors", "--json")
    )
    assert report["n_positive"] == report["n_negative"] == 24
    assert fs.SteeringVector.load(tmp_path / "v.safetensors").layers == (2,)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "dim,magic"), 1, "unknown method(s) magic: expected dim, pca"),
        (("--method", "dim", "--layer", "2"), 2, "--method chooses layer and token"),
        (("--method", "dim", "--coefficients", "one"), 2, "expected numbers with commas"),
        (("--method", "dim", "--coefficients", "-1"), 1, "expected distinct positive numbers"),
        (("--method", "dim", "--behaviour", "kindness"), 1, "no behaviour 'kindness'"),
        (("--behaviour", "refusal"), 2, "--out is needed"),
        (("--method", "dim", "--positive", "a.txt"), 2, "--negative"),
        (("--method", "dim", "--model", "m"), 2, "only the demo model brings its own prompts"),
        (("--method", "dim", "--at", "resid_past"), 1, "unknown hook point"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_errors_say_what_is_wrong(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
