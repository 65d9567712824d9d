"""`faststeer plan`: plans made and explained on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").replace("┃", " ").split())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a vector of one layer and one of several, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    fs.SteeringVector({3: torch.randn(8, generator=generator)}, at="resid_pre").save("vectors/one.safetensors")
    directions = {layer: torch.randn(8, generator=generator) for layer in range(5)}
    fs.SteeringVector(directions, at="resid_post").save("vectors/many.safetensors")
    return tmp_path


ONE, MANY = "vectors/one.safetensors", "vectors/many.safetensors"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--add", ONE, "--coefficient", 1.5), lambda one, many: fs.Add(one, 1.5, layers=3)),
        (
            ("--ablate", MANY, "--layer", "1-2,4", "--strength", 2, "--positions", "generated"),
            lambda one, many: fs.Ablate(many, 2.0, layers=(1, 2, 4), positions="generated"),
        ),
        (
            ("--ablate", MANY, "--layer", 2, "--everywhere"),
            lambda one, many: fs.Ablate(many[2], layers="all", at=("resid_pre", "attn_out", "mlp_out")),
        ),
        (
            ("--clamp", ONE, "--high", 0.5, "--at", "attn_out, mlp_out", "--keep-norm"),
            lambda one, many: fs.Clamp(one, high=0.5, layers=3, at=("attn_out", "mlp_out"), keep_norm=True),
        ),
        (("--project", MANY, "--layer", "all"), lambda one, many: fs.Project(many, layers=range(5))),
        (("--probe", ONE), lambda one, many: fs.Probe(one, layers=3)),
        (
            ("--rotate", ONE, "--towards", "vectors/other.safetensors", "--degrees", 30),
            lambda one, many: fs.Rotate(one, fs.SteeringVector.load("vectors/other.safetensors"), 30.0, layers=3),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_plan_is_what_the_library_makes(folder, options, expected):
    fs.SteeringVector({3: torch.arange(8.0)}, at="resid_pre").save("vectors/other.safetensors")
    result = invoke("plan", *options, "--out", "plans/plan.json")
    assert result.exit_code == 0, result.output
    plan = fs.Plan.load("plans/plan.json")
    assert plan == fs.Plan([expected(fs.SteeringVector.load(ONE), fs.SteeringVector.load(MANY))])


def test_vectors_are_named_relative_to_the_plan_so_that_both_can_move(folder):
    assert invoke("plan", "--add", ONE, "--out", "plans/plan.json").exit_code == 0
    data = json.loads((folder / "plans" / "plan.json").read_text())
    assert data["interventions"][0]["direction"]["path"] == "../vectors/one.safetensors"
    moved = folder / "elsewhere"
    moved.mkdir()
    (folder / "plans").rename(moved / "plans")
    (folder / "vectors").rename(moved / "vectors")
    assert len(fs.Plan.load(moved / "plans" / "plan.json")) == 1


def test_an_intervention_is_put_behind_those_of_a_plan(folder):
    assert invoke("plan", "--add", ONE, "--out", "a.json").exit_code == 0
    assert invoke("plan", "a.json", "--ablate", MANY, "--layer", 4, "--out", "b.json").exit_code == 0
    assert [type(i).__name__ for i in fs.Plan.load("b.json")] == ["Add", "Ablate"]
    assert [type(i).__name__ for i in fs.Plan.load("a.json")] == ["Add"]


def test_a_plan_is_explained(folder):
    gate = fs.Gate(torch.ones(8), 0.25, kind="cosine", latched=True)
    fs.Plan([fs.Add(fs.SteeringVector.load(ONE), -2, when=gate), fs.Ablate(torch.eye(8)[:2], layers="all")]).save(
        "p.json"
    )
    text = words(invoke("plan", "p.json").output)
    for part in (
        "add -2 x",
        "one.safetensors",
        "resid_pre",
        "cosine",
        "0.25",
        "2 directions of 8",
        "resid_post",
        "all",
    ):
        assert part in text
    assert json.loads(invoke("plan", "p.json", "--json").stdout)["format"] == "faststeer.plan/1"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name a plan to explain"),
        (("--add", ONE, "--ablate", ONE), 2, "one intervention in one call"),
        (("--add", MANY), 1, "--layer 2. --layer all"),
        (("--add", MANY, "--layer", "7"), 1, "no direction for layer 7: it has 0..4"),
        (("--add", MANY, "--layer", "4-1"), 2, "expected layers such as"),
        (("--add", MANY, "--layer", "0-99999999999"), 2, "expected layers such as"),
        (("--add", "nowhere.safetensors"), 1, "no such file"),
        (("--rotate", ONE), 2, "give both"),
        (("--clamp", ONE), 1, "give at least one bound"),
        (("--add", ONE, "--at", "resid_past"), 1, "unknown hook point"),
        (("--ablate", MANY, "--layer", "1,2", "--everywhere"), 2, "direction of one layer"),
        (("vectors",), 1, "it is a folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_bad_input_is_refused_and_writes_nothing(folder, arguments, code, message):
    before = sorted(folder.rglob("*"))
    result = invoke("plan", *arguments, "--out", "plan.json")
    assert result.exit_code == code, result.output
    assert message in words(result.stderr)
    assert sorted(folder.rglob("*")) == before


def test_the_schema_is_printed_alone(folder):
    from faststeer.plan_schema import plan_schema

    done = invoke("plan", "--schema")
    assert done.exit_code == 0 and json.loads(done.stdout) == plan_schema()
