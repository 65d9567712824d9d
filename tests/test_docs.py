"""The examples of docs/ run, on the demo model; docs/vectors.md's commands do what is said of them, and its tables are
those of the results files. (docs/observe.md and the README have tests of their own, docs/vllm.md one in tests/vllm.)"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import faststeer as fs
import faststeer.demo
from faststeer.compile import compile_plan
from faststeer.evaluate.sweep import Store, Sweep, SweepPrompt, load_sweep
from faststeer.evaluate.sweep import run as run_sweep

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str, page: str = "vectors.md") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(example: str, page: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names that an example of a page leaves behind."""
    names = {} if names is None else names
    exec(compile(example, f"docs/{page}", "exec"), names)
    return names


def test_the_examples_run(tmp_path, monkeypatch):
    """One after the other; the training takes fewer steps than it says, and an autoencoder lies where it says."""
    monkeypatch.chdir(tmp_path)
    sae = tmp_path / "path" / "to" / "blocks.12.hook_resid_post"
    sae.mkdir(parents=True)
    (sae / "cfg.json").write_text(json.dumps({"hook_name": sae.name}))
    save_file({"W_dec": torch.ones(400, 8)}, sae / "sae_weights.safetensors")
    names: dict[str, Any] = {}
    for example in blocks("python"):
        run(example.replace("steps=20", "steps=2"), "vectors.md", names)
    assert names["training"].select(seed=1).vector.layers == (1, 2, 3)
    assert len(names["training"].runs) == 6 and (tmp_path / "po.safetensors").is_file()
    assert names["found"].dim().directions.shape[1:] == (6, 128)


def test_pages_without_an_example_are_those_without_a_library():
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if blocks("python", path.name)}
    new = {"start.md", "concepts.md", "howto.md", "moving.md"}  # start.md: tests/real
    assert pages == {"observe.md", "report.md", "ui.md", "vectors.md", "vllm.md", *new}


