"""`faststeer fold`, as a user would run it, on the demo model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["fold", *map(str, arguments)])


@pytest.fixture(scope="module")
def direction() -> torch.Tensor:
    return torch.linspace(-1, 2, 128)


def test_the_folded_demo_model_answers_as_the_steered_one(direction, tmp_path):
    plan = fs.Plan([fs.Ablate(direction, layers="all", at=("resid_pre", "attn_out", "mlp_out"))])
    (tmp_path / "plan.json").write_text(plan.to_json())
    result = invoke("--plan", tmp_path / "plan.json", "--out", tmp_path / "folded", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["check"]["equal"] == report["check"]["tokens"] > 0
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folded")
    model, _ = fs.demo.load()
    asked = fs.demo.prompts("refusal", "train")[0][:4]
    steered = fs.evaluate.complete(model, tokenizer, asked, plan, max_new_tokens=12)
    assert fs.evaluate.complete(folded, tokenizer, asked, None, max_new_tokens=12) == steered
    assert (
        fs.Plan.from_json(json.dumps(json.loads((tmp_path / "folded" / "faststeer_fold.json").read_text())["plan"]))
        == plan
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter(direction, tmp_path):
    (tmp_path / "plan.json").write_text(fs.Plan([fs.Add(direction, layers=2)]).to_json())
    result = invoke("--plan", tmp_path / "plan.json", "--out", tmp_path / "adapter", "--adapter")
    assert result.exit_code == 0 and "greedy tokens that agree" in result.stdout, result.output
    assert {"adapter_config.json", "adapter_model.safetensors", "faststeer_fold.json"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }


def test_what_cannot_be_folded_is_said_and_nothing_written(direction, tmp_path):
    (tmp_path / "plan.json").write_text(fs.Plan([fs.Ablate(direction, layers=3)]).to_json())
    result = invoke("--plan", tmp_path / "plan.json", "--out", tmp_path / "folded")
    assert result.exit_code == 1 and "which the layers in between have read" in " ".join(result.stderr.split())
    assert not (tmp_path / "folded").exists() and "Traceback" not in result.output
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    result = invoke("--plan", tmp_path / "plan.json", "--out", tmp_path / "there")
    assert result.exit_code == 1 and "is there already" in " ".join(result.stderr.split())
    assert invoke("--plan", tmp_path / "none.json", "--out", tmp_path / "folded").exit_code == 1


def test_help_shows_an_example():
    assert "Example: faststeer fold" in " ".join(invoke("--help").stdout.split())
