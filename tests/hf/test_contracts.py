"""The contracts of docs/design.md on every architecture, by hooks and in fused layers, as far as test_architectures.py
leaves them open; and what a mixed batch gives in another thread and under a LoRA adapter."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_architectures import ALL, PROMPT, close, direction, far, generate, hand_hook, logits, rich_plan
from test_hook_points import hooks_of
from test_streams import in_thread
from torch import Tensor, nn

import faststeer as fs
from faststeer.hf import read

HERE: dict[str, Any] = {"layers": 0, "at": "resid_post"}
# Of a dot product of rows that were rounded once: n u |x| |y| of the sum, and of the row's own rounding and q's length.
BOUND = (models.HIDDEN + 4) * torch.finfo(torch.float32).eps


def mixed(name: str) -> list[fs.Plan | None]:
    return [rich_plan(name, 0), None, rich_plan(name, 1)]


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@ALL
def test_what_steering_leaves_of_a_row(name):
    """4: nothing along an ablated direction, the same twice, nothing of what was projected and ablated, and a rotated
    row's length."""
    model, ids, v, w = models.model(name), models.tokens(1, PROMPT), direction(0), direction(1)

    def after(*plan: fs.Intervention) -> Tensor:
        with torch.no_grad(), fs.steer(model, fs.Plan(plan)), read(model, at="resid_post", layers=[0]) as taken:
            model(ids)
        return taken[0].reshape(PROMPT, -1)

    plain, once = after(), after(fs.Ablate(v, **HERE))
    size = plain.norm(dim=-1)
    assert bool(((plain @ v).abs() / v.norm() > 100 * BOUND * size).all()), "there was something to take away"
    assert bool(((once @ v).abs() / v.norm() <= BOUND * size).all())
    twice = after(fs.Ablate(v, **HERE), fs.Ablate(v, **HERE))
    assert bool(((twice - once).norm(dim=-1) <= BOUND * size).all())
    assert bool((after(fs.Project(v, **HERE), fs.Ablate(v, **HERE)).norm(dim=-1) <= BOUND * size).all())
    turned = after(fs.Rotate(v, w, 60.0, relative=True, **HERE))
    assert bool(((turned.norm(dim=-1) - size).abs() <= BOUND * size).all()) and far(turned, plain)


@ALL
def test_an_exception_leaves_every_bit_as_it_was(name):
    """5: raised in the middle of a pass, in a layer whose neighbours are steered."""
    model, ids = models.build(name), models.tokens(2, PROMPT)
    before, plain = hooks_of(model), logits(model, ids)
    block = model.get_submodule(models.MODULES[name].layers)[1]
    failing = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fs.steer(model, rich_plan(name)):
        logits(model, ids)
    failing.remove()
    assert hooks_of(model) == before and torch.equal(logits(model, ids), plain)
    assert not any("forward" in vars(module) or "generate" in vars(module) for module in model.modules())


@ALL
def test_plans_change_in_place(name):
    """6: other plans take effect at the same addresses, and the first ones again when they come back."""
    model, ids, plans, others = models.model(name), models.tokens(2, PROMPT), mixed(name)[1:], mixed(name)[:2]
    with fs.steer(model, others):
        expected = generate(model, ids)
    with fs.steer(model, plans) as steering:
        addresses, first = [table.data_ptr() for table in steering.tables], generate(model, ids)
        steering.assign(others)
        assert same(generate(model, ids), expected) and not same(first, expected)
        steering.assign(plans)
        assert same(generate(model, ids), first)
        assert [table.data_ptr() for table in steering.tables] == addresses


@ALL
def test_gradients_are_those_of_a_hook_written_by_hand(name):
    """7: of a vector, a coefficient and the hidden states."""
    model, ids = models.model(name), models.tokens(1, PROMPT)
    embedded = model.get_input_embeddings()(ids).detach()

    def gradients(steered: Any) -> list[Tensor]:
        v, c, x = direction(0).requires_grad_(), torch.tensor(0.7, requires_grad=True), embedded.clone()
        with steered(v, c):
            model(inputs_embeds=x.requires_grad_()).logits.pow(2).mean().backward()
        return [v.grad, c.grad, x.grad]

    ours = gradients(lambda v, c: fs.steer(model, fs.Add(v, c, **HERE)))
    by_hand = gradients(lambda v, c: hand_hook(model, name, "resid_post", 0, lambda x: x + c * v))
    for own, other in zip(ours, by_hand, strict=True):
        close(own, other)
        assert other.abs().max() > 0


@ALL
def test_what_is_refused_changes_nothing(name):
    """8: before the model is touched, and while it is steered."""
    model, ids, plan = models.model(name), models.tokens(1, PROMPT), rich_plan(name)
    bad = {
        r"layer 2 is out of range: the model has layers 0\.\.1": fs.Add(direction(0), layers=2),
        "hidden size 5, the model has 32": fs.Add(torch.ones(5), layers=0),
        "expected a Plan": 3,
    }
    if "resid_mid" not in models.points(name):
        bad["which that layer of .* does not have"] = fs.Add(direction(0), layers=0, at="resid_mid")
    before, plain = hooks_of(model), logits(model, ids)
    with fs.steer(model, plan) as steering:
        steered = logits(model, ids)
        for message, plans in bad.items():
            with pytest.raises((TypeError, ValueError), match=message):
                steering.assign(plans)
        assert torch.equal(logits(model, ids), steered)
    for message, plans in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fs.steer(model, plans)
    assert hooks_of(model) == before and torch.equal(logits(model, ids), plain)


@ALL
def test_in_threads(name):
    """1, 2, 5: entered here and run in a thread that was started inside, and entered and left in a thread."""
    model, ids, plans = models.build(name), models.tokens(3, PROMPT), mixed(name)
    before, plain = hooks_of(model), generate(model, ids)
    with fs.steer(model, plans):
        here = generate(model, ids)
        inside = in_thread(lambda: generate(model, ids))

    def steered() -> tuple[Tensor, Tensor]:
        with fs.steer(model, plans):
            return generate(model, ids)

    assert same(inside, here) and same(in_thread(steered), here) and far(here[1], plain[1])
    with fs.steer(model, [None] * 3):
        assert same(in_thread(lambda: generate(model, ids)), plain)
    assert hooks_of(model) == before and same(generate(model, ids), plain)


@ALL
def test_under_a_lora(name):
    """1, 2, 5: the adapter's model and the one inside it, as hooks written by hand."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    inner: nn.Module = models.build(name)
    adapted, ids, v = get_peft_model(inner, lora).eval(), models.tokens(3, PROMPT), direction(0)
    before, plain = hooks_of(inner), generate(adapted, ids)
    assert far(plain[1], generate(models.model(name), ids)[1]), "the adapter changes something"
    with hand_hook(inner, name, "resid_post", 0, lambda x: x + 2 * v):
        expected = generate(adapted, ids)
    for target in (adapted, inner):
        with fs.steer(target, fs.Add(v, 2.0, **HERE)):
            close(generate(adapted, ids), expected)
        with fs.steer(target, [None] * 3):
            assert same(generate(adapted, ids), plain)
    plans = mixed(name)
    with fs.steer(adapted, plans):
        together = generate(adapted, ids)
    for row in range(3):
        with fs.steer(adapted, plans[row] or fs.Plan()):
            alone = generate(adapted, ids[row : row + 1])
        close((together[0][row], together[1][row]), (alone[0][0], alone[1][0]))
    assert hooks_of(inner) == before and same(generate(adapted, ids), plain)
