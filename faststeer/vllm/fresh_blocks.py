"""Zeroing of blocks of keys and values before another request gets them (see `isolation`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FreshBlocks:
    """Zeroes blocks in a worker's caches, on the device's stream: behind what wrote them, before what reads them.

    Args:
        runner: the worker's model runner; its caches are looked up at the first call.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._zero: Any = None

    def zero(self, blocks: list[int]) -> None:
        """Zero these blocks in all layers."""
        if blocks:
            if self._zero is None:
                self._zero = self._by_kernel() or self._by_index()
            self._zero(blocks)

    def _by_kernel(self) -> Any:
        """vLLM's own kernel, one launch for all layers; None where there is none for the device."""
        if self._runner.device.type != "cuda" or not hasattr(self._runner, "_init_kv_zero_meta"):
            return None
        self._runner._init_kv_zero_meta()
        zeroer = getattr(self._runner, "kv_block_zeroer", None) or self._runner._kv_block_zeroer
        return zeroer.zero_block_ids

    def _by_index(self) -> Any:
        """An indexed fill per cache. A cache that holds a block in several pieces has them side by side."""
        n_blocks = self._runner.kv_cache_config.num_blocks
        caches: dict[int, Tensor] = {}
        for layer in self._runner.compilation_config.static_forward_context.values():
            cache = getattr(layer, "kv_cache", None)
            cache = cache[0] if isinstance(cache, list | tuple) and len(cache) else cache
            if isinstance(cache, Tensor) and cache.numel():
                caches[cache.data_ptr()] = cache

        # Up to vLLM 0.25 a cache may begin with keys and values, [2, blocks, ...].
        views = [(cache, 0 if cache.shape[0] % n_blocks == 0 else 1) for cache in caches.values()]

        @torch.inference_mode()
        def zero(blocks: list[int]) -> None:
            ids = torch.tensor(blocks, dtype=torch.long)
            for cache, dim in views:
                pieces = cache.shape[dim] // n_blocks
                every = (ids[:, None] * pieces + torch.arange(pieces)).flatten()
                cache.index_fill_(dim, every.to(cache.device), 0)

        return zero
