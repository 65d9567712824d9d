"""The tokens that all prompts of a set begin with, such as a chat template's system text, run once for all of them.

The pass over the common tokens leaves their keys and values in a cache; every batch continues a copy of it. The result
is that of whole prompts up to rounding. A model for which this does not hold is run on whole prompts: the cache's kind
decides at once, and a comparison of two prompts both ways decides the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.attach import is_steered
from faststeer.hf.batching import forward_arguments, model_device, pad
from faststeer.hf.cache import cache_argument, cache_in
from faststeer.hf.hooks import read

# Sharing is tried where it saves at least this part of the tokens, the comparison and its two prompts included.
LEAST_SAVING = 0.2


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that all prompts begin with, run once; without any, prompts are run whole.

    Args:
        model, pad_id: what runs the prompts, and what their rows are filled with.
        layers: keys and values of the tokens by layer, each `[1 or rows, heads, tokens, head size]`: one row for all
            prompts, or a row for each.
    """

    model: Any
    pad_id: int
    tokens: Sequence[int] = ()
    layers: Sequence[tuple[Tensor, Tensor]] = ()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rows(self, numbers: Sequence[int]) -> Prefix:
        """Return the prefix with a row for each of the numbers: the row of this number, or the one row of all."""
        return replace(self, layers=[(k, v) if len(k) == 1 else (k[numbers], v[numbers]) for k, v in self.layers])

    def arguments(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the keyword arguments of a forward pass over whole prompts `rows` that computes no common token.

        The rest of each row is padded on the left, between the common tokens and its own; position ids count real
        tokens alone.
        """
        batch = pad([row[self.length :] for row in rows], self.pad_id, model_device(self.model))
        batch["position_ids"] += self.length
        batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (self.length, 0), value=1)
        arguments = forward_arguments(self.model, batch)
        if not self.layers:
            return arguments
        n = len(rows)
        cache = DynamicCache([(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in self.layers])
        return arguments | {"use_cache": True, cache_argument(self.model): cache}


@torch.no_grad()
def common_prefix(model: Any, rows: Sequence[Sequence[int]], own: int, pad_id: int) -> Prefix:
    """Return the prefix that all `rows` share, or the empty one where it saves little, changes what the model gives, or
    the model is steered: then positions count from the end of prompts, which whole ones show.

    `resid_post` of the shortest and of the longest prompt, in one batch, must be the same with and without sharing, up
    to `rounding_bound`. The last `own` tokens of each prompt, which are read, are left to its own pass.
    """
    whole, length = Prefix(model, pad_id), common_length(rows, own)
    ends = [min(rows, key=len), max(rows, key=len)]
    # The common tokens once, and two prompts twice.
    saved = length * (len(rows) - 1) - sum(map(len, ends)) - sum(len(row) - length for row in ends)
    if saved < LEAST_SAVING * sum(map(len, rows)) or is_steered(model):
        return whole
    known = inspect.signature(model.forward).parameters
    if not isinstance(model, PreTrainedModel) or not {"use_cache", cache_argument(model)} <= set(known):
        return whole
    tokens, points = rows[0][:length], find_hook_points(model)
    prefix = replace(
        whole, tokens=tokens, layers=keys_and_values(cache_in(model(**whole.arguments([tokens]) | {"use_cache": True})))
    )
    if len(prefix.layers) != points.n_layers:
        return whole
    readable = [layer for layer in range(points.n_layers) if points.has("resid_post", layer)]
    with read(model, "resid_post", readable, list(range(-own, 0))) as residuals:
        model(**whole.arguments(ends))
        expected = dict(residuals)
        model(**prefix.arguments(ends))
    alike = all(near(residuals[layer], expected[layer], rounding_bound(model.dtype, layer)) for layer in readable)
    return prefix if alike else whole


def keys_and_values(cache: Any, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values in a cache by layer, from layer `first` on; none where one keeps anything else, such as a window
    or a state."""
    layers = cache.layers[first:] if isinstance(cache, DynamicCache) else []
    plain = [
        (layer.keys, layer.values)
        for layer in layers
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
    ]
    return plain if len(plain) == len(layers) else []


def near(ours: Tensor, reference: Tensor, bound: float) -> bool:
    """Return whether each row is within `bound` times the norm of its reference."""
    ours, reference = ours.double(), reference.double()
    return bool(((ours - reference).norm(dim=-1) <= bound * reference.norm(dim=-1)).all())


def rounding_bound(dtype: torch.dtype, layer: int) -> float:
    """Return how far two correct results may be apart behind layer `layer`, as a part of the row's norm.

    c eps sqrt(2 (layer + 1)): the roundings of two branches a layer add up like a random walk. c = 4 in 16 bits, where
    products accumulate in fp32 and a branch rounds about eight times by 0.3 eps, in both results; c = 16 where the
    products themselves accumulate in the model's dtype.
    """
    c = 4 if torch.finfo(dtype).bits == 16 else 16
    return c * torch.finfo(dtype).eps * (2 * (layer + 1)) ** 0.5


def common_length(rows: Sequence[Sequence[int]], own: int) -> int:
    """Return how many tokens all rows begin with, at least `own` tokens of each left out."""
    ordered = sorted(list(row) for row in rows)
    pairs = zip(ordered[0], ordered[-1], strict=False)  # the first and the last in order differ where any two do
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(0, min(common, min(map(len, rows)) - own))
