"""What the commands share: options that need no model, errors about files and devices, progress without a terminal."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import faststeer as fs
from faststeer import progress
from faststeer.cli import app
from faststeer.cli.common import device_of, layer_numbers

runner = CliRunner()


def invoke(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


def test_the_version_and_the_module_are_commands_too():
    assert invoke("--version").stdout.strip() == f"faststeer {fs.__version__}"
    ran = subprocess.run([sys.executable, "-m", "faststeer", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"faststeer {fs.__version__}"


def test_completion_can_be_installed():
    assert "--install-completion" in invoke("--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--vector", "nowhere.safetensors", "--prompt", "x"),
        ("generate", "--prompts", "nowhere.txt"),
        ("extract", "--positive", "nowhere.txt", "--negative", "nowhere.txt", "--out", "v.safetensors"),
        ("evaluate", "--answers", "nowhere.jsonl"),
        ("fold", "--plan", "nowhere.json", "--out", "folded"),
        ("convert", "nowhere.gguf"),
        ("sweep", "nowhere.yaml"),
        ("observe", "--positive", "nowhere.txt", "--negative", "nowhere.txt"),
        ("plan", "nowhere.json"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_missing_file_is_reported_before_torch_is_imported(arguments, tmp_path):
    """Importing torch and transformers takes seconds."""
    code = (
        "import sys; from faststeer.cli import app\n"
        f"try: app({list(arguments)!r})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout.split() == ["1", "False"]
    assert "nowhere" in ran.stderr and "no such file" in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_cannot_be_used_is_refused_with_those_that_can(name):
    with pytest.raises(ValueError, match=rf"--device {name}.*expected auto"):
        device_of(name)
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_sentence():
    result = invoke("generate", "--prompt", "x", "--device", "cuda")
    assert result.exit_code == 1
    assert "--device cuda cannot be used here" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output and device_of("auto").type == "cpu"


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path):
    fs.Plan([fs.Add(torch.ones(128), layers=2)]).save(tmp_path / "plan.json")
    monkeypatch.setitem(sys.modules, "peft", None)
    result = invoke("fold", "--plan", tmp_path / "plan.json", "--out", tmp_path / "adapter", "--adapter")
    assert result.exit_code == 1
    assert "pip install 'faststeer[peft]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", None), ("12", [12]), ("3,7", [3, 7]), ("8-11", [8, 9, 10, 11]), (" 1-2, 2 ,5", [1, 2, 5])],
)
def test_layers_of_an_option(text, layers):
    assert layer_numbers(text) == layers


@pytest.mark.parametrize("text", ["", "-1", "a", "1-", "5-3", "1,,2", "1e3", "0-99999", "٣"])
def test_layers_that_are_none(text):
    with pytest.raises(typer.BadParameter, match="expected layers such as"):
        layer_numbers(text)


def test_a_vector_of_several_layers_asks_which_one_acts(tmp_path):
    vector = fs.SteeringVector({layer: torch.ones(128) for layer in range(1, 6)}, at="resid_pre")
    vector.save(tmp_path / "v.safetensors")
    asked = ("--vector", tmp_path / "v.safetensors", "--prompt", "Hello", "--max-new-tokens", 2)
    refused = invoke("generate", *asked)
    assert refused.exit_code == 1
    text = " ".join(refused.stderr.split())
    assert "a direction for each of 5 layers (1 to 5)" in text and "--layer 3" in text and "--layer all" in text
    for layer in ("3", "all"):  # the remedies work
        assert invoke("generate", *asked, "--layer", layer).exit_code == 0


def test_progress_without_a_terminal_is_lines_with_the_time_left(monkeypatch):
    stream, now = io.StringIO(), iter(range(0, 1000, 6))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, width=100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.progress_bar("Scoring", 8, True) as advance:
        for _ in range(8):
            advance()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "Scoring: 2 of 8, about 36 s left",
        "Scoring: 4 of 8, about 24 s left",
        "Scoring: 6 of 8, about 12 s left",
    ]


def test_the_time_left_waits_for_steps_and_weighs_them(monkeypatch):
    """A hundred steps, of which the first ten are nine tenths of the work: nothing is said before the fifth."""
    stream, now = io.StringIO(), iter(range(0, 10000, 11))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, width=100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.progress_bar("Scoring", 100, True, weights=[81.0] * 10 + [1.0] * 90) as advance:
        for _ in range(12):
            advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Scoring: 5 of 100, about 67 s left"  # 55 s for 405 of 900
    assert lines[5] == "Scoring: 10 of 100, about 12 s left" and len(lines) == 8


def test_the_bar_of_a_terminal_waits_for_steps(monkeypatch):
    bars, now = [], iter(range(0, 1000, 70))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(progress, "Progress", lambda *a, **k: bars.append(Progress(*a, **k)) or bars[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown = []
    with progress.progress_bar("Scoring", 4, True, weights=[5.0, 1.0, 1.0, 1.0], least=3) as advance:
        for _ in range(4):
            advance()
            shown.append(bars[0].tasks[0].fields["left"])
    assert shown == ["", "", "about 30 s left", ""]  # 210 s for 7 of 8


def test_steps_finished_before_the_work_began_took_no_time(monkeypatch):
    stream, now = io.StringIO(), iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, width=100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.progress_bar("Answering", 100, True, least=2) as advance:
        for finished in (90, 91, 92):
            advance("x", finished)
    assert stream.getvalue().splitlines() == ["x: 92 of 100, about 4 min left"]  # 60 s for 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (99.4, "99 s"), (100, "2 min"), (3570, "1 h 0 min"), (7800, "2 h 10 min")]
)
def test_durations_are_read_by_people(seconds, text):
    assert progress.duration(seconds) == text
