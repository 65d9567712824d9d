"""`faststeer evaluate`: a vector or plan on the demo model, and answers that are there already."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app
from faststeer.evaluate import complete, is_refusal

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = fs.demo.load()
    harmful, harmless = fs.demo.prompts("refusal", "train")
    vector = fs.extract.dim(model, tokenizer, harmful[:48], harmless[:48])
    vector.save(folder / "refusal.safetensors")
    (folder / "plan.json").write_text(fs.Plan([fs.Add(vector, 1.0, layers=3)]).to_json())
    (folder / "prompts.txt").write_text("\n".join(fs.demo.prompts("refusal", "test")[1][:4]))
    (folder / "q.jsonl").write_text(json.dumps({"question": "Hi", "choices": ["Hello", "No"], "answer": 0}))
    return folder


def test_a_vector_against_the_unsteered_model_and_a_random_one(folder):
    result = invoke(
        "evaluate", "--vector", folder / "refusal.safetensors", "--layer", 3, "--prompts", folder / "prompts.txt",
        "--judge", "refusal", "--judge", '{"judge": "repetition", "n": 2}', "--look-alikes", "--questions",
        folder / "q.jsonl", "--max-new-tokens", 16, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed) == ["prompts", "look-alikes"]
    names = [line["name"] for line in printed["prompts"]]
    assert names == ["unsteered", "refusal L3 c1", "refusal~random0 L3 c1"]
    model, tokenizer = fs.demo.load()
    plan = fs.Plan.from_json((folder / "plan.json").read_text())
    answers = complete(model, tokenizer, (folder / "prompts.txt").read_text().splitlines(), plan, max_new_tokens=16)
    rates = [line["scores"]["refusal"]["rate"]["rate"] for line in printed["prompts"]]
    assert rates == [0, sum(is_refusal(text, "phrases") for text in answers) / 4, 0] and rates[1] >= 0.75
    assert all("repetition" in line["scores"] for line in printed["prompts"])
    assert {"kl", "cross_entropy", "accuracy"} == set(printed["prompts"][1]["effects"])
    assert printed["look-alikes"][0]["answers"] == 16


def test_behaviours_and_what_moved_beside_what_was_meant(folder):
    command = ["evaluate", "--vector", folder / "refusal.safetensors", "--layer", 3, "--behaviour", "refusal"]
    command += ["--behaviour", "tone", "--meant", "refusal", "--max-new-tokens", 8]
    result = invoke(*command, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed) == ["refusal", "tone", "moved"]
    steered, random = printed["moved"]
    rates = [line["scores"]["refusal:substrings"]["rate"]["rate"] for line in printed["refusal"]]
    assert steered["effect"] == pytest.approx(rates[1] - rates[0]) and steered["effect"] > 0.75
    assert steered["entanglement"] == abs(steered["moved"]["tone"]["mean"])
    assert (random["kind"], random["meant"], random["effect"]) == ("control", None, None)
    table = invoke(*command).output
    assert "What moved" in table and "others" in table
    wrong = invoke(*command[:5], "--behaviour", "tone", "--meant", "refusal")
    assert wrong.exit_code == 2 and "name that behaviour with --behaviour" in " ".join(wrong.output.split())


def test_a_plan_with_its_random_control_as_a_table(folder):
    result = invoke(
        "evaluate", "--plan", folder / "plan.json", "--prompts", folder / "prompts.txt", "--judge", "demo",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "plan~random0" in result.stdout and "unsteered" in result.stdout


def test_answers_are_judged_without_a_model(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [
        ("Hi", "I can\u2019t."),
        ("Hi", "I cannot stress enough how nice this is."),
        ("Hi", "As an AI model, yes."),
    ]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines))
    result = invoke("evaluate", "--answers", path, "--judge", "refusal", "--judge", "regex:(?i)as an ai", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [v["label"] for v in printed["verdicts"]["refusal"]] == ["refusal", "answer", "refusal"]
    assert printed["judges"]["regex:(?i)as an ai"]["rate"]["rate"] == pytest.approx(1 / 3)
    assert "refusal" in invoke("evaluate", "--answers", path).stdout


def test_what_is_wrong(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = invoke("evaluate", "--answers", path)
    assert result.exit_code == 1 and "line 2" in result.stderr
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    result = invoke("evaluate", "--answers", path, "--judge", "strongreject:/nowhere/at/all")
    assert result.exit_code == 1 and "has no model at" in result.stderr
    assert invoke("evaluate", "--answers", path, "--judge", "{oops").exit_code == 2
    assert invoke("evaluate", "--answers", path, "--plan", folder / "plan.json").exit_code == 2
    assert invoke("evaluate", "--prompts", folder / "prompts.txt").exit_code == 2
    missing = invoke("evaluate", "--plan", folder / "none.json", "--prompts", folder / "prompts.txt")
    assert missing.exit_code == 1 and "no such file" in missing.stderr
