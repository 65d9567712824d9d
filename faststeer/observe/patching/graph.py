"""The graph that steering acts through: which parts of a model read what others write to the residual stream.

A graph is five whole numbers; neither a model nor its weights are needed to count or to name its edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor

Kind = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True)
class Graph:
    """Senders and receivers from the layer that reads the steered stream on.

    Senders write to the residual stream: what steering adds (number 0), then of each layer its attention heads and its
    MLP. Receivers read it: of each layer the query of every head, the key and the value of every key-value head, the
    MLP; last the logits. A sender has an edge to every receiver behind it, also to the MLP of its own layer (except
    where attention and MLP run in parallel).

    With n layers, H heads, K key-value heads and s = sum over l < n of (1 + (H + 1) l) there are H s query edges, K s
    key edges, K s value edges, s + n H edges to MLPs (s in parallel) and 1 + n (H + 1) to the logits. Source: arXiv
    2604.08524.

    Args:
        start: the first layer that reads the steered stream.
        n_layers: of the model.
        heads, kv_heads: per layer.
        parallel: attention and MLP of a layer read the same stream.

    Raises:
        ValueError: no whole numbers, no layer behind the steering, heads that are no multiple of the key-value heads.
    """

    start: int
    n_layers: int
    heads: int
    kv_heads: int
    parallel: bool = False

    def __post_init__(self) -> None:
        numbers = (self.start, self.n_layers, self.heads, self.kv_heads)
        if any(type(number) is not int for number in numbers) or type(self.parallel) is not bool:
            raise ValueError(f"a graph of {numbers} and parallel={self.parallel!r}: expected whole numbers and a bool")
        if not 0 <= self.start < self.n_layers:
            raise ValueError(f"steering before layer {self.start} of {self.n_layers}: expected 0..{self.n_layers - 1}")
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads over {self.kv_heads} key-value heads: expected a multiple")

    @property
    def depth(self) -> int:
        """Layers from the steering on."""
        return self.n_layers - self.start

    @property
    def n_senders(self) -> int:
        """How many nodes write to the residual stream: the steering, every head, every MLP."""
        return 1 + self.depth * (self.heads + 1)

    @property
    def n_receivers(self) -> int:
        """How many nodes read it: queries, keys and values of every head, every MLP, the logits."""
        return self.depth * self.receivers_per_layer + 1

    @property
    def receivers_per_layer(self) -> int:
        """How many of the receivers are in one layer."""
        return self.heads + 2 * self.kv_heads + 1

    @property
    def counts(self) -> dict[Kind, int]:
        """Edges by what they enter."""
        n, heads = self.depth, self.heads
        s = n + (heads + 1) * n * (n - 1) // 2
        return {
            "q": heads * s,
            "k": self.kv_heads * s,
            "v": self.kv_heads * s,
            "mlp": s + (0 if self.parallel else n * heads),
            "logits": 1 + n * (heads + 1),
        }

    @property
    def n_edges(self) -> int:
        """How many edges there are, over all kinds of receivers."""
        return sum(self.counts.values())

    # Where things are, `i` counting layers from `start` ---------------------------------------------------------------

    def before(self, i: int) -> int:
        """How many senders come before layer i."""
        return 1 + i * (self.heads + 1)

    def before_mlp(self, i: int) -> int:
        """How many senders the MLP of layer i reads."""
        return self.before(i) + (0 if self.parallel else self.heads)

    def heads_of(self, i: int) -> slice:
        """Senders: the heads of layer i."""
        return slice(self.before(i), self.before(i) + self.heads)

    def mlp_of(self, i: int) -> int:
        """Sender: the MLP of layer i."""
        return self.before(i) + self.heads

    def readers(self, i: int, kind: Literal["q", "k", "v"] | None = None) -> slice:
        """Receivers: the queries, keys or values of layer i, or all three."""
        first, h, k = i * self.receivers_per_layer, self.heads, self.kv_heads
        low, high = {None: (0, h + 2 * k), "q": (0, h), "k": (h, h + k), "v": (h + k, h + 2 * k)}[kind]
        return slice(first + low, first + high)

    def mlp_reader(self, i: int) -> int:
        """Receiver: the MLP of layer i."""
        return (i + 1) * self.receivers_per_layer - 1

    @cached_property
    def edges(self) -> Tensor:
        """`[senders, receivers]` bool: which edges there are."""
        made = torch.zeros(self.n_senders, self.n_receivers, dtype=torch.bool)
        for i in range(self.depth):
            made[: self.before(i), self.readers(i)] = True
            made[: self.before_mlp(i), self.mlp_reader(i)] = True
        made[:, -1] = True
        return made

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names: "steering", "L12.H3", "L12.MLP"."""
        names = ["steering"]
        for layer in range(self.start, self.n_layers):
            names += [f"L{layer}.H{head}" for head in range(self.heads)]
            names.append(f"L{layer}.MLP")
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names: "L12.Q3", "L12.K1", "L12.V1" (of a key-value head), "L12.MLP", "logits"."""
        names = []
        for layer in range(self.start, self.n_layers):
            names += [f"L{layer}.Q{head}" for head in range(self.heads)]
            names += [f"L{layer}.{kind}{head}" for kind in "KV" for head in range(self.kv_heads)]
            names.append(f"L{layer}.MLP")
        return (*names, "logits")

    def kind(self, receiver: int) -> Kind:
        """What a receiver is: "q", "k", "v", "mlp" or "logits"."""
        part = self.receivers[receiver].rpartition(".")[2].lower()  # "q3", "mlp", "logits"
        return cast(Kind, part if part in ("mlp", "logits") else part[0])

    @cached_property
    def passes_on(self) -> Tensor:
        """`[receivers, senders]` bool: which senders a receiver is part of. A query is one head's; a key or a value
        serves all heads of its group; the logits end the graph."""
        made = torch.zeros(self.n_receivers, self.n_senders, dtype=torch.bool)
        group = torch.arange(self.heads) // (self.heads // self.kv_heads)
        same_group = torch.arange(self.kv_heads).unsqueeze(1) == group
        for i in range(self.depth):
            made[self.readers(i, "q"), self.heads_of(i)] = torch.eye(self.heads, dtype=torch.bool)
            made[self.readers(i, "k"), self.heads_of(i)] = same_group
            made[self.readers(i, "v"), self.heads_of(i)] = same_group
            made[self.mlp_reader(i), self.mlp_of(i)] = True
        return made
