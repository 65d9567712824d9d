"""Attention as it is computed, of every architecture alike: queries, keys and values as they enter it (projected,
normed, rotated, from the cache), with the model's own function to compute with others in their place.

transformers computes attention in one exchangeable function per model. Here that function is exchanged, inside a `with`
block, for one that asks a function of ours at every layer; masks, sliding windows, soft caps, sinks and grouped queries
stay the model's own. No weights are read here, and no table of architectures is kept.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from faststeer.hf.anatomy import find_hook_points, run_four_tokens
from faststeer.hf.changes import Changes, Context, changing
from faststeer.hf.hook_points import HookPoints, quiet
from faststeer.hf.known import known_of

PREFIX = "faststeer_"
OURS = ("sdpa", "eager")  # what takes any mask and values of any width

# Layer number and function of every attention module whose attention is exchanged now.
_exchanged: weakref.WeakKeyDictionary[nn.Module, tuple[int, Attend]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention in one forward pass.

    Attributes:
        layer: counted from 0.
        query: `[batch, heads, tokens, head_dim]`, normed and rotated where the model does so.
        key: `[batch, kv_heads, columns, head_dim]`, those of the cache included.
        value: `[batch, kv_heads, columns, value_dim]`, of the same columns.
        mask: what the model's attention function takes for one; None where it is causal without one.
        settings: its other arguments: scaling, soft cap, sliding window, ...
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    settings: Mapping[str, Any]
    own: Callable[..., tuple[Tensor, Tensor | None]]

    def attend(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """What the model's own function gives, with other queries, keys or values where they are given:
        `[batch, tokens, heads, value_dim]`. `rows`: the rows of the batch that the given tensors are of."""
        pairs = (query, self.query), (key, self.key), (value, self.value)
        given = [own if other is None else other for other, own in pairs]
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim > 1 and mask.shape[0] == self.query.shape[0]:
            mask = mask[rows]
        return self.own(self.module, *given, mask, **self.settings)[0]

    def weights(self) -> Tensor:
        """The attention pattern `[batch, heads, tokens, columns]`, from whatever function the model has: what it makes
        of values that are the unit vectors. Rows of sinks sum to less than 1."""
        columns = self.key.shape[2]
        unit = torch.eye(columns, dtype=self.value.dtype, device=self.value.device)
        return self.attend(value=unit.expand(*self.key.shape[:2], -1, -1)).transpose(1, 2)


# What takes the place of a layer's attention: given the call, `[batch, tokens, heads, value_dim]`.
Attend = Callable[[AttentionCall], Tensor]


def exchange_attention(model: nn.Module, attend: Attend, points: HookPoints | None = None) -> Context[None]:
    """Compute every layer's attention by `attend` inside the block.

        with exchange_attention(model, lambda call: call.attend()):      # the model as it is
            model(**batch)

    An attention kernel that takes neither other values nor any mask (flash attention, flex attention) is exchanged for
    "sdpa", or "eager" where the model lacks that, with a UserWarning that says so; the model's own is back behind the
    block.

    Raises:
        ValueError: an architecture that does not compute attention in transformers' exchangeable function, once per
            layer. RuntimeError: inside another block of this kind on the same model.
    """
    points = points or find_hook_points(model)
    modules = dict(enumerate(attention_modules(model, points)))
    return Context(lambda changes: _exchange(changes, model, points, modules, attend))


def attention_modules(model: nn.Module, points: HookPoints | None = None) -> tuple[nn.Module, ...]:
    """The module of each layer that computes its attention. One forward pass over four tokens the first time.

    Raises:
        ValueError: as `exchange_attention`.
    """
    points = points or find_hook_points(model)
    names = known_of(model).get("attention", lambda: _find(model, points))
    return tuple(points.layer(model, i).get_submodule(name) for i, name in enumerate(names))


def _find(model: nn.Module, points: HookPoints) -> tuple[str, ...]:
    layers = [points.layer(model, i) for i in range(points.n_layers)]
    names = {module: (i, name) for i, layer in enumerate(layers) for name, module in layer.named_modules()}
    seen: list[tuple[int, str]] = []

    def note(call: AttentionCall) -> Tensor:
        seen.append(names[call.module])
        return call.attend()

    with quiet(model), changing() as changes:
        _exchange(changes, model, points, dict(enumerate(names)), note)
        run_four_tokens(model)
    if sorted(layer for layer, _ in seen) != list(range(points.n_layers)):
        missing = sorted(set(range(points.n_layers)) - {layer for layer, _ in seen})
        what = f"layer {missing[0]} does not" if missing else "a layer does so more than once"
        raise ValueError(
            f"{type(model).__name__}: attention is expected once per layer in transformers' attention function "
            f"(AttentionInterface), but {what}: attention cannot be read or frozen in this architecture"
        )
    return tuple(name for _, name in sorted(seen))


def _exchange(
    changes: Changes, model: nn.Module, points: HookPoints, modules: Mapping[int, nn.Module], attend: Attend
) -> None:
    """Compute the attention of these modules, by layer, by `attend`."""
    if any(module in _exchanged for module in modules.values()):
        raise RuntimeError(
            f"the attention of this {type(model).__name__} is exchanged already: leave the other freeze(...), "
            "split(...) or exchange_attention(...) first"
        )
    # Masks are made from the configuration of the module that runs the layers, attention is chosen by its own; and
    # `generate` makes masks for a static cache by the whole model's.
    owners = (points.owner(model), *modules.values())
    found: list[Any] = [module.config for module in owners if hasattr(module, "config")]
    if (whole := getattr(model, "config", None)) is not None:
        found.append(whole.get_text_config())
    configs = {id(config): config for config in found}.values()
    names = [_register(_implementation(model, config._attn_implementation)) for config in configs]
    for config, name in zip(configs, names, strict=True):
        changes.replace(config, "_attn_implementation_internal", name)
    for number, module in modules.items():
        changes.on_undo(_exchanged.pop, module, None)
        _exchanged[module] = number, attend


def _implementation(model: nn.Module, implementation: str | None) -> str:
    """The implementation to compute with: the model's own, or one that takes other values."""
    if implementation is not None and implementation in OURS:
        return implementation
    instead = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    warnings.warn(
        f"the model's attention is {implementation!r}, whose kernel gives no attention pattern to read or to freeze: "
        f"computing with {instead!r} here; load the model with attn_implementation={instead!r} to do so everywhere",
        UserWarning,
        stacklevel=6,
    )
    return instead


def _register(implementation: str) -> str:
    """The name of our attention function over this implementation, with its kind of masks."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        own = _own_function(module, implementation)
        if module not in _exchanged:
            return own(module, query, key, value, attention_mask, **settings)
        layer, attend = _exchanged[module]
        return attend(AttentionCall(layer, module, query, key, value, attention_mask, settings, own)), None

    name = PREFIX + implementation
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, attention)
        masks: Any = AttentionMaskInterface._global_mapping[implementation]
        AttentionMaskInterface.register(name, masks)
    return name


def _own_function(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that a module computes attention with; each architecture has an eager one of its own."""
    shared: Mapping[str, Any] = AttentionInterface._global_mapping
    if implementation in shared:
        return shared[implementation]
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} has no eager attention function of its own: load the model with "
            'attn_implementation="sdpa"'
        )
    return own
