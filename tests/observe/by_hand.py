"""The paper's analyses once more, the slow way: whole sequences, one row at a time, without a cache or padding, in the
architecture's own eager attention with something put in its place. Nothing of faststeer is used."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import models
import torch

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")


def build(name: str, dtype=torch.float32, **changes):
    """A model of its own with three layers and norm weights that matter."""
    layers = {"num_hidden_layers": 3, **({"n_layer": 3} if name == "gpt2" else {})}
    return models.build(name, **layers, **changes).to(dtype)


def eager_copy(model, dtype):
    """The same weights in another dtype, with eager attention."""
    made = copy.deepcopy(model).to(dtype)
    made.set_attn_implementation("eager")
    return made


def decoder_layers(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def attention_of(layer):
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


@contextmanager
def added(model, layer: int, vector, coefficient: float, positions: Callable[[int], bool], n_prompt: int) -> Iterator:
    """h + coefficient * vector before a layer, at the tokens whose position (from the prompt's end) is meant."""

    def hook(module, args, kwargs):
        h = args[0] if args else kwargs["hidden_states"]
        mask = torch.tensor([positions(t - n_prompt) for t in range(h.shape[1])], dtype=h.dtype).view(1, -1, 1)
        h = h + mask * coefficient * vector.to(h.dtype)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = decoder_layers(model)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def everywhere(position: int) -> bool:
    return True


@dataclass
class Case:
    """Steering of one row: what is added before a layer."""

    vector: torch.Tensor
    coefficient: float = 1.0
    layer: int = 1
    positions: Callable[[int], bool] = everywhere


@dataclass
class _Seen:
    weights: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)


@contextmanager
def eager_function(model, replace: Callable) -> Iterator[None]:
    """`replace(own, module, query, key, value, mask, **settings)` in place of the architecture's eager attention."""
    modeling = importlib.import_module(type(model).__module__)
    own = modeling.eager_attention_forward
    modeling.eager_attention_forward = lambda *args, **kwargs: replace(own, *args, **kwargs)
    try:
        yield
    finally:
        modeling.eager_attention_forward = own


@torch.no_grad()
def frozen_logits(model, ids, case: Case, n_prompt: int, what: str):
    """Logits `[tokens, vocabulary]` of a row `[tokens]` with attention frozen: an unsteered pass over the whole
    sequence first, whose patterns (or values) take the place of the steered pass's own."""
    seen = _Seen()
    numbers = {attention_of(layer): i for i, layer in enumerate(decoder_layers(model))}

    def note(own, module, query, key, value, *rest, **settings):
        out, weights = own(module, query, key, value, *rest, **settings)
        seen.weights[numbers[module]], seen.values[numbers[module]] = weights, value
        return out, weights

    def put(own, module, query, key, value, *rest, **settings):
        number = numbers[module]
        if what == "ov":
            return own(module, query, key, seen.values[number], *rest, **settings)
        groups = query.shape[1] // value.shape[1]
        out = seen.weights[number] @ value.repeat_interleave(groups, dim=1)
        return out.transpose(1, 2).contiguous(), None

    with eager_function(model, note):
        model(input_ids=ids.unsqueeze(0), use_cache=False)
    steered = added(model, case.layer, case.vector, case.coefficient, case.positions, n_prompt)
    with steered, eager_function(model, put):
        return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]


@torch.no_grad()
def steered_logits(model, ids, case: Case | None, n_prompt: int, withheld: tuple[str, ...] = ()):
    """Logits of a row steered by `case` (None: not), with what it added taken out at the inputs of W_V ("svv") or of
    the MLPs ("mlp"), in every layer from the steered one on."""
    with ExitStack() as stack:
        if case is not None:
            stack.enter_context(added(model, case.layer, case.vector, case.coefficient, case.positions, n_prompt))
            for layer in decoder_layers(model)[case.layer :]:
                stack.enter_context(_taken_out(layer, case, n_prompt, withheld))
        return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]


def norm_names(layer) -> tuple[str, str]:
    if hasattr(layer, "ln_1"):
        return "ln_1", "ln_2"
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    return "input_layernorm", "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"


def weight(norm):
    """What a norm multiplies by."""
    return norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight


def share(norm, h, s):
    """What s in the stream h becomes behind the norm."""
    if isinstance(norm, torch.nn.LayerNorm):
        h, s = h - h.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return s * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight(norm)


@contextmanager
def _taken_out(layer, case: Case, n_prompt: int, withheld: tuple[str, ...]) -> Iterator[None]:
    attention, mlp = attention_of(layer), layer.mlp
    first, second = (getattr(layer, name) for name in norm_names(layer))
    streams = {}
    handles = [
        norm.register_forward_pre_hook(lambda m, args: streams.__setitem__(m, args[0])) for norm in (first, second)
    ]

    def steering(norm):
        h = streams[norm]
        mask = torch.tensor([case.positions(t - n_prompt) for t in range(h.shape[1])], dtype=h.dtype).view(1, -1, 1)
        return share(norm, h, mask * case.coefficient * case.vector.to(h.dtype))

    if "svv" in withheld and hasattr(attention, "v_proj"):
        handles.append(attention.v_proj.register_forward_pre_hook(lambda m, args: (args[0] - steering(first),)))
    elif "svv" in withheld:  # the values are the last third of c_attn's output
        size = attention.split_size

        def fused(module, args, output):
            less = module.forward(args[0] - steering(first))
            return torch.cat([output[..., : 2 * size], less[..., 2 * size :]], dim=-1)

        handles.append(attention.c_attn.register_forward_hook(fused))
    if "mlp" in withheld:
        handles.append(mlp.register_forward_pre_hook(lambda m, args: (args[0] - steering(second),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
