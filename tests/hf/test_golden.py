"""What is found in known architectures stays what it was: names of hook points, and whether the layers are fused."""

from __future__ import annotations

import models
import pytest

from faststeer.hf import find_hook_points
from faststeer.hf.fused import find_fusion

_LLAMA = ("model.layers", "self_attn", "post_attention_layernorm", "mlp", "model.norm")
_GEMMA = (
    "model.layers",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "model.norm",
)
# Path of the layers, attn_out, resid_mid, mlp_out, and the final norm of the fused layers (None: not fused).
GOLDEN: dict[str, tuple[str, str, str | None, str, str | None]] = {
    **{name: _LLAMA for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": ("model.layers", "resid_attn_dropout", "post_attention_layernorm", "resid_mlp_dropout", "model.norm"),
    "gpt2": ("transformer.h", "attn", "ln_2", "mlp", None),
    "neox_parallel": ("gpt_neox.layers", "post_attention_dropout", None, "post_mlp_dropout", None),
    "neox_sequential": (
        "gpt_neox.layers",
        "post_attention_dropout",
        "post_attention_layernorm",
        "post_mlp_dropout",
        None,
    ),
    "opt": ("model.decoder.layers", "self_attn", "final_layer_norm", "fc2", None),
    "olmo2": ("model.layers", "post_attention_layernorm", "mlp", "post_feedforward_layernorm", "model.norm"),
    "falcon": ("transformer.h", "self_attention", None, "mlp", None),
    "phi": ("model.layers", "self_attn", None, "mlp", None),
    "cohere": ("model.layers", "self_attn", None, "mlp", None),
    "stablelm": ("model.layers", "self_attn", "post_attention_layernorm", "dropout", None),
}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_found_as_before(name):
    model = models.model(name)
    points = find_hook_points(model)
    fusion = find_fusion(model, points)
    final_norm = None if isinstance(fusion, str) else fusion.final_norm
    assert (points.layers, points.attn_out, points.resid_mid, points.mlp_out, final_norm) == GOLDEN[name]
