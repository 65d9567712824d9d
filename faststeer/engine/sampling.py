"""The next token of every row, on the device, each row by its own temperature, top-k, top-p and seed.

A row's n-th token is drawn with a number that is a hash of (seed, n) alone, so that a request's samples do not depend
on the rows around it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Mode(IntEnum):
    """The least that serves every row of a batch."""

    GREEDY = 0
    TEMPERATURE = 1
    FILTER = 2  # some row has top-k or top-p: sorts the vocabulary


class Sampling(NamedTuple):
    """`[rows]` each: temperature fp32 (0: greedy), top_k int64 (0: off), top_p fp32 (1: off), seed int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor


def choose(logits: Tensor, sampling: Sampling, count: Tensor, mode: Mode) -> Tensor:
    """Return `[rows]` int64, the token of each row; -1 where the logits `[rows, vocabulary]` hold NaN or infinity.

    In the order of Hugging Face's generate: logits / temperature; the k largest; of those the fewest that hold
    top_p of the probability; one draw by inverting the cumulative distribution. `count` `[rows]` is how many tokens
    each row has drawn before.
    """
    best, token = top(logits)
    if mode != Mode.GREEDY:
        drawn = _draw(logits, best, sampling, count, mode)
        token = torch.where(sampling.temperature > 0, drawn, token)
    return torch.where(best.isfinite(), token, -1)


def top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and its place, the first of equals; NaN where there is one."""
    # NumPy's is vectorised: torch's takes 20 times as long, [64, 1383] fp32.
    token = torch.from_numpy(logits.float().numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)
    return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1), token


def _draw(logits: Tensor, best: Tensor, sampling: Sampling, count: Tensor, mode: Mode) -> Tensor:
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)
    # The largest is subtracted first: a tiny temperature must not overflow.
    scaled = (logits.float() - best.float().unsqueeze(-1)) / temperature.unsqueeze(-1)
    if mode == Mode.FILTER:
        scaled = scaled.masked_fill(~_kept(scaled, sampling), -torch.inf)
    # In the vocabulary's order whatever the mode: a row without filters draws the same beside one that has some.
    cumulative = scaled.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding: a token behind the last likely one has no probability.
    point = (uniform(sampling.seed, count).unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).clamp(max=scaled.shape[-1] - 1).squeeze(-1)


def _kept(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens top-k and, of those, top-p leave."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    size = torch.where(sampling.top_k > 0, sampling.top_k, scaled.shape[-1]).unsqueeze(-1)
    share = ordered.masked_fill(rank >= size, -torch.inf).softmax(-1)
    before = share.cumsum(-1) - share
    off = sampling.top_p.unsqueeze(-1) >= 1
    mask = (rank < size) & (off | (before < sampling.top_p.unsqueeze(-1)) | (rank == 0))
    return torch.zeros_like(mask).scatter_(-1, order, mask)


def uniform(seed: Tensor, count: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, count), fp32: SplitMix64's output function (Steele, Lea and Flood, 2014),
    over the count and then over the seed."""
    mixed = _mix(_mix(count.to(torch.int64)) ^ seed)
    return ((mixed >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