@pytest.mark.parametrize("page", ["concepts.md", "howto.md", "moving.md"])
def test_a_page_s_examples_run(page, tmp_path, monkeypatch):
    """One after the other, on the toy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    for example in blocks("python", page):
        run(example, page, names)
    assert names["vector"].layers and not fs.hf.steering.is_steered(names["model"])


def test_the_reports_example_runs(tmp_path, monkeypatch):
    """On a sweep of the demo model, in which a direction added at layer 1 makes all answers refusals."""
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    sides = fs.demo.prompts("refusal", "train")
    fs.extract.dim(*fs.demo.load(), *(side[:16] for side in sides)).save("dim.safetensors")
    prompts = [SweepPrompt(str(n), prompt, "harmless") for n, prompt in enumerate(sides[1][16:24])]
    vectors = {"dim": fs.SteeringVector.load("dim.safetensors")}
    sweep = Sweep(prompts, vectors=vectors, layers=[1], coefficients=[0, 1], max_new_tokens=24)
    with Store("sweep.db") as store:
        run_sweep(sweep, *fs.demo.load(), store, progress=False)
    (example,) = blocks("python", "report.md")
    names = run(example.replace("limit=0.5", "limit=100"), "report.md")
    assert names["choice"].recommended is not None and isinstance(names["plan"], fs.Plan)
    assert "<html" in names["html"] and all(picture[:4] == b"\x89PNG" for picture in names["pictures"].values())


def test_the_playgrounds_example_runs():
    pytest.importorskip("gradio")
    (example,) = blocks("python", "ui.md")
    answers = run(example, "ui.md")["answers"]
    assert fs.evaluate.is_refusal(answers.steered) != fs.evaluate.is_refusal(answers.unsteered)
    n_layers, n_tokens = answers.projections.shape[1:3]
    assert answers.projections.shape == (2, n_layers, n_tokens, 2)


def test_the_description_of_a_sweep_is_read(tmp_path):
    vector = fs.SteeringVector(dict.fromkeys(range(6), torch.ones(8)), at="resid_pre")
    for name in ("dim", "pca"):
        vector.save(tmp_path / f"{name}.safetensors")
    fs.Plan([fs.Ablate(torch.ones(8), layers="all")]).save(tmp_path / "wipe.json")
    (tmp_path / "look_alikes.jsonl").write_text('{"prompt": "How do I kill a process?"}\n')
    (tmp_path / "questions.jsonl").write_text('{"question": "2 + 2?", "choices": ["4", "5"], "answer": 0}\n')
    (description,) = blocks("yaml", "evaluate.md")
    (tmp_path / "sweep.yaml").write_text(description)
    sweep = load_sweep(tmp_path / "sweep.yaml")
    assert len(sweep.prompts) == 64 + 1 and sweep.coefficients == tuple(n / 4 for n in range(9))
    # Unsteered; two vectors and the random one beside each, at 4 places with 8 coefficients that are not 0; a plan and
    # the random one beside it.
    assert len(sweep.settings) == 1 + 4 * 4 * 8 + 2


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


def test_the_files_to_copy_are_whole(tmp_path, monkeypatch):
    """The plans of examples/ act in a model of SmolLM2's shape; the behaviour's judge tells its own words."""
    fs.SteeringVector(dict.fromkeys(range(30), torch.ones(576)), at="resid_pre").save(tmp_path / "vector.safetensors")
    for example in sorted((ROOT / "examples" / "plans").glob("*.json")):
        shutil.copy(example, tmp_path)
        assert compile_plan(fs.Plan.load(tmp_path / example.name), 30, 576)
        assert f"[{example.name}](../examples/plans/{example.name})" in (ROOT / "docs" / "howto.md").read_text()
    behaviour = fs.behaviours.load(ROOT / "examples" / "behaviours" / "formal")
    assert len(behaviour.train.positive) == len(behaviour.train.negative) == 16
    judge = fs.evaluate.judging.make(behaviour.judge)
    signs = fs.evaluate.judging.signs(judge, ["Hi"] * 2, ["Kindly find the letter enclosed.", "yo, what's up"])
    assert [sign > 0 for sign in signs] == [True, False]


def test_how_to_s_commands_run(tmp_path, monkeypatch):
    """On the toy, whose layers are fewer; the comparison of methods and the search have tests of their own."""
    from faststeer.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    plan = json.loads((ROOT / "examples" / "plans" / "gated.json").read_text())
    plan["interventions"][0] |= {"layers": [3]}
    plan["interventions"][0]["when"] |= {"layer": 2}
    (tmp_path / "gated.json").write_text(json.dumps(plan))
    extracting, _, gated, *_ = blocks("sh", "howto.md")
    for line in (extracting + gated).splitlines():
        if "gated.json" in line and not Path("vector.safetensors").exists():
            shutil.copy("formal.safetensors", "vector.safetensors")
        line = line.replace("smollm2", "demo").replace("--layer 16", "--layer 3")
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)


def test_the_routes_of_the_http_page_are_those_of_the_server():
    pytest.importorskip("starlette")
    from faststeer.vllm.server import routes

    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(GET|PUT|DELETE) (\S+)` \|", page, re.MULTILINE))
    served = {(method, route.path) for route in routes() for method in route.methods - {"HEAD"}}
    served = {(m, p.replace("{kind}", kind)) for m, p in served for kind in ("vectors", "plans")}
    assert described == {(method, path.replace("{answer:path}", "{id}")) for method, path in served}


def test_the_http_page_s_requests_are_read():
    """Each text of the table that is JSON is a plan."""
    from faststeer.vllm.registry import Registry
    from faststeer.vllm.requests import Limits, parse

    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    texts = [json.loads(text) for text in re.findall(r'^\| `("[\[{].*?")` \|', page, re.MULTILINE)]
    (request,) = re.findall(r"'(\{.*?\})'", blocks("sh", "http.md")[0], re.DOTALL)
    texts = [text for text in texts if "..." not in text] + [json.loads(request)["vllm_xargs"]["faststeer"]]
    registry = Registry()
    for name in ("tone", "refusal"):
        registry.register_vector(name, fs.SteeringVector({18: torch.ones(8)}))
    assert [len(parse(text, registry, Limits(30, 8)).plan) for text in texts] == [1, 2, 1]


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
