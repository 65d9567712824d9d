"""Prompts that hold their chat template's markup already: `rendered=True` gives what the bare prompts give, at every
door."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_chat
import torch
from training import ntp
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app
from faststeer.evaluate import complete
from faststeer.evaluate.sweep import Sweep, SweepPrompt
from faststeer.extract import Pair
from faststeer.hf import Rendered, render
from faststeer.hf.batching import check_prompts, encode

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL = tiny_chat.llama(len(TOKENIZER))
A, B = tiny_chat.HARMFUL, tiny_chat.HARMLESS
PAIRS = [Pair(prompt, "(A) yes", "(B) no") for prompt in A]
VECTOR = fs.SteeringVector({1: torch.linspace(-4, 4, 32)}, at="resid_pre")


def judged(answer: str) -> int:
    return 1 if len(answer) % 2 else -1


def trained(pairs: Sequence[Pair], **how: Any) -> list[Any]:
    settings = dict(max_tokens=4, **how)
    return list(ntp(MODEL, TOKENIZER, pairs, layers=1, steps=2, settings=settings).vector[1].tolist())


def pairs_of(prompts: Sequence[str]) -> list[Pair]:
    return [dataclasses.replace(pair, prompt=prompt) for pair, prompt in zip(PAIRS, prompts, strict=True)]


def attributed(a: Sequence[str], b: Sequence[str], **how: Any) -> Any:
    metric, baseline = fs.extract.logit_difference([5], [6]), fs.extract.candidates(MODEL, TOKENIZER, A, B)
    return fs.extract.attribution(MODEL, TOKENIZER, a, metric, baseline, layers=[1], steps=2, **how).contributions


def on_found(method: Callable[..., Any], *more: Any, **settings: Any) -> Callable[..., Any]:
    found = fs.extract.candidates(MODEL, TOKENIZER, A, B, positions=[-1])
    return lambda a, b, **how: method(MODEL, TOKENIZER, found, *more, a, b, **settings, **how).to_dict()


def answers(engine: fs.Engine, prompts: Sequence[str], **how: Any) -> list[str]:
    return [c.text for c in engine.generate(prompts, max_new_tokens=4, progress=False, **how)]


DOORS: dict[str, Callable[..., Any]] = {
    "dim": lambda a, b, **how: fs.extract.dim(MODEL, TOKENIZER, a, b, **how)[1],
    "contrast": lambda a, b, **how: fs.extract.contrast(MODEL, TOKENIZER, a, b, **how).dim().directions,
    "caa": lambda a, b, **how: fs.extract.caa(MODEL, TOKENIZER, pairs_of(a), **how)[1],
    "attribution": attributed,
    "ntp": lambda a, b, **how: trained(pairs_of(a), **how),
    "check_refusal": lambda a, b, **how: fs.extract.check_refusal(MODEL, TOKENIZER, a, b, token_ids=[5, 9], **how),
    "select": on_found(fs.extract.select, token_ids=[5, 9]),
    "select_cosmic": on_found(fs.extract.select_cosmic),
    "select_by_judge": on_found(fs.extract.select_by_judge, judged, max_new_tokens=3),
    "steered_pairs": lambda a, b, **how: [
        (pair.positive, pair.negative)
        for pair in fs.extract.steered_pairs(
            MODEL, TOKENIZER, VECTOR, a, b, judge=judged, coherence=lambda _: True, max_new_tokens=3, **how
        )
    ],
    "complete": lambda a, b, **how: complete(MODEL, TOKENIZER, a, max_new_tokens=4, **how),
    "Engine": lambda a, b, **how: answers(fs.Engine(MODEL, TOKENIZER, max_batch=2, max_length=64), a, **how),
}


@pytest.mark.filterwarnings("ignore:the vector changes the verdict", "ignore:no candidate")
@pytest.mark.parametrize("door", DOORS)
def test_gives_what_the_bare_prompts_give(door):
    a, b = render(TOKENIZER, A), render(TOKENIZER, B)
    assert a[0] != A[0]
    bare, rendered = DOORS[door](A, B), DOORS[door](a, b, rendered=True)
    assert torch.equal(bare, rendered) if isinstance(bare, torch.Tensor) else bare == rendered
    with pytest.raises(ValueError, match=r"holds '<\|im_start\|>'.*rendered=True, or --rendered"):
        DOORS[door](a, b)


def test_prompts_of_both_kinds():
    mixed = [A[0], Rendered(render(TOKENIZER, [A[1]])[0]), A[2]]
    assert encode(TOKENIZER, mixed) == encode(TOKENIZER, A[:3])
    assert render(TOKENIZER, mixed) == render(TOKENIZER, A[:3])
    assert all(type(text) is str for text in render(TOKENIZER, A))
    with pytest.raises(ValueError, match="system= gives a system prompt"):
        encode(TOKENIZER, mixed, "Be kind")
    with pytest.raises(ValueError, match=r"positive\[1\] is a chat: rendered=True takes texts"):
        check_prompts([A[0], [{"role": "user", "content": A[1]}]], "positive", rendered=True)


def test_a_sweep_of_rendered_prompts_is_another_one():
    plans = {"nothing": fs.Plan()}
    texts = render(TOKENIZER, A)
    bare, rendered = (Sweep([SweepPrompt("0", kind(texts[0]))], plans=plans) for kind in (str, Rendered))
    assert bare.identity("m") != rendered.identity("m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and prompts of both sides, bare and rendered."""
    path = tmp_path_factory.mktemp("rendered")
    MODEL.save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    for name, prompts in (("a", A), ("b", B)):
        (path / f"{name}.json").write_text(json.dumps(prompts))
        (path / f"{name}-rendered.json").write_text(json.dumps(render(TOKENIZER, prompts)))
    VECTOR.save(path / "vector.safetensors")
    return path


@pytest.mark.parametrize("command", ["generate", "extract", "evaluate"])
def test_on_the_command_line(command, folder, tmp_path):
    def run(kind: str, *more: str) -> Any:
        a, b = (folder / f"{side}{kind}.json" for side in "ab")
        options = {
            "generate": ["--prompts", a, "--max-new-tokens", 4],
            "extract": ["--positive", a, "--negative", b, "--out", tmp_path / f"{kind}.safetensors"],
            "evaluate": ["--prompts", a, "--vector", folder / "vector.safetensors", "--judge", "length",
                         "--max-new-tokens", 4],
        }[command]  # fmt: skip
        arguments = [command, "--model", folder / "model", *options, *more, "--json"]
        return CliRunner().invoke(app, [str(a) for a in arguments])

    bare, rendered = run(""), run("-rendered", "--rendered")
    assert bare.exit_code == rendered.exit_code == 0, rendered.output
    one, other = json.loads(bare.stdout), json.loads(rendered.stdout)
    if command == "generate":
        assert [c["completion"] for c in one["completions"]] == [c["completion"] for c in other["completions"]]
    elif command == "extract":
        assert one["norms"] == other["norms"]
    else:
        assert one == other
    refused = run("-rendered")
    assert refused.exit_code == 1 and "--rendered" in refused.output
