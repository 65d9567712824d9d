"""The logit lens: what the model would say next if the residual stream ended here; and the difference lens, what
steering has changed of that. The final norm is the model's own, as are soft caps and scales of the logits.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points, run_four_tokens, watch
from faststeer.hf.hook_points import quiet
from faststeer.hf.norms import final_norm, unembedding_of, wide
from faststeer.observe.parts import matrix

WIDENED = 16384  # rows of the unembedding that are in fp32 at once


class LogitLens:
    """Reads the residual stream of one model through its final norm and unembedding.

        lens = LogitLens(model)
        lens(states)                                  # [..., hidden] -> logits [..., vocabulary]

    At the output of the last layer it gives the model's own logits; that is checked when it is made, by a forward pass
    over four tokens.

    Raises:
        ValueError: a model without an output embedding, or with another way from the last layer to the logits than a
            norm, a linear map and a soft cap or scale.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._points = model, find_hook_points(model)
        self.head, self.norm = unembedding_of(model), final_norm(model)
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        last = f"{self._points.layers}.{self._points.n_layers - 1}"
        with quiet(model):
            end = watch(model, [last])[last].sent
            expected = run_four_tokens(model)
            logits = self(end.to(expected.device))
        slack = 16 * torch.finfo(torch.promote_types(expected.dtype, torch.bfloat16)).eps
        if not torch.allclose(logits.to(expected), expected, rtol=slack, atol=slack * float(expected.abs().max())):
            raise ValueError(
                f"{type(model).__name__}: its logits are not a norm, a linear map and a soft cap or scale of the last "
                "layer's output, so the logit lens would not read what the model says"
            )

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[..., vocabulary]`, in the model's dtype, of the residual stream `[..., hidden]` at any layer."""
        return self.logits(states)

    def logits(self, states: Tensor) -> Tensor:
        """The same, with gradients."""
        x = states.to(matrix(self.head))
        if self.norm is not None:
            x = self.model.get_submodule(self.norm.path)(x)
        logits = self.head(x) * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @torch.no_grad()
    def direction(self, direction: Tensor, at: Tensor | None = None) -> Tensor:
        """What a direction `[..., hidden]` adds to the logits: its linear way through the final norm (weight and
        centring, no bias, no soft cap), fp32 or better. The scale is that of the stream `at` (broadcast); without one,
        that of a stream which is the direction alone, so that only the order of the tokens has a meaning."""
        weight = matrix(self.head)
        x = direction.to(wide(weight[:0]))
        if self.norm is not None:
            stream = x if at is None else at.to(x)
            x = self.norm.linear(self.model, x) * self.norm.scale(stream)
        # Widened piece by piece: the whole in fp32 may be larger than the model.
        return torch.cat([x @ rows.to(x).T for rows in weight.split(WIDENED)], dim=-1) * self._scale

    def difference(self, base: Tensor, steered: Tensor) -> Tensor:
        """The difference lens: lens(steered) - lens(base) `[..., vocabulary]`, fp32 or better: what the model would say
        more (less) at this layer because of the steering. Each side has its own norm."""
        return wide(self(steered)) - wide(self(base))

    def top_tokens(
        self, states: Tensor, tokenizer: Any, k: int = 10, *, direction: bool = False, largest: bool = True
    ) -> list[Any]:
        """The k likeliest tokens (unlikeliest: `largest=False`) of each row `[..., hidden]`, as nested lists of that
        shape. `direction`: the rows are directions, not states of the stream."""
        logits = self.direction(states) if direction else self(states)
        return self.decode(logits.topk(k, dim=-1, largest=largest).indices, tokenizer)

    @staticmethod
    def decode(tokens: Tensor, tokenizer: Any) -> list[Any]:
        """Token ids `[...]` as nested lists of texts."""
        if tokens.ndim > 1:
            return [LogitLens.decode(row, tokenizer) for row in tokens]
        return [tokenizer.decode([token]) for token in tokens.tolist()]
