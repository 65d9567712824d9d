"""A copy of a steered model is steered by nobody; a model that has changed is seen to have changed."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_architectures import close
from torch import Tensor, nn

import faststeer as fs
from faststeer.hf import read
from faststeer.observe import freeze

IDS = models.tokens(2, 5)
PLAN = fs.Plan([fs.Add(models.direction(), 3.0, layers="all", at=("resid_post", "mlp_out"))])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CONTEXTS = {
    "hooks": lambda model: fs.steer(model, PLAN, path="hooks"),
    "fused": lambda model: fs.steer(model, PLAN),
    "rows": lambda model: fs.steer(model, [PLAN, None]),
    "freeze": lambda model: freeze(model, PLAN, "qk"),
    "read": read,
}


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_copy_made_inside(name, context, how):
    model = models.build(name)
    model.register_forward_hook(_theirs)  # a user's hook is copied as ever
    plain = logits(model)
    with (
        CONTEXTS[context](model),
        fs.steer(model, fs.Add(models.direction(1), layers=0)) if context == "rows" else read(model),
    ):
        inside = logits(model)
        twin = how(model)
        assert torch.equal(logits(twin), plain)
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(twin), plain) and torch.equal(logits(model), plain)
    assert len(twin._forward_hooks) == 1
    for module in twin.modules():
        assert not {"generate", "forward", "__getstate__"} & set(vars(module))
    with torch.no_grad():
        twin.lm_head.weight.zero_()  # its own weights run
    assert not torch.equal(logits(twin), plain) and torch.equal(logits(model), plain)
    path = {"hooks": "hooks"}.get(context, "auto")
    with fs.steer(twin, PLAN, path=path) as steering:
        assert steering.path == ("hooks" if name == "gpt2" or path == "hooks" else "fused")
    ours = twin.generate(IDS, max_new_tokens=3, do_sample=False)
    assert ours.shape == (2, 8)


def _theirs(module: nn.Module, args: Any, output: Any) -> None: ...


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, pickle.dumps])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_copy_of_the_context_is_refused(context, how):
    entry = CONTEXTS[context](models.build("llama"))
    for _ in range(2):
        with pytest.raises(TypeError, match="cannot be copied or pickled: copy the model, and make another"):
            how(entry)
        with entry:
            pass


# A model that has changed ---------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """A layer that somebody has wrapped."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(hidden_states, *args, **kwargs)


def by_hand(model: nn.Module, layers: list[int]) -> Tensor:
    v = models.direction()
    handles = [model.model.layers[i].register_forward_hook(lambda m, a, out: out + 3.0 * v) for i in layers]
    out = logits(model)
    for handle in handles:
        handle.remove()
    return out


def longer(model: nn.Module) -> None:
    model.model.layers.insert(1, copy.deepcopy(model.model.layers[0]))
    renumber(model)


def shorter(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList([model.model.layers[1]])
    renumber(model)


def other(model: nn.Module) -> None:
    model.model.layers[1] = models.build("llama", initializer_range=0.5).model.layers[0]
    renumber(model)


def renumber(model: nn.Module) -> None:
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)


@pytest.mark.parametrize("change", [longer, shorter, other])
def test_changed_after_the_first_use(change):
    model, add = models.build("llama"), fs.Add(models.direction(), 3.0, layers="all", at="resid_post")
    with fs.steer(model, add):
        logits(model)
    change(model)
    n = len(model.model.layers)
    everywhere, last = by_hand(model, list(range(n))), by_hand(model, [n - 1])
    with fs.steer(model, add):
        close(logits(model), everywhere)
    with fs.steer(model, fs.Add(models.direction(), 3.0, layers=-1, at="resid_post")):
        close(logits(model), last)
    with read(model) as taken:
        logits(model)
    assert sorted(taken) == list(range(n))


@pytest.mark.parametrize("change", [longer, shorter])
def test_a_steering_that_was_made_before_is_refused(change):
    model = models.build("llama")
    steering = fs.steer(model, PLAN)
    change(model)
    with pytest.raises(RuntimeError, match=r"layers have changed.*make another one"), steering:
        pass
    with fs.steer(model, PLAN):
        logits(model)


