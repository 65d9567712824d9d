"""docs/vectors.md: its examples run, its commands do what is said of them, its tables are those of the results files.
(docs/observe.md and the README have tests of their own.)"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import faststeer as fs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    """One after the other; the training takes fewer steps than it says, and an autoencoder lies where it says."""
    monkeypatch.chdir(tmp_path)
    sae = tmp_path / "path" / "to" / "blocks.12.hook_resid_post"
    sae.mkdir(parents=True)
    (sae / "cfg.json").write_text(json.dumps({"hook_name": sae.name}))
    save_file({"W_dec": torch.ones(400, 8)}, sae / "sae_weights.safetensors")
    names: dict[str, object] = {}
    for example in blocks("python"):
        quick = example.replace("steps=20", "steps=2")
        exec(compile(quick, "docs/vectors.md", "exec"), names)
    assert names["training"].select(seed=1).vector.layers == (1, 2, 3)
    assert len(names["training"].runs) == 6 and (tmp_path / "po.safetensors").is_file()
    assert names["found"].dim().directions.shape[1:] == (6, 128)


def test_its_commands_run(tmp_path, monkeypatch):
    from faststeer.cli import app

    monkeypatch.chdir(tmp_path)
    vector = fs.SteeringVector({1: torch.ones(8), 2: torch.ones(8)}, op="add")
    fs.formats.save(vector, "control_vector.gguf")
    torch.save(torch.randn(5, 12, 8), "mean_diffs.pt")
    (convert,) = blocks("sh")
    for line in convert.splitlines():
        if "hub:" not in line:  # tests/formats/test_hub.py has a hub
            done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
            assert done.exit_code == 0, (line, done.output)
    assert fs.SteeringVector.load("refusal.safetensors").layers == (10,)
    assert fs.SteeringVector.load("refusal.safetensors").op == "ablate"
    assert fs.SteeringVector.load("vector.gguf").layers == (1, 2)


@pytest.mark.parametrize("behaviour", ["refusal", "tone"])
def test_the_tables_of_methods_are_measured(behaviour):
    measured = json.loads((RESULTS / f"extract_{behaviour}.json").read_text())
    assert not measured["skipped"] and measured["command"] in PAGE
    (table,) = re.findall(rf"--behaviour {behaviour} --method all --json.*?\n\n(.*?)\n\n", PAGE, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [result["method"] for result in measured["results"]]
    for row, result in zip(rows, measured["results"], strict=True):
        rates = [f"{result[name]['rate']:.1%}" for name in ("induce", "bypass", "coherent")]
        kl, cosine = ("" if result[n] is None else f"{result[n]:{f}}" for n, f in (("kl", ".3f"), ("cosine", "+.2f")))
        places = ["" if result[name] is None else str(result[name]) for name in ("layer", "position")]
        assert row[1:] == [*places, *rates[:2], kl, rates[2], cosine]
