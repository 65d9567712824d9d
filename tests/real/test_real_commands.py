"""Every command of faststeer in the README and docs/ runs on SmolLM2 as it stands, but for small settings that are
added to it. (What starts vLLM is in tests/vllm.)"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import threading
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
import faststeer.behaviours.compare as comparing
from faststeer.cli import app

ROOT = Path(__file__).parents[2]
# Added to what a page says, by command; the model where the page leaves it out.
SMALL = {
    "extract": "--layers 15 --train 4 --held-out 1 --max-new-tokens 2",
    "generate": "--max-new-tokens 4",
    "evaluate": "--max-new-tokens 2 --controls 0 --judge refusal",
    "observe": "--method dim --layer 15 --position -1 --prompts 2 --patched 1 --tried 1 --utility 1 --points 1 "
    "--shares 0.01,1 --sparsities 0.5 --controls 1 --max-new-tokens 4",
    "verify": "--seconds 5",
    "search": "--answers 60 --goal less --prompts 2 --finalists 1 --train 16 --layers 15-24 --op add --method dim "
    "--position -1 --max-kl 5 --max-perplexity 1000 --max-repetition 1 --max-new-tokens 8",
}
COMPARING = "--position -1 --steps 1 --prompts 1"  # of extract --method
LAYER = "15"
SWEEP = """
model: smollm2
prompts: [{file: harmless.txt, limit: 2, tag: harmless}]
vectors: {refusal: refusal.safetensors}
coefficients: [0, 1]
judges: [refusal, repetition]
text: [The river is wide.]
projections: 1
max_new_tokens: 4
"""


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that call faststeer."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^ {4}\S.*", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    lines = [line.strip() for block in [*fenced, *indented] for line in block.splitlines()]
    return [line for line in lines if line.startswith("faststeer ")]


PAGES = [
    page for page in ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))) if commands(page)
]


@pytest.fixture(scope="module")
def shared(smollm2) -> Iterator[None]:
    """The model is loaded once, and not by every command; what several pages ask for is compared once."""
    load, fold, compare, comparisons = fs.hf.load, fs.folding.fold, comparing.compare, {}

    def loaded(name: str, dtype: Any = None, device: Any = "cpu") -> tuple[Any, Any]:
        return smollm2 if name == "smollm2" else load(name, dtype, device)

    def compared(model: Any, tokenizer: Any, behaviour: Any, *arguments: Any, **options: Any) -> Any:
        asked = repr((behaviour.to_json(), arguments, options))
        if asked not in comparisons:
            comparisons[asked] = compare(model, tokenizer, behaviour, *arguments, **options)
        return comparisons[asked]

    def folded(model: Any, *arguments: Any, **options: Any) -> Any:
        return fold(copy.deepcopy(model), *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fs.hf, "load", loaded)
        patched.setattr(fs.folding, "fold", folded)
        patched.setattr(comparing, "compare", compared)
        yield


@pytest.fixture(scope="module")
def vector(smollm2) -> fs.SteeringVector:
    split = fs.behaviours.load("refusal").train
    whole = fs.extract.dim(*smollm2, split.positive[:4], split.negative[:4])
    return fs.SteeringVector({int(LAYER): whole[int(LAYER)]}, at=whole.at)


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """The folder of every page's study: the second goes on with what the first has finished."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def folder(tmp_path, monkeypatch, shared, vector) -> Path:
    """What the pages' commands find: prompts, vectors, a plan, files of other tools."""
    monkeypatch.chdir(tmp_path)
    split = fs.behaviours.load("refusal").train
    harmful, harmless = split.positive[:6], split.negative[:6]
    Path("harmful.txt").write_text("\n".join(harmful) + "\n")
    Path("harmless.txt").write_text("\n".join(harmless) + "\n")
    Path("prompts.txt").write_text("\n".join(harmless[:2]) + "\n")
    Path("advbench.csv").write_text("goal\n" + "\n".join(json.dumps(text) for text in harmful) + "\n")
    Path("alpaca.json").write_text(json.dumps([{"instruction": text, "input": ""} for text in harmless]))
    Path("sweep.yaml").write_text(SWEEP)
    for name in ("refusal", "pca", "tone"):
        vector.save(f"{name}.safetensors")
    fs.Plan([fs.Ablate(vector, layers=int(LAYER))]).save("plan.json")
    fs.Plan([fs.Add(vector, -1.0, layers=int(LAYER))]).save("gloomy.json")
    Path("examples").symlink_to(ROOT / "examples")
    shutil.copy("examples/plans/gated.json", "gated.json")
    fs.SteeringVector(dict.fromkeys(range(12, 17), vector[int(LAYER)]), at=vector.at).save("vector.safetensors")
    hidden = vector[int(LAYER)].numel()
    fs.formats.save(fs.SteeringVector({1: torch.ones(hidden), 2: torch.ones(hidden)}, op="add"), "control_vector.gguf")
    torch.save(torch.randn(5, 30, hidden), "mean_diffs.pt")
    return tmp_path


