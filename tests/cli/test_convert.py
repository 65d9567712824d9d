"""`faststeer convert`, as a user would run it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def vector(tmp_path):
    v = fs.SteeringVector({1: torch.linspace(-1, 1, 8), 2: torch.ones(8)}, model="m", method="dim")
    v.save(tmp_path / "v.safetensors")
    return v


def test_there_and_back(vector, tmp_path):
    there = invoke(tmp_path / "v.safetensors", tmp_path / "v.gguf", "--model-hint", "llama", "--json")
    assert there.exit_code == 0, there.output
    back = invoke(tmp_path / "v.gguf", tmp_path / "back.safetensors", "--json")
    report = json.loads(back.stdout)
    assert (report["at"], report["op"], report["layers"], report["model"]) == ("resid_post", "add", [1, 2], "m")
    again = fs.SteeringVector.load(tmp_path / "back.safetensors")
    assert all(torch.equal(again[n], vector[n]) for n in vector.layers) and again.op == "add"


def test_without_a_target_it_says_what_the_file_is(vector, tmp_path):
    result = invoke(tmp_path / "v.safetensors")
    assert result.exit_code == 0 and "resid_post" in result.stdout and "Written" not in result.stdout
    assert json.loads(invoke(tmp_path / "v.safetensors", "--json").stdout)["norms"]["2"] == pytest.approx(8**0.5)


@pytest.mark.parametrize(("at", "left_out"), [("resid_pre", [0, 1]), ("resid_post", [0])])
def test_layers_that_gguf_cannot_hold_are_left_out_and_named(at, left_out, tmp_path):
    vector = fs.SteeringVector({layer: torch.full((8,), layer + 1.0) for layer in range(4)}, at=at)
    vector.save(tmp_path / "v.safetensors")
    printed = invoke(tmp_path / "v.safetensors", tmp_path / "v.gguf")
    assert printed.exit_code == 0, printed.output
    assert f"Left out: layers {', '.join(map(str, left_out))} at {at}" in " ".join(printed.stdout.split())
    report = json.loads(invoke(tmp_path / "v.safetensors", tmp_path / "v.gguf", "--json").stdout)
    assert report["left_out"] == left_out
    back = fs.SteeringVector.load(tmp_path / "v.gguf")
    shift = 1 if at == "resid_pre" else 0
    assert back.layers == tuple(layer - shift for layer in range(left_out[-1] + 1, 4))
    assert all(torch.equal(back[layer - shift], vector[layer]) for layer in range(left_out[-1] + 1, 4))
    fs.SteeringVector({0: torch.ones(8)}, at=at).save(tmp_path / "first.safetensors")
    refused = invoke(tmp_path / "first.safetensors", tmp_path / "first.gguf")
    assert refused.exit_code == 1 and "cannot hold them" in " ".join(refused.stderr.split())
    assert not (tmp_path / "first.gguf").exists()


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    torch.save(torch.ones(8), tmp_path / "d.pt")
    target = tmp_path / "d.safetensors"
    asked = invoke(tmp_path / "d.pt", target)
    assert asked.exit_code == 1 and "say layer= and at=" in " ".join(asked.stderr.split()) and not target.exists()
    assert invoke(tmp_path / "d.pt", target, "--at", "resid_pre", "--layer", 3, "--op", "ablate").exit_code == 0
    v = fs.SteeringVector.load(target)
    assert (v.layers, v.at, v.op) == ((3,), "resid_pre", "ablate")
    refused = invoke(target, tmp_path / "d.gguf")
    assert refused.exit_code == 1 and "meant to ablate" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.gguf",), "no such file"),
        (("v.safetensors", "x", "--to", "npz"), "cannot write format 'npz'"),
        (("v.safetensors", "x", "--at", "resid"), "unknown hook point"),
        (("hub:name",), "expected hub:user/name"),
    ],
    ids=["missing", "format", "hook_point", "hub"],
)
def test_errors_without_a_traceback(vector, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_help_shows_an_example():
    assert "Example: faststeer convert" in " ".join(invoke("--help").stdout.split())
