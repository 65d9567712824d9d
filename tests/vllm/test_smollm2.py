"""SmolLM2 inside vLLM: 24 requests under 12 plans, and none, against Hugging Face's model with the same plans."""

from __future__ import annotations

from typing import Any

import pytest
from requests_mixed import SPECIAL, by_engine, by_hugging_face, tokens

import faststeer as fs
from faststeer.hf.batching import encode

pytestmark = pytest.mark.real
TOPICS = ["the weather", "bread", "a train station", "Köln 🗼", "2 + 2", "an old house"]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return fs.load("smollm2")


@pytest.fixture(scope="module")
def requests(smollm2: tuple[Any, Any]) -> list[tuple[list[int], fs.Plan | None]]:
    model, tokenizer = smollm2
    split = fs.behaviours.load("tone").train
    tone = fs.extract.dim(model, tokenizer, split.positive[:8], split.negative[:8])
    other = fs.extract.random_like(tone, 1)
    plans: list[fs.Plan | None] = [
        fs.Plan([fs.Add(tone, 1.0, layers=15)]),
        fs.Plan([fs.Add(tone, -1.0, layers=18)]),
        fs.Plan([fs.Add(other, 1.0, layers=15)]),
        fs.Plan([fs.Add(tone, 0.5, layers=[12, 16, 20])]),
        fs.Plan([fs.Ablate(tone[20], layers="all")]),
        fs.Plan([fs.Ablate(tone[20], layers="all", at=("resid_pre", "attn_out", "mlp_out"))]),
        fs.Plan([fs.Clamp(tone[22], low=-1.0, high=1.0, layers=22)]),
        fs.Plan([fs.Add(tone, 1.0, layers=14, positions="prompt")]),
        fs.Plan([fs.Add(tone, 1.0, layers=14, positions="generated")]),
        fs.Plan([fs.Add(tone, -1.5, layers=10, positions="last")]),
        fs.Plan([fs.Rotate(tone[18], other[18], degrees=40.0, layers=18)]),
        fs.Plan([fs.Add(tone, 1.0, layers=16), fs.Ablate(other[20], layers=20)]),
    ]
    assert len({plan.to_json(inline=True) for plan in plans if plan is not None}) == 12
    prompts = encode(tokenizer, [f"{ask} {topic}." for ask in ("Tell me about", "Describe") for topic in TOPICS])
    return [*zip(prompts, plans, strict=True), *((prompt, None) for prompt in prompts)]


def test_12_plans_and_none_give_what_hugging_face_gives(
    smollm2: tuple[Any, Any], requests: list[Any], start: Any
) -> None:
    wanted = by_hugging_face(smollm2[0], requests)
    engine = start(SPECIAL, model=smollm2[0].config._name_or_path)
    answers = tokens(by_engine(engine, requests))
    assert answers == wanted
    assert answers[:12] != answers[12:]
