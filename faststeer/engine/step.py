"""Passes over tokens without the model's own Python: one loop over the layers, for models that are nothing but

    x = embed(token);  for every layer: x += attention(norm(x)), x += mlp(norm(x));  logits = W norm(x)

(norms before or after, see `hf.fused`), whose attention and MLPs are known (`engine.layers`). Where a model is small,
calling its modules costs more than what they compute. A model of which a forward pass names anything else, and one
that somebody watches by hooks, runs as it is; the engine checks the logits as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.engine.cache import RowCache
from faststeer.engine.layers import MLP, Attention, own_forward
from faststeer.engine.linear import product_for
from faststeer.hf import Steering, find_hook_points
from faststeer.hf.fused import Fusion, NormForm, find_fusion

# Every name that the forward passes of the model and of its body may use.
HEAD_NAMES = {
    "model", "lm_head", "config", "cache", "past_key_values", "hidden_states", "attentions", "last_hidden_state",
    "slice_logits_to_keep", "loss_function", "vocab_size", "CausalLMOutputWithPast",
    "isinstance", "int", "slice",  # transformers 5.17 slices in place
}  # fmt: skip
BODY_NAMES = {
    "embed_tokens", "rotary_emb", "layers", "norm", "num_hidden_layers", "layer_types", "has_sliding_layers",
    "sliding_window", "create_causal_mask", "create_sliding_window_causal_mask", "config", "DynamicCache",
    "get_seq_length", "arange", "device", "shape", "unsqueeze", "torch", "dict", "isinstance", "enumerate",
    "ValueError", "BaseModelOutputWithPast",
}  # fmt: skip


class _Norm(NamedTuple):
    """A norm that one op computes with the sum before it."""

    module: Any
    form: NormForm


@dataclass(frozen=True)
class _Layer:
    """`after_*`: modules between a branch and its sum. `window`: columns that attention looks at, 0 for all."""

    attention: Attention
    after_attention: Sequence[nn.Module]
    mid_norm: _Norm | None
    mlp: MLP
    after_mlp: Sequence[nn.Module]
    next_norm: _Norm | None
    window: int


class Step:
    """See the module. `find` makes it."""

    def __init__(self, model: Any, first_norm: _Norm | None, layers: Sequence[_Layer]) -> None:
        self._body, self._head = model.base_model, model.lm_head
        self._first_norm, self._layers = first_norm, layers
        points = find_hook_points(model)
        # Whether these are what modules give that are not called here; else the modules' hooks act by themselves.
        self._attn_out, self._mlp_out = points.attn_out == "self_attn", points.mlp_out == "mlp"
        norms = [first_norm, *(norm for layer in layers for norm in (layer.mid_norm, layer.next_norm))]
        passed = [model, self._body, self._head, *self._body.layers, *(norm.module for norm in norms if norm)]
        for layer in layers:
            passed += [m for part in (layer.attention, layer.mlp) for m in (part.module, *part.linears)]
        self._zeros = torch.zeros(0, 0)
        self._product = product_for(self._head.weight)
        self._hooks = [hooks for module in passed for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    @classmethod
    def find(cls, model: Any, parts: Sequence[Attention | MLP], windows: Mapping[str, int | None]) -> Step | None:
        """None: the model does something else, or has parts that are not known. `windows`: of each kind of attention,
        "" where there is but one."""
        body, known = getattr(model, "base_model", model), {part.module: part for part in parts}
        if body is model or not (own_forward(model)[1] <= HEAD_NAMES and own_forward(body)[1] <= BODY_NAMES):
            return None
        fusion = find_fusion(model, find_hook_points(model))
        if not isinstance(fusion, Fusion) or fusion.final_norm is None:
            return None
        norms = {m: _Norm(m, form) for path, form in fusion.forms.items() for m in [model.get_submodule(path)]}
        inputs = [
            norms[getattr(layer, shape.input_norm)] if shape.input_norm else None
            for layer, shape in zip(body.layers, fusion.shapes, strict=True)
        ]
        inputs.append(norms[model.get_submodule(fusion.final_norm)])
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(body.layers)
        layers = []
        for i, (layer, shape) in enumerate(zip(body.layers, fusion.shapes, strict=True)):
            attention, mlp = known.get(layer.self_attn), known.get(layer.mlp)
            if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
                return None
            after_attention, after_mlp = (
                [getattr(layer, name) for name in names] for names in (shape.after_attention, shape.after_mlp)
            )
            mid = norms[getattr(layer, shape.mid_norm)] if shape.mid_norm else None
            window = windows.get(kinds[i], windows.get("")) or 0
            layers.append(_Layer(attention, after_attention, mid, mlp, after_mlp, inputs[i + 1], window))
        return cls(model, inputs[0], layers)

    def fits(self, steering: Steering | None) -> bool:
        """Whether the steering acts by fused sums, and nobody else hooks what is passed by."""
        if steering is None or steering.path != "fused":
            return False
        passed = 3 + sum(map(self._is_passed, steering.hooked))  # and those that begin and end a pass
        return sum(map(len, self._hooks)) == passed

    def _is_passed(self, number: int) -> bool:
        """Whether the steering's hook at a site is on a module that is not called here."""
        return number == 0 or (number % 4 == 1 and self._attn_out) or (number % 4 == 3 and self._mlp_out)

    def __call__(
        self,
        token: Tensor,
        column: Tensor,
        cache: RowCache,
        steering: Steering,
        tokens: int = 1,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits `[n, vocabulary]` of the tokens `last` `[n]`, by default of all, where `token` `[rows]` is `tokens`
        after another of each sequence, at their columns `[rows]`."""
        steering.passes.begin_tokens(len(token) // tokens, tokens)
        x = self._body.embed_tokens(token)
        cosine, sine = (t[:, 0] for t in self._body.rotary_emb(x.unsqueeze(1), position_ids=column.unsqueeze(1)))
        x, normed = self._sum(steering, 0, x, self._nothing(x), self._first_norm)
        for i, layer in enumerate(self._layers):
            branch = layer.attention.attend(normed, cosine, sine, column, None, cache, layer.window, tokens)
            if self._attn_out and 4 * i + 1 in steering.hooked:
                branch = steering.passes.steer(4 * i + 1)(branch)
            for module in layer.after_attention:
                branch = module(branch)
            x, normed = self._sum(steering, 4 * i + 2, branch, x, layer.mid_norm)
            branch = layer.mlp.compute(normed)
            if self._mlp_out and 4 * i + 3 in steering.hooked:
                branch = steering.passes.steer(4 * i + 3)(branch)
            for module in layer.after_mlp:
                branch = module(branch)
            x, normed = self._sum(steering, 4 * i + 4, branch, x, layer.next_norm)
        normed = normed if last is None else normed[last]
        return self._product(normed, self._head.weight, self._head.bias)

    def _nothing(self, x: Tensor) -> Tensor:
        """Zeros like x, to be added where only steering and norm are wanted."""
        if self._zeros.shape[0] < x.shape[0] or self._zeros.dtype != x.dtype:
            self._zeros = torch.zeros_like(x)
        return self._zeros[: x.shape[0]]

    @staticmethod
    def _sum(steering: Steering, number: int, branch: Tensor, x: Tensor, norm: _Norm | None) -> tuple[Tensor, Tensor]:
        """The stream behind a site, and what the next branch reads of it."""
        x, normed = steering.passes.add(number)(branch, x, None if norm is None else (norm.module.weight, norm.form))
        return x, x if normed is None else normed