def invoke(words: list[str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.output + (f"\n{done.exception!r}" if done.exception else "")


def small(line: str) -> list[str]:
    """The words of a page's command, on SmolLM2 and with small settings."""
    command, *words = shlex.split(line, comments=True)[1:]
    words = ["smollm2" if word == "./my-model" else word for word in words]
    if command != "extract" or {"--select", "--method"} & set(words):  # else there is nothing to be made small
        words += shlex.split(SMALL.get(command, ""))
    if command == "evaluate" and "--behaviour" in words:  # which has a judge of its own
        at = words.index("--judge")
        del words[at : at + 2]
    if command in ("extract", "observe", "evaluate", "ui") and "--model" not in words:
        words += ["--model", "smollm2"]
    if command == "observe" and "--behaviour" not in words:  # the page's is the demo model's own
        words += ["--behaviour", "refusal"]
    if command == "ui" and "--vector" not in words:  # the demo model finds its own
        words += ["--vector", "refusal.safetensors"]
    if "--method" in words and command == "extract":
        words += shlex.split(COMPARING)
    if command == "evaluate" and "--layer" in words:  # the page's vector is the demo model's, of another layer
        words[words.index("--layer") + 1] = LAYER
    return [command, *words]


def remedy(words: list[str], output: str) -> list[str] | None:
    """The words with --select as an error of the command says to put it, None where it says nothing of that."""
    said = re.search(r"--select (\w+)", output)
    if said is None or "--select" not in words:
        return None
    return [said[1] if before == "--select" else word for before, word in zip(["", *words], words, strict=False)]


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_run(page, folder, studied, monkeypatch):
    if page == "docs/report.md":  # it begins with the store of a sweep
        assert invoke(["sweep", "sweep.yaml", "--store", "sweep.db"])[0] == 0
    for line in commands(page):
        if "hub:" in line:  # tests/formats/test_hub.py has a hub
            continue
        words = small(line)
        if words[0] == "ui":
            assert "<html" in fetched_page(words, monkeypatch)
            continue
        words += ["--out", str(studied)] if words[0] == "observe" else []
        code, output = invoke(words)
        if code == 1 and (other := remedy(words, output)):
            code, output = invoke(other)
        # 3: done, and what had to be left out was said
        assert code in ((0, 3) if words[0] == "observe" else (0,)), (line, words, output)
        if "--select" in words:
            assert fs.SteeringVector.load(words[words.index("--out") + 1]).layers == (int(LAYER),)
    if page == "README.md":
        assert Path("report.html").stat().st_size > 10_000 and Path("my-model-folded", "config.json").is_file()


def fetched_page(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The playground's page, fetched from the command's server, which is stopped then."""
    from faststeer.ui import server as serving

    make, pages = serving.server, []

    def server(*arguments: Any, **options: Any) -> Any:
        real = make(*arguments, **options)

        def fetch(address: str) -> None:
            try:
                with urllib.request.urlopen(address, timeout=60) as answer:
                    pages.append(answer.read().decode())
            finally:
                real.should_exit = True

        def run(sockets: list[Any]) -> None:
            thread = threading.Thread(target=fetch, args=[serving.url(sockets[0])])
            thread.start()
            real.run(sockets=sockets)
            thread.join()

        return types.SimpleNamespace(run=run)

    with monkeypatch.context() as patched:
        patched.setattr(serving, "server", server)
        code, output = invoke([*words, "--port", "0"])
    assert code == 0 and pages, output
    return pages[0]
