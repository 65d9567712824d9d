"""Training the demo model, as far as a test has time for it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import faststeer as fs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "toy"))
import train

FEW = replace(train.Settings(), steps=2, finishing_steps=2, polishing_steps=3, warm_up=1)


@pytest.fixture(scope="module")
def command():
    app = typer.Typer()
    app.command()(train.main)
    return app


def test_polishing_is_the_last_stage_alone_and_repeats_itself():
    _, tokenizer = fs.demo.load()
    polished = []
    for _ in range(2):
        steps: list[int] = []
        model = train.train_model(5, tokenizer, FEW, steps.append, train.load(train.FOLDER))
        assert steps == [1, 2, 3] and not model.training
        assert not any(layer._forward_hooks for layer in model.model.layers)
        polished.append(model.state_dict())
    shipped = train.load(train.FOLDER).state_dict()
    assert polished[0].keys() == shipped.keys()
    for name, weight in shipped.items():
        assert torch.equal(polished[0][name], polished[1][name]) and not torch.equal(polished[0][name], weight)
        assert (polished[0][name] - weight).abs().max() < 0.01  # three steps from a low rate


def test_training_has_every_stage():
    _, tokenizer = fs.demo.load()
    steps: list[int] = []
    train.train_model(0, tokenizer, FEW, steps.append)
    assert steps == [*range(1, 8)] and FEW.total_steps == 7


def test_what_shipped_says_how_it_was_made():
    record = json.loads((train.FOLDER / "training.json").read_text())
    assert record["settings"]["polishing_steps"] == train.Settings().polishing_steps
    assert record["polished"]["settings"]["finishing_steps"] == train.Settings().finishing_steps
    assert record["validation"]["0"]["weakest"] >= 0.95


@pytest.mark.parametrize("polish", [True, False])
def test_folders_that_are_no_models_are_refused(command, tmp_path, polish):
    (tmp_path / "notes.txt").write_text("mine")
    done = CliRunner().invoke(command, ["--out", str(tmp_path), *(["--polish"] if polish else [])])
    assert done.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_to_polish(command, tmp_path):
    done = CliRunner().invoke(command, ["--out", str(tmp_path / "new"), "--polish"], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "has no model that this program has trained" in done.output
