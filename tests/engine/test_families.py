"""The Engine on models of every kind: it refuses what it has no cache for, in its own words, and else is right."""

from __future__ import annotations

import every_model
import models
import pytest
import torch
import transformers
from packaging.version import Version
from support import Tokenizer, generated, prompts, tokens

import faststeer as fs
from faststeer.hf import find_hook_points

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the families and caches are those of transformers 5.24"
)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "xlstm", "lfm2", "nemotron_h", "qwen3_next", "bert"])
def test_refused_in_words(family):
    with pytest.raises(ValueError, match=r"use model\.generate"):
        fs.Engine(every_model.build(family), Tokenizer(), max_batch=2, max_length=32)


@pytest.mark.parametrize("family", ["granite", "gemma3n_text", "gemma4_text"])
def test_layers_of_which_the_inside_is_not_seen(family):
    model, limit = every_model.build(family), 4
    points = find_hook_points(model)
    v = every_model._direction(points, 1)
    plan = fs.Plan([fs.Add(v, layers="all", positions="generated"), fs.Add(-v, layers=0, positions="last")])
    engine = fs.Engine(model, Tokenizer(), max_batch=2, max_length=32)
    given, plans = prompts((6, 3, 5)), [plan, None, plan]
    expected = [generated(model, prompt, own, limit) for prompt, own in zip(given, plans, strict=True)]
    assert tokens(engine.generate(given, plans, max_new_tokens=limit)) == expected


def test_the_default_device_is_of_no_matter():
    model, given = models.build("llama"), prompts((6, 3))
    plans = [fs.Plan([fs.Add(models.direction(), layers=1, positions="generated")]), None]
    expected = [generated(model, prompt, plan, 4) for prompt, plan in zip(given, plans, strict=True)]
    with torch.device("meta"):
        engine = fs.Engine(model, Tokenizer(), max_batch=2, max_length=32)
        assert tokens(engine.generate(given, plans, max_new_tokens=4)) == expected