@pytest.mark.parametrize("path", ["hooks", "fused"])
@pytest.mark.parametrize("change", [longer, shorter, other])
def test_changed_inside_is_refused(change, path):
    model = models.build("llama")
    with fs.steer(model, PLAN, path=path):
        change(model)
        with pytest.raises(RuntimeError, match="changed inside"):
            logits(model)
    logits(model)


def test_an_inner_model_that_is_replaced_inside_is_refused():
    """The new one would run unsteered. One that is wrapped runs steered, as it holds the layers."""
    model = models.build("llama")
    with fs.steer(model, PLAN):
        expected, inner = logits(model), model.model
        model.model = models.build("llama").model
        with pytest.raises(RuntimeError, match="changed inside"):
            logits(model)
        model.model = torch.compile(inner, backend="eager")
        close(logits(model), expected)
        model.model = inner
        assert torch.equal(logits(model), expected)


def test_a_hooked_module_that_is_wrapped_inside_is_refused():
    """An adapter on the very module whose output is ablated would add to it behind the ablation. Entering again is
    right: that of a hook on the adapter, written by hand."""
    model, direction = models.build("opt"), models.direction()
    plan, unit = fs.Plan([fs.Ablate(direction, layers=1, at="mlp_out")]), direction / direction.norm()
    with fs.steer(model, plan):
        logits(model)
        get_peft_model(model, LoraConfig(r=2, target_modules=["fc2"], init_lora_weights=False)).eval()
        with pytest.raises(RuntimeError, match="changed inside"):
            logits(model)
    adapted = model.model.decoder.layers[1].fc2
    with adapted.register_forward_hook(lambda module, args, out: out - (out @ unit).unsqueeze(-1) * unit):
        expected = logits(model)
    with fs.steer(model, plan):
        close(logits(model), expected)


@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_a_forward_that_is_replaced_inside_is_refused(path):
    """As kernel libraries do it: it would run without ours. One that calls ours, and says so, runs steered."""
    model = models.build("llama")
    layer, v = model.model.layers[1], models.direction()
    own = type(layer).forward
    plan = fs.Plan([fs.Add(v, layers=[1], at="resid_post")])

    def half(module: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return 0.5 * own(module, hidden_states, **kwargs)

    with fs.steer(model, plan, path=path):
        expected, ours = logits(model), layer.forward
        layer.forward = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
        assert torch.equal(logits(model), expected)
        layer.forward = types.MethodType(half, layer)
        with pytest.raises(RuntimeError, match=r"changed inside.*leave it and enter it again"):
            logits(model)
    with layer.register_forward_hook(lambda _module, _args, out: out + v):
        expected = logits(model)
    with fs.steer(model, plan):
        close(logits(model), expected)


def test_a_norm_whose_code_was_replaced_after_the_first_use():
    """As kernel libraries do it: the fused layers must not compute what the norm was before."""
    model = models.build("llama")
    with fs.steer(model, [None]) as steering:
        assert steering.path == "fused"
    norm = model.model.layers[0].input_layernorm
    own = type(norm).forward
    norm.forward = lambda x: 2 * own(norm, x)
    plain = logits(model)
    with fs.steer(model, [None, None]):
        assert torch.equal(logits(model), plain)


# Inference mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["hooks", "fused"])
@pytest.mark.parametrize("gate", [None, fs.Gate(models.direction(1), -1e9, latched=True)], ids=["", "latched"])
def test_made_and_used_first_in_inference_mode(path, gate):
    model = models.build("llama")
    v = torch.nn.Parameter(models.direction())
    plan = fs.Plan([fs.Add(v, 2.0, layers=1, when=gate), fs.Ablate(models.direction(2), layers=0)])
    with torch.inference_mode():
        steering = fs.steer(model, [plan, None], path=path)
        with steering:
            model(IDS)
            model.generate(IDS, max_new_tokens=2)
    with steering:
        model(IDS).logits.sum().backward()
        steering.assign([None, plan])
        model(IDS).logits.sum().backward()
    assert v.grad is not None and bool(v.grad.any())


def test_a_hook_that_was_called_first_in_inference_mode():
    module, hook = nn.Linear(32, 32), fs.hook(fs.Add(models.direction()))
    module.register_forward_hook(hook)
    with torch.inference_mode():
        module(torch.ones(2, 3, 32))
    for rows in (2, 1):
        module(torch.ones(rows, 3, 32)).sum().backward()
