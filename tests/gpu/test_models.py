"""Fused layers and the Engine on the GPU, on tiny models of several architectures: contracts 1, 2, 5 and 6, and greedy
output that is that of `generate` steered by hooks through the reference. The tests of tests/engine and tests/hf say the
same, of more, on the CPU; here are CUDA graphs, the kernels, and the step launched ahead."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from device import CUDA, DEVICE, MARKS, needs_device, no_synchronisation
from support import LIMITS, Tokenizer, mixed, plan, prompts, tokens
from torch import Tensor, nn

import faststeer as fs
from faststeer.compile import orthonormal
from faststeer.engine import Engine
from faststeer.engine.sampling import Mode
from faststeer.hf import read

pytestmark = MARKS

NAMES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "gpt2") if CUDA else ("llama",)
FUSED = NAMES[:-1] if CUDA else NAMES
ALL = pytest.mark.parametrize("name", NAMES)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.build(name).to(DEVICE, dtype)


def engine(model: nn.Module, **more: Any) -> Engine:
    return Engine(model, Tokenizer(), **({"max_batch": 3, "max_length": 32} | more))


def generated(model: nn.Module, prompt: list[int], steered: fs.Plan | None, new: int) -> list[int]:
    """What `generate` gives for a prompt alone, steered by hooks through the reference."""
    ids = torch.tensor([prompt], device=DEVICE)
    with fs.backend("reference"), fs.steer(model, steered or fs.Plan(), path="hooks"):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# Engine ---------------------------------------------------------------------------------------------------------------


@ALL
def test_greedy_is_generate_steered_by_hooks(name):
    """Eight requests through three rows: graphs of several sizes, rows refilled and moved, a plan per row."""
    model, plans = build(name), mixed(name)
    found = tokens(engine(model).generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    expected = [generated(model, *each) for each in zip(prompts(), plans, LIMITS, strict=True)]
    assert found == expected
    assert found != tokens(engine(model).generate(prompts(), max_new_tokens=LIMITS))


@ALL
def test_bfloat16(name):
    """Each token is the likeliest, up to rounding, by a forward pass over the whole sequence."""
    model, plans = build(name, torch.bfloat16), mixed(name)
    found = tokens(engine(model).generate(prompts(), plans=plans, max_new_tokens=LIMITS))
    for prompt, steered, new in zip(prompts(), plans, found, strict=True):
        with fs.steer(model, steered or fs.Plan()) as steering:
            steering.set_prompt(len(prompt))
            scores = logits(model, torch.tensor([prompt + new], device=DEVICE))[0, len(prompt) - 1 : -1].float()
        chosen = scores.gather(1, torch.tensor(new, device=DEVICE).unsqueeze(1)).squeeze(1)
        assert (scores.amax(1) - chosen).max() <= 0.1 * scores.abs().max()


def test_plans_change_between_replays():
    """Other plans at the same sites: no graph is captured anew, and what is replayed is the new plans."""
    model = build("llama")
    made = engine(model)
    others = [None, plan("llama", 7), None, plan("llama", 8), *[plan("llama", 9)] * 4]
    list(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=5))
    before = dict(made._decode.__self__._graphs) if CUDA else {}
    found = tokens(made.generate(prompts(), plans=others, max_new_tokens=5))
    assert found == [generated(model, p, q, 5) for p, q in zip(prompts(), others, strict=True)]
    if CUDA:
        assert before and made._decode.__self__._graphs == before


@needs_device
def test_a_step_never_waits():
    made = engine(build("llama"))
    list(made.generate(prompts(), plans=mixed("llama"), max_new_tokens=5))
    made._decode(2, 8, Mode.GREEDY)
    with no_synchronisation():
        made._decode(2, 8, Mode.GREEDY)


def test_samples_are_those_of_the_seed():
    made = engine(build("llama"), max_batch=8)
    settings = {"temperature": [1.0, 0.7] * 4, "top_k": [0, 20] * 4, "top_p": [1.0, 1.0, 0.9, 0.8] * 2}
    first, same, other = (
        tokens(made.generate(prompts(), mixed("llama"), seed=seed, max_new_tokens=6, **settings)) for seed in (5, 5, 6)
    )
    assert first == same and first != other


@pytest.mark.parametrize("name", NAMES[:1])
def test_projections_are_what_a_reader_sees(name):
    model, plans, d = build(name), mixed(name), models.direction(50)
    found = list(engine(model).generate(prompts(), plans=plans, max_new_tokens=LIMITS, probe=d))
    for completion, steered in zip(found, plans, strict=True):
        fed = torch.tensor([completion.prompt_ids + completion.token_ids[:-1]], device=DEVICE)
        with fs.steer(model, steered or fs.Plan()) as steering:
            steering.set_prompt(len(completion.prompt_ids))
            with read(model, "resid_pre") as taken:
                logits(model, fed)
        expected = torch.stack([taken[i][0].cpu() for i in range(models.N_LAYERS)]) @ orthonormal(d, "").T
        torch.testing.assert_close(
            completion.projections[:-1], expected.squeeze(-1), rtol=0, atol=1e-3 * float(expected.abs().max())
        )


@ALL
def test_engine_leaves_the_model_as_it_was(name):
    model, ids = build(name), models.tokens(2, 7).to(DEVICE)
    before = logits(model, ids)
    made = engine(model)
    running = made.generate(prompts(), plans=mixed(name), max_new_tokens=LIMITS)
    next(running)
    running.close()
    assert torch.equal(logits(model, ids), before)


# Fused layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers(name, dtype):
    """A row without a plan has the bits of the fused model without plans, whatever the other rows do; steered rows are
    those of the hooks; leaving restores every bit."""
    model, ids = build(name, dtype), models.tokens(3, 7).to(DEVICE)
    before = logits(model, ids)
    plans = [plan(name), None, plan(name, 1)]
    with fs.steer(model, [None] * 3, path="fused") as steering:
        plain = logits(model, ids)
        steering.assign(plans)
        steered = logits(model, ids)
    assert torch.equal(steered[1], plain[1]) and not torch.equal(steered[0], plain[0])
    assert torch.equal(logits(model, ids), before)
    with fs.backend("reference"), fs.steer(model, plans, path="hooks"):
        hooked = logits(model, ids).float()
    bound = 1e-3 if dtype == torch.float32 else 0.1
    assert (steered.float() - hooked).norm() <= bound * hooked.norm()
    assert (plain.float() - before.float()).norm() <= bound * before.float().norm()


@pytest.mark.parametrize("name", FUSED[:1])
def test_left_padding_changes_nothing(name):
    model, steered = build(name), plan(name)
    short, long = models.tokens(1, 4, seed=1)[0].tolist(), models.tokens(1, 9, seed=2)[0].tolist()
    ids = torch.tensor([[0] * 5 + short, long], device=DEVICE)
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9], device=DEVICE)
    with fs.steer(model, steered, path="fused"):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, prompt in zip(out, (short, long), strict=True):
        assert row[9:].tolist() == generated(model, prompt, steered, 6)
