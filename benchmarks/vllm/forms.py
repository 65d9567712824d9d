"""Another form of the op in vLLM's layers than faststeer's own, to be measured against it.

faststeer steers the pair (hidden, residual) that a layer hands on, in an op of its own, and leaves vLLM's norm alone:
rows without a plan keep their bits. `fuse` puts sum, steering and norm into one op instead (`add_steer_rmsnorm`), in
place of the next layer's input norm: one pass over the rows less, but the norm's sum is ours, so that rows without a
plan have other bits than vLLM's. Only for hook points resid_pre and resid_post, in layers that call `input_layernorm`
with a pair (Llama, Qwen, Mistral).
"""

from __future__ import annotations

from typing import Any

import faststeer.vllm.layers as layers
from faststeer.ops import overload
from faststeer.plan import site


def fuse() -> None:
    """For every engine that starts in this process from now on. Needs a compiled back end."""
    layers.patch_layers = patch_layers


def patch_layers(found: dict[int, Any], tables: layers.StepTables, hook_points: Any, n_layers: int) -> None:
    if set(hook_points) != {"resid_pre", "resid_post"}:
        raise ValueError(f"the fused form has resid_pre and resid_post alone, not {hook_points}")
    target = tables.program.device
    op, operators = overload("add_steer_rmsnorm", target), layers.Operators.of(target)
    for number, layer in found.items():
        layers.check_layer(layer, tables)
        here = layers.Site(site("resid_pre", number), tables, operators)
        layer.add_module("faststeer_resid_pre", here)
        if number == 0:
            layers._patch_layer(layer, {"resid_pre": here})
        else:
            _patch_norm(layer.input_layernorm, here, op)
        if number == n_layers - 1:  # what the model's last norm reads
            last = layers.Site(site("resid_post", number), tables, operators)
            layer.add_module("faststeer_resid_post", last)
            layers._patch_layer(layer, {"resid_post": last})


def _patch_norm(norm: Any, here: layers.Site, op: Any) -> None:
    eps = norm.variance_epsilon

    def forward(x: Any, residual: Any) -> tuple[Any, Any]:
        tables = here.tables()
        normed, hidden, seen = op(x, residual, norm.weight, eps, 0.0, False, *tables, None, here.columns)
        here._keep(seen)
        return normed, hidden

    norm.forward = forward
