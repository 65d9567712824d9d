"""Attention of decode steps on a CPU: `ops.decode_attention`, which reads keys and values once, in place of the model's
own. By way of transformers' attention interface and only while a step runs; prompts are read with the model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from faststeer.hf.changes import Changes, Context
from faststeer.ops import decode_attention

NAME = "faststeer_decode"
# What some attentions have besides keys, values and a mask, and the operator has not.
UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`[rows, heads, 1, size]` -> `[rows, 1, heads, size]`, for transformers."""
    if (
        attention_mask is None
        or query.shape[2] != 1
        or dropout
        or any(others.get(name) is not None for name in UNKNOWN)
    ):
        raise ValueError(f"{type(module).__name__} attends in a way that decode_attention does not know")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    mask = attention_mask[:, 0, 0]
    return decode_attention(query.squeeze(2), key, value, mask, scaling, softcap or 0.0).unsqueeze(1), None


AttentionInterface.register(NAME, _attend)


class DecodeAttention(Context[None]):
    """What makes a model's layers attend with the operator, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        configs = (getattr(module, "config", None) for module in model.modules())
        self._configs = list({id(config): config for config in configs if config is not None}.values())

    def enter(self, changes: Changes) -> None:
        # Not by the property, which would set the configurations inside this one.
        for config in self._configs:
            changes.replace(config, "_attn_implementation_internal", NAME)
