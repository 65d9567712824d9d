"""`faststeer extract` with behaviours and methods, run as a user would."""

from __future__ import annotations

import json
import shlex
import sys

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
    few = ("--train", 6, "--held-out", 2)
    report = json.loads(succeeds(*sets, "--method", "dim,caa", "--judge", "refusal", *few, *SMALL, "--json"))
    assert (report["n_prompts"]["train"], report["n_prompts"]["select_induce"]) == (12, 2)
    assert "has no training pairs" in report["skipped"]["caa"]


def test_a_behaviours_prompts_without_a_method(tmp_path):
    report = json.loads(
        succeeds("--behaviour", "sentiment", "--layer", 2, "--out", tmp_path / "v.safetensors", "--json")
    )
    assert report["n_positive"] == report["n_negative"] == 24
    few = json.loads(
        succeeds("--behaviour", "sentiment", "--train", 5, "--out", tmp_path / "few.safetensors", "--json")
    )
    assert few["n_positive"] == few["n_negative"] == 5
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


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two files of the demo model's prompts, and the options that name them."""
    folder = tmp_path_factory.mktemp("sides")
    harmful, harmless = fs.demo.prompts("refusal", "train")
    (folder / "harmful.txt").write_text("\n".join(harmful[:20]))
    (folder / "harmless.txt").write_text("\n".join(harmless[:20]))
    return "--positive", folder / "harmful.txt", "--negative", folder / "harmless.txt"


@pytest.mark.parametrize("rule", ["refusal", "cosmic", "judge"])
def test_every_rule_selects_among_the_layers_asked_for(rule, sides, tmp_path):
    options = ("--select", rule, "--layers", "2-4", "--judge", "refusal", "--max-new-tokens", 16)
    if rule == "refusal":
        options += ("--coefficients", "0.5,1")
    report = json.loads(succeeds(*sides, *options, "--out", tmp_path / "v.safetensors", "--json"))
    table = report["selection"]["table"]
    assert {row["layer"] for row in table} == {2, 3, 4} and {row["position"] for row in table} == {-1}
    vector = fs.SteeringVector.load(tmp_path / "v.safetensors")
    assert vector.layers == (report["selection"]["chosen"]["layer"],)
    assert vector.provenance["n_positive"] == 16  # a fifth of 20 is held out
    assert "chosen" in succeeds(*sides, *options, "--out", tmp_path / "v.safetensors")


def test_the_next_command_is_printed_and_works(sides, tmp_path):
    out = tmp_path / "v.safetensors"
    report = json.loads(succeeds(*sides, "--out", out, "--json"))
    command = shlex.split(report["next"])
    assert command[:2] == ["faststeer", "generate"] and "--layer" in command
    layer = int(command[command.index("--layer") + 1])
    middle = [number for number in report["layers"] if 0.3 * 6 <= number <= 0.75 * 6]
    assert layer in middle and all(report["relative"][str(layer)] >= report["relative"][str(n)] for n in middle)
    result = runner.invoke(app, [*command[1:], "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output


def test_relative_lengths_are_those_of_the_means(sides):
    prompts = [fs.extract.load_prompts(sides[1]), fs.extract.load_prompts(sides[3])]
    found = fs.extract.candidates(*fs.demo.load(), *prompts, positions=[-1])
    means = found.positive_mean[0, 4], found.negative_mean[0, 4]
    expected = (means[0] - means[1]).norm() / ((means[0].norm() + means[1].norm()) / 2)
    assert found.relative_norm(-1, 4) == pytest.approx(float(expected), rel=1e-12)


def test_what_selects_by_refusal_is_checked_before_any_work(sides, tmp_path, monkeypatch):
    """The prompts' sides swapped, so that no refusal token can tell them apart."""
    monkeypatch.setattr(fs.extract, "candidates", lambda *args, **kwargs: pytest.fail("worked before checking"))
    swapped = ("--positive", sides[3], "--negative", sides[1])
    result = invoke(*swapped, "--select", "refusal", "--out", tmp_path / "v.safetensors")
    assert result.exit_code == 1
    assert "--select cosmic" in " ".join(result.stderr.split())


@pytest.mark.parametrize("rule", ["refusal", "cosmic", "judge"])
def test_long_work_is_forecast_before_it_begins_with_options_that_make_it_shorter(rule, tmp_path, monkeypatch):
    def seconds(model, tokenizer, rule, induce, suppress, n_candidates, *_, **__):
        return 12.5 * n_candidates * len(induce)

    monkeypatch.setattr(fs.extract, "selection_seconds", seconds)
    options = ("--behaviour", "refusal", "--select", rule, "--max-new-tokens", 2, "--out", tmp_path / "v.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(fs.extract, "candidates", lambda *_, **__: print("work", file=sys.stderr) or 1 / 0)
        said = " ".join(invoke(*options, "--held-out", 8).stderr.split())
    (n, layers) = (4, "1,3") if rule == "judge" else (6, "1,4")
    assert f"Choosing among {n} candidates on 8 + 8 prompts: about {'7' if rule == 'judge' else '10'} min." in said
    less = f"--held-out 4 --layers {layers}"
    assert said.index(f"With {less}: about 2 min") < said.index("work")
    result = invoke(*options, *less.split(), "--json")
    assert result.exit_code == 0 and "With --" not in result.stderr, result.output
    tried = {row["layer"] for row in json.loads(result.stdout)["selection"]["table"]}
    assert ",".join(map(str, sorted(tried))) == layers


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--method", "dim"), 2, "say what reads the answers: --judge"),
        (("--out", "v.safetensors", "--select", "judge"), 2, "--select judge needs --judge"),
        (("--out", "v.safetensors", "--select", "judge", "--judge", "nobody"), 1, "unknown judge 'nobody'"),
        (("--out", "v.safetensors", "--select", "magic"), 2, "'magic' is not one of"),
        (("--out", "v.safetensors", "--select", "cosmic", "--layers", "2-99"), 1, "the model has layers 0..5"),
        (("--out", "v.safetensors", "--select", "cosmic", "--layer", "2"), 2, "--select chooses the layer"),
        (("--out", "v.safetensors", "--layers", "2"), 2, "--layers names candidates"),
        (("--out", "v.safetensors", "--position", "-1,-2"), 2, "one token is read"),
        (("--out", "v.safetensors", "--position", "3"), 2, "expected negative numbers"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else None,
)
def test_own_prompts_with_options_that_do_not_fit(options, code, message, sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*sides, *options)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_another_kind_of_file_is_told_before_the_work(tmp_path):
    result = invoke("--model", tmp_path / "none", "--behaviour", "tone", "--out", tmp_path / "v.gguf")
    assert result.exit_code == 1 and "name it .safetensors" in result.output
