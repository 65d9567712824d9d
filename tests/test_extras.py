"""What needs an extra says so, and nothing else needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys
for name in ("scipy", "matplotlib", "plotly", "gradio", "gguf", "accelerate", "peft", "vaderSentiment", "datasets"):
    sys.modules[name] = None  # importing it fails
"""
STEERED = """
import faststeer as fs
model, tokenizer = fs.demo.load()
refusal = fs.demo.behaviour("refusal").train
vector = fs.extract.dim(model, tokenizer, refusal.positive[:4], refusal.negative[:4])
batch = fs.hf.tokenize(tokenizer, refusal.negative[:2])
plan = fs.Plan([fs.Add(vector, 1.0, layers=2)])
with fs.steer(model, [plan, None]):
    model.generate(**batch, max_new_tokens=2)
list(fs.Engine(model, tokenizer, max_batch=2, max_length=64).generate(refusal.negative[:2], plan, max_new_tokens=2))
"""
NEEDING = {
    "evaluate": "from faststeer.evaluate import Rate; Rate(1, 2).low",
    "report": "import faststeer.report",
    "ui": "import faststeer.ui.page",
    "gguf": "import faststeer.formats.control_vectors as c; c._library()",
    "peft": "import faststeer.folding.adapter as a; a._library()",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=False)


def test_steering_needs_none():
    done = run(STEERED)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("extra", NEEDING)
def test_what_needs_one_names_it(extra):
    done = run(NEEDING[extra])
    assert done.returncode == 1 and f"pip install 'faststeer[{extra}]'" in done.stderr, done.stderr[-2000:]
