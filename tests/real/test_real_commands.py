"""Every command of the README and of docs/ runs on SmolLM2 as it stands, but for small settings that are added."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app

ROOT = Path(__file__).parents[2]
# Added to what a page says, by command; the model where the page leaves it out.
SMALL = {
    "extract": "--layers 14-15 --max-new-tokens 4",
    "generate": "--max-new-tokens 4",
    "evaluate": "--max-new-tokens 4 --controls 0",
    "observe": "--method dim --layer 15 --position -1 --prompts 2 --patched 1 --tried 1 --utility 2 --points 1 "
    "--shares 0.01,1 --sparsities 0.5 --controls 1 --max-new-tokens 4",
    "verify": "--seconds 5",
}
COMPARING = "--steps 1 --prompts 2 --coefficients 1"  # of extract --method
SWEEP = """
model: smollm2
prompts: [{file: harmless.txt, limit: 2, tag: harmless}]
vectors: {refusal: refusal.safetensors}
layers: [14, 15]
coefficients: [0, 1]
judges: [refusal, repetition]
max_new_tokens: 4
"""


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^ {4}\S.*", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    lines = [line.strip() for block in [*fenced, *indented] for line in block.splitlines()]
    return [line for line in lines if re.match(r"faststeer [a-z]+( |$)", line)]


PAGES = [
    page for page in ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))) if commands(page)
]


@pytest.fixture
def folder(tmp_path, monkeypatch, smollm2):
    """What the pages' commands find: prompts, vectors, a plan, a sweep's store, files of other tools."""
    monkeypatch.chdir(tmp_path)
    split = fs.behaviours.load("refusal").train
    harmful, harmless = split.positive[:10], split.negative[:10]
    Path("harmful.txt").write_text("\n".join(harmful) + "\n")
    Path("harmless.txt").write_text("\n".join(harmless) + "\n")
    Path("prompts.txt").write_text("\n".join(harmless[:2]) + "\n")
    Path("advbench.csv").write_text("goal\n" + "\n".join(json.dumps(text) for text in harmful) + "\n")
    Path("alpaca.json").write_text(json.dumps([{"instruction": text, "input": ""} for text in harmless]))
    Path("sweep.yaml").write_text(SWEEP)
    vector = fs.extract.dim(*smollm2, harmful, harmless)
    for name in ("refusal", "pca"):
        vector.save(f"{name}.safetensors")
    fs.Plan([fs.Ablate(vector, layers=14)]).save("plan.json")
    hidden = smollm2[0].config.hidden_size
    fs.formats.save(fs.SteeringVector({1: torch.ones(hidden), 2: torch.ones(hidden)}, op="add"), "control_vector.gguf")
    torch.save(torch.randn(5, 30, hidden), "mean_diffs.pt")
    return tmp_path


def invoke(words: list[str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.output + (f"\n{done.exception!r}" if done.exception else "")


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_run(page, folder):
    if page == "docs/report.md":  # it begins with the store of a sweep
        assert invoke(["sweep", "sweep.yaml", "--store", "sweep.db"])[0] == 0
    for line in commands(page):
        if "hub:" in line:  # tests/formats/test_hub.py has a hub
            continue
        words = shlex.split(line, comments=True)[1:]
        words = ["smollm2" if word == "./my-model" else word for word in words]
        if "--model" not in words and words[0] in ("extract", "observe", "evaluate", "ui"):
            words += ["--model", "smollm2"]
        words += shlex.split(SMALL.get(words[0], ""))
        if words[0] == "extract" and "--method" in words:
            words += shlex.split(COMPARING)
        if words[0] == "evaluate" and "--layer" in words:  # the page's vector is the demo model's, of one layer more
            words[words.index("--layer") + 1] = "14"
        if words[0] == "ui":
            check_page(words)
            continue
        code, output = invoke(words)
        assert code in ((0, 3) if words[0] in ("observe", "extract") else (0,)), (line, words, output)
    if page == "README.md":
        assert len(fs.SteeringVector.load("refusal.safetensors").layers) == 1
        assert Path("report.html").stat().st_size > 10_000 and Path("my-model-folded", "config.json").is_file()


def check_page(words: list[str]) -> None:
    """The page is served; Ctrl-C ends it."""
    program = [sys.executable, "-m", "faststeer", *words, "--port", "0"]
    server = subprocess.Popen(program, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = ""
        while not (address := re.search(r"http://[\d.]+:\d+\S*", said)):
            line = server.stdout.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(address[0], timeout=60) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
    finally:
        server.terminate()
        server.wait(60)
