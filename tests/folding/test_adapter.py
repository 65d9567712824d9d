"""A plan as a peft adapter: the base model with it = the model steered, loaded by peft alone; without it, as before."""

from __future__ import annotations

import json

import models
import peft
import pytest
import torch

import faststeer as fs
from faststeer.folding import FoldError, fold_adapter

from test_folding import EVERYWHERE, PLANS, cases, d, exact, logits, v, widened  # isort: skip


# Weights' limits on biases do not hold here; nothing of the three is left out.
NORMAL = {
    ("llama", "ablate", True),
    ("llama", "both", False),
    ("qwen3", "add", False),
    ("qwen3", "both", True),
    ("gpt2", "ablate", False),
    ("gpt2", "add_first", True),
    ("gpt2", "clamp", False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "plan", "tied"), cases(("llama", "qwen3", "gpt2"), NORMAL))
def test_loaded_by_peft_it_is_the_steered_model(name, plan, tied, tmp_path):
    """Bound: the adapter is fp32 and so is what fp32 PyTorch makes of any logits; both are of that size."""
    model = models.build(name, tie_word_embeddings=tied)
    truth, plain = exact(model, name, plan), logits(model)
    adapter = fold_adapter(model, PLANS[plan][0])
    adapter.save(tmp_path / "adapter")
    assert torch.equal(logits(adapter.unload()), plain)
    loaded = peft.PeftModel.from_pretrained(models.build(name, tie_word_embeddings=tied), tmp_path / "adapter").eval()
    fp32 = (plain - logits(widened(models.build(name, tie_word_embeddings=tied)))).abs().max()
    assert (logits(loaded) - truth).abs().max() <= 4 * fp32
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)
    assert json.loads((tmp_path / "adapter" / "faststeer_fold.json").read_text())["check"]["equal"] == 64


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_adapter_is_as_small_as_what_it_removes(tmp_path):
    adapter = fold_adapter(models.build("llama"), PLANS["ablate"][0])
    assert {config.r for config in adapter.model.peft_config.values()} == {1}
    subspace = torch.stack([d, v, models.direction(3)])
    adapter.unload()
    plan = fs.Ablate(subspace, layers="all", at=EVERYWHERE)
    assert fold_adapter(models.build("llama"), plan).model.peft_config["default"].r == 3


@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_on_an_adapter_is_refused(inside):
    """Its names are those of the model with the first: saved, peft finds no such modules in the model without."""
    model = peft.get_peft_model(models.build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(FoldError, match=r"q_proj has an adapter.*merge it first, model = .*merge_and_unload\(\)"):
        fold_adapter(model.base_model.model if inside else model, PLANS["ablate"][0])
    assert fold_adapter(model.merge_and_unload(), PLANS["ablate"][0]).check.equal == 64


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("llama", fs.Project(torch.stack([d, v]), layers=0, at="mlp_out"), "no low rank"),
        ("mixtral", PLANS["ablate"][0], "mixture of experts"),
        ("gemma2", PLANS["ablate"][0], "Norm after its last projection"),
        ("llama", fs.Ablate(d, layers=1), "also changes what the embedding wrote"),
    ],
    ids=["project", "experts", "sandwich", "late"],
)
def test_refused_with_the_model_as_it_was(name, plan, message):
    model = models.build(name)
    before = list(model.state_dict())
    with pytest.raises(FoldError, match=message):
        fold_adapter(model, plan)
    assert list(model.state_dict()) == before
