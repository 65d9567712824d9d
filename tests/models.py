"""Tiny random models of many architectures, built from their configurations: no download, and sharp enough outputs
that greedy choices are clear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from faststeer.hf.cache import cache_argument, cache_in

N_LAYERS, HIDDEN, VOCAB = 2, 32, 101

# What most configurations call their sizes. No token ends a sequence, so every generation has the length asked for.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {
    **_GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 64}),
    "gemma3": (
        "Gemma3",
        {**_GROUPED, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3", _GROUPED),
    "gpt2": ("GPT2", {"n_embd": HIDDEN, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}),
    "neox_parallel": ("GPTNeoX", {"use_parallel_residual": True}),
    "neox_sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "init_std": 0.25}),
    "olmo2": ("Olmo2", _GROUPED),
    "falcon": ("Falcon", {"alibi": False, "parallel_attn": True, "multi_query": True, "bias": False}),
    "phi": ("Phi", {}),
    "cohere": ("Cohere", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
}
# Mixtures of experts, whose kernels see rows in groups; and those whose attention and MLP are added together, with no
# residual stream between.
EXPERTS = {"mixtral", "qwen3_moe"}
PARALLEL = {"neox_parallel", "falcon", "phi", "cohere"}


@dataclass(frozen=True)
class Modules:
    """What a person who knows an architecture would hook by hand: modules inside a layer, and how a layer makes
    mlp_out from resid_mid."""

    layers: str
    attn_out: str
    mlp_out: str
    resid_mid: str | None
    branch: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None


def _pre_norm(layers: str, attn_out: str, norm: str, mlp: str) -> Modules:
    """mlp_out = mlp(norm(resid_mid))."""
    return Modules(layers, attn_out, mlp, norm, lambda layer, mid: getattr(layer, mlp)(getattr(layer, norm)(mid)))


_llama = _pre_norm("model.layers", "self_attn", "post_attention_layernorm", "mlp")
_gemma = Modules(
    "model.layers",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm",
    lambda layer, mid: layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(mid))),
)
MODULES: dict[str, Modules] = {
    **{name: _llama for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "stablelm")},
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gpt2": _pre_norm("transformer.h", "attn", "ln_2", "mlp"),
    "neox_parallel": Modules("gpt_neox.layers", "post_attention_dropout", "post_mlp_dropout", None, None),
    "neox_sequential": _pre_norm("gpt_neox.layers", "attention", "post_attention_layernorm", "mlp"),
    "opt": Modules(
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "final_layer_norm",
        lambda layer, mid: layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(mid)))),
    ),
    "olmo2": Modules(
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp",
        lambda layer, mid: layer.post_feedforward_layernorm(layer.mlp(mid)),
    ),
    "falcon": Modules("transformer.h", "self_attention", "mlp", None, None),
    "phi": Modules("model.layers", "self_attn", "mlp", None, None),
    "cohere": Modules("model.layers", "self_attn", "mlp", None, None),
}


def points(name: str) -> tuple[str, ...]:
    """The hook points that an architecture has."""
    return tuple(
        at
        for at in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        if at != "resid_mid" or name not in PARALLEL
    )


@functools.cache
def _shared(name: str) -> nn.Module:
    return build(name)


def model(name: str) -> nn.Module:
    """The shared fp32 model of an architecture; a test that changes its weights or settings takes one of its own from
    `build`."""
    return _shared(name)


def build(name: str, **changes: Any) -> nn.Module:
    """A model of its own, always with the same weights."""
    prefix, settings = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config_class(**{**_COMMON, **settings, **changes})
    torch.manual_seed(0)
    model_class = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    made = getattr(transformers, model_class)(config).eval()
    # Norm weights of exactly one and biases of exactly zero would hide a wrong place or a wrong order.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.requires_grad_(False)
    return made


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """`[rows, length]` token ids, none of them padding."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that continues a cache, by the name that this model has for it."""
    return {cache_argument(model): cache}


def cache_of(output: Any) -> Any:
    """The cache that a forward pass returned."""
    return cache_in(dict(output))


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts `[length]` as one batch with padding on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack(
        [
            torch.cat([torch.zeros(width - len(p), dtype=torch.long), torch.ones(len(p), dtype=torch.long)])
            for p in prompts
        ]
    )
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts `[length]` as one batch with padding on the right."""
    batch = left_padded([p.flip(0) for p in prompts])
    return {name: t.flip(1) for name, t in batch.items()}


def direction(seed: int = 0, size: int = HIDDEN, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random direction of length about sqrt(size)."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64).to(dtype)
