"""What is patched towards: one number per kept position, from the logits there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from faststeer.hf.norms import wide
from faststeer.observe.lens import LogitLens
from faststeer.observe.patching.examples import Example

MetricName = Literal["logit_difference", "directed_kl"]
CHUNK = 64  # positions whose logits are held at once


def check_metric(name: str) -> MetricName:
    if name not in get_args(MetricName):
        raise ValueError(f"metric is {name!r}: expected one of {', '.join(get_args(MetricName))}")
    return name  # type: ignore[return-value]


def check_finite(*values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise ValueError(
            "the metric is NaN or infinite: use a smaller coefficient, a dtype of a wider range (bfloat16 for float16) "
            "or batch_size=1 where the model's attention cannot take padded rows in this dtype"
        )


class Metric:
    """The metric of a batch of examples, summed over kept positions; y, y* are the steered and the base favourite, P
    and P* their distributions, P' that of the run at hand:

        "logit_difference": logit(y) - logit(y*)
        "directed_kl":      KL(P* || P') - KL(P || P')

    Both rise from base to steered.

    Args:
        base, steered: the streams that the last layer leaves `[batch, tokens, hidden]`; "directed_kl" needs the second.
    """

    def __init__(
        self, name: MetricName, lens: LogitLens, group: Sequence[Example], base: Tensor, steered: Tensor | None
    ) -> None:
        self.name, self._lens, self._base, self._steered = name, lens, base, steered
        width, device = base.shape[1], base.device
        places = [(b, width - len(each) + place) for b, each in enumerate(group) for place in each.kept]
        self._row, self._column = torch.tensor(places, device=device).T
        self._y = torch.tensor([token for each in group for token in each.steered_tokens], device=device)
        self._y_base = torch.tensor([token for each in group for token in each.base_tokens], device=device)

    @torch.no_grad()
    def of(self, stream: Tensor) -> Tensor:
        """`[batch]` fp64 on the CPU: each row's sum, from the stream that the last layer leaves."""
        sums = torch.zeros(len(stream), dtype=torch.float64)
        for piece in self._pieces():
            values = self._values(self._at(stream, piece), piece).double().cpu()
            sums.index_add_(0, self._row[piece].cpu(), values)
        return sums

    @torch.enable_grad()
    def gradient(self, stream: Tensor) -> Tensor:
        """d metric / d stream `[batch, tokens, hidden]`, in its dtype."""
        gradient = torch.zeros_like(stream)
        for piece in self._pieces():
            states = self._at(stream, piece).detach().requires_grad_()
            of_states = torch.autograd.grad(self._values(states, piece).sum(), states)
            gradient[self._row[piece], self._column[piece]] = of_states[0]
        return gradient

    def _pieces(self) -> Sequence[Tensor]:
        return torch.arange(len(self._row), device=self._row.device).split(CHUNK)

    def _at(self, stream: Tensor, piece: Tensor) -> Tensor:
        return stream[self._row[piece], self._column[piece]]

    def _values(self, states: Tensor, piece: Tensor) -> Tensor:
        logits = wide(self._lens.logits(states))
        if self.name == "logit_difference":
            both = torch.stack([self._y[piece], self._y_base[piece]], dim=1)
            return logits.gather(1, both) @ logits.new_tensor([1.0, -1.0])
        assert self._steered is not None
        log_p, log_p_base = (
            torch.log_softmax(wide(self._lens(self._at(side, piece))), -1) for side in (self._steered, self._base)
        )
        p, p_base = log_p.exp(), log_p_base.exp()
        constant = (p_base * log_p_base).sum(-1) - (p * log_p).sum(-1)
        return constant - ((p_base - p) * torch.log_softmax(logits, -1)).sum(-1)
