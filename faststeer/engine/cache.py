"""Keys and values of many sequences of different lengths: each row's own tokens, at the columns 0, 1, ... of its row.

No row is padded for another: a decode step reads as many columns as the longest live row has, and each row writes at
its own length. Nothing here knows about plans or sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCache(Cache):
    """A static cache of `rows` sequences of up to `length` tokens.

    `prefill(rows)` or `decode(column, width)` says, before a forward pass, where that pass writes.
    """

    def __init__(self, n_layers: int, rows: int, length: int) -> None:
        super().__init__(layers=[_RowLayer(self) for _ in range(n_layers)])
        self.rows, self.length = rows, length
        self._stores: list[Tensor] = []  # keys and values of all layers, `[layers, rows, heads, length, head_dim]`
        self._prompts: range | None = None
        self._prefix, self._source = 0, 0
        self.column, self._width = torch.empty(0), 0
        self._flat: dict[int, Tensor] = {}  # heads -> where a step writes, in rows of head_dim numbers

    def allocate(self, layer: _RowLayer, *like: Tensor) -> list[Tensor]:
        """Zeros for a layer's keys and values, in one tensor with those of the other layers: where all of them are
        alike, a row moves in two copies."""
        shapes = [(self.rows, t.shape[1], self.length, t.shape[3]) for t in like]
        begun: list[Any] = [other for other in self.layers if other.is_initialized]  # type: ignore[union-attr]
        if not begun:
            self._stores = [t.new_zeros(len(self.layers), *shape) for t, shape in zip(like, shapes, strict=True)]
        if [store.shape[1:] for store in self._stores] == shapes and self._stores[0].dtype == like[0].dtype:
            return [store[self.layers.index(layer)] for store in self._stores]
        for other in begun if self._stores else ():
            other.keys, other.values = other.keys.clone(), other.values.clone()
        self._stores = []
        return [t.new_zeros(shape) for t, shape in zip(like, shapes, strict=True)]

    def prefill(self, first: int, count: int, prefix: int = 0, source: int = 0) -> None:
        """The next pass reads prompts, into `count` rows from `first` on; their first `prefix` tokens are those of the
        row `source`, and are copied from there instead."""
        self._prompts, self._prefix, self._source = range(first, first + count), prefix, source

    def decode(self, column: Tensor, width: int) -> None:
        """The next pass reads one token for each of the first `len(column)` rows, writes it at that row's `column`
        and looks at the first `width` columns."""
        self._prompts, self.column, self._width = None, column, width
        self._flat.clear()

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys that a prefill has written."""
        keys = self.layers[0].keys  # type: ignore[union-attr]
        assert keys is not None
        return keys.dtype

    def write(self, layer: _RowLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep `[batch, heads, tokens, head_dim]`; return what the pass attends to."""
        if layer.keys is None or layer.values is None:
            layer.lazy_initialization(keys, values)
            assert layer.keys is not None and layer.values is not None
        if self._prompts is not None:
            keys, values = (self._behind_prefix(*each) for each in ((layer.keys, keys), (layer.values, values)))
            for store, new in ((layer.keys, keys), (layer.values, values)):
                store[self._prompts.start : self._prompts.stop, :, : new.shape[2]] = new
            return keys, values
        n, heads = keys.shape[:2]
        if heads not in self._flat:
            first = torch.arange(0, n * heads * self.length, self.length, device=keys.device).view(n, heads)
            self._flat[heads] = (first + self.column.unsqueeze(1)).view(-1)
        for store, new in ((layer.keys, keys), (layer.values, values)):
            store.view(-1, store.shape[3]).index_copy_(0, self._flat[heads], new.reshape(-1, store.shape[3]))
        return layer.keys[:n, :, : self._width], layer.values[:n, :, : self._width]

    def _behind_prefix(self, store: Tensor, new: Tensor) -> Tensor:
        if not self._prefix:
            return new
        prefix = store[self._source, :, : self._prefix].expand(new.shape[0], -1, -1, -1)
        return torch.cat([prefix, new], dim=2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row to another."""
        for store in self._stores:
            store[:, target, :, :length] = store[:, source, :, :length]
        apart: list[Any] = [] if self._stores else self.layers
        for layer in apart:
            for store in (layer.keys, layer.values):
                store[target, :, :length] = store[source, :, :length]

    def wipe(self, lengths: Tensor) -> None:
        """Zeros behind the first `lengths` columns of each row."""
        behind = torch.arange(self.length, device=lengths.device) >= lengths.unsqueeze(1)
        for layer in self.layers:
            for store in (layer.keys, layer.values):  # type: ignore[union-attr]
                store.masked_fill_(behind[:, None, :, None], 0)  # type: ignore[union-attr]


class FrozenCache(RowCache):
    """For `hf.freeze(..., "qk")`, whose passes have every row twice, unsteered and steered: the unsteered keys, and
    [V_base || V_steered] side by side, so that a step reads both values in one attention pass, with no copies."""

    def write(self, layer: _RowLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        base, steered = values.chunk(2)
        return super().write(layer, keys[: len(base)], torch.cat([base, steered], dim=-1))


class _RowLayer(CacheLayerMixin):
    """One layer's share; allocated when its first keys show their shape, dtype and device."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._cache.allocate(self, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.write(self, key_states, value_states)

    # What transformers asks for when it makes the causal mask of a prompt: decode steps bring theirs.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache._prefix + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache._prefix

    def get_max_length(self) -> int:
        return self._cache.length
