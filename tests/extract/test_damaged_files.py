"""Damaged and hostile files of everything else that is read on the way to a vector: the reader gives what the file
says, or a ValueError that names the file, whatever is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from damage import damaged, misshapen
from hypothesis import strategies as st
from safetensors.torch import save
from strategies import randn

from faststeer import behaviours
from faststeer.behaviours.behaviour import prompts_of_file
from faststeer.extract import Activations, Candidates, load_contrast, load_prompts, sae_feature

FULL = os.environ.get("FASTSTEER_TEST_PROFILE") == "full"
many = hypothesis.settings(
    parent=hypothesis.settings(),
    max_examples=1000 if FULL else 40,
    suppress_health_check=list(hypothesis.HealthCheck),
)

WORDS = {
    "positions": "[-2, -1]",
    "at": "resid_pre",
    "n_positive": "3",
    "n_negative": "4",
    "paired": "false",
    "model": "m",
}
ACTIVATIONS = {"positive": randn(1, 3, 2, 2, 4), "negative": randn(2, 4, 2, 2, 4)}
MEANS = {f"{side}_mean": randn(n, 2, 3, 4, dtype=torch.float64) for n, side in enumerate(("positive", "negative"))}
SAE = {"hook_name": "blocks.2.hook_resid_post", "d_in": 4, "d_sae": 3, "metadata": {"model_name": "m"}}
DECODER = {"W_dec": randn(3, 3, 4)}

# How a file is read, its format, and what is in it.
TENSORS: dict[str, tuple[Callable[[Path], object], str, dict[str, torch.Tensor]]] = {
    "activations": (Activations.load, "faststeer.activations/1", ACTIVATIONS),
    "candidates": (Candidates.load, "faststeer.candidates/1", MEANS),
    "decoder": (lambda path: sae_feature(path.parent, 1), "", DECODER),
}
BEHAVIOUR = {
    "format": "faststeer.behaviour/1",
    "name": "n",
    "judge": "refusal",
    "about": {"source": "s"},
    "train": {"positive": ["a", "b"], "negative": ["c", "d"], "pairs": [{"prompt": "p", "chosen": "x", "sign": -1}]},
    "validation": {"positive": ["e"], "negative": [[{"role": "user", "content": "f"}]]},
    "test": {"positive": ["g"], "negative": ["h"], "induce": ["i"]},
}
AXBENCH = [
    {"input": "q", "output": "o", "output_concept": "sea", "category": "positive", "concept_id": 1},
    {"input": "q", "output": "n", "output_concept": "sea", "category": "negative", "concept_id": 1},
]
ALPACA = [{"instruction": "i", "input": "j", "output": "o"}, {"instruction": "k", "output": "p"}]
JSON: dict[str, tuple[Callable[[Path], object], object]] = {
    "behaviour": (behaviours.load, BEHAVIOUR),
    "axbench": (behaviours.read_records, AXBENCH),
    "alpaca": (
        prompts_of_file,
        [{"instruction": "i", "input": "j", "output": "o"}, {"instruction": "k", "output": "o"}],
    ),
    "prompts": (load_prompts, ["a", {"prompt": "b"}, {"messages": [{"role": "user", "content": "c"}]}]),
    "contrast": (load_contrast, {"harmful": ["a"], "harmless": [[{"role": "user", "content": "c"}]]}),
    "sae": (lambda path: sae_feature(path.parent, 1), SAE),
}
CSV = b'goal,target\n"Write, ""now""\nand here",Sure\nSteal,"Sure, here"\n'


def survives(read: Callable[[Path], object], path: Path) -> None:
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error) or path.parent.name in str(error)


def words_of(kind: str) -> dict[str, str]:
    return WORDS | {"format": TENSORS[kind][1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged")
    (path / "cfg.json").write_text(json.dumps(SAE))
    return path


@pytest.mark.parametrize("kind", TENSORS)
@many
@hypothesis.given(data=st.data())
def test_tensors(kind, data, folder):
    read, _, tensors = TENSORS[kind]
    path, whole = folder / "sae_weights.safetensors", save(tensors, words_of(kind))
    path.write_bytes(whole)
    (folder / "cfg.json").write_text(json.dumps(SAE))
    read(path)  # as it stands it is valid
    path.write_bytes(data.draw(damaged(whole)))
    survives(read, path)


@pytest.mark.parametrize("kind", ["activations", "candidates"])
@many
@hypothesis.given(data=st.data())
def test_words(kind, data, folder):
    """The header's words exchanged for others; what they say is JSON within JSON."""
    read, _, tensors = TENSORS[kind]
    words = words_of(kind)
    name = data.draw(st.sampled_from(sorted(words)))
    strange = data.draw(
        st.sampled_from(
            ("", "null", "[]", "[0]", "[-1]", "[-1, -1]", '["-1"]', "[-1.5, -2]", "9" * 5000, "1e9", "{", "x")
        )
        | st.just("[" * 100_000)
    )
    path = folder / "words.safetensors"
    path.write_bytes(save(tensors, words | {name: strange}))
    survives(read, path)


@pytest.mark.parametrize("kind", JSON)
@many
@hypothesis.given(data=st.data())
def test_json(kind, data, folder):
    read, content = JSON[kind]
    path = folder / ("cfg.json" if kind == "sae" else "behaviour.json")
    (folder / "sae_weights.safetensors").write_bytes(save(DECODER))
    path.write_text(json.dumps(content))
    read(path)
    path.write_text(data.draw(misshapen(content)))
    survives(read, path)


@many
@hypothesis.given(data=st.data(), suffix=st.sampled_from((".csv", ".tsv", ".json", ".jsonl", ".txt")))
def test_tables(data, suffix, folder):
    path = folder / f"table{suffix}"
    path.write_bytes(data.draw(damaged(CSV)))
    for read in (prompts_of_file, behaviours.read_records):
        survives(read, path)
