"""Batches that fit into memory: as large as asked for, halved when they do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from faststeer.hf.batching import batches
from faststeer.progress import progress_bar

T = TypeVar("T")


def in_batches(
    lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], T], what: str, progress: bool
) -> Iterator[tuple[list[int], T]]:
    """Yield (indices, run(indices)) over 0..len(lengths) - 1 in batches of similar length, longest first.

    A batch that does not fit into memory is run again in halves, and so are all after it; a UserWarning says so.

    Raises:
        ValueError: a batch size below 1. torch.OutOfMemoryError (RuntimeError on a CPU): one row alone does not fit.
    """
    pending = batches(lengths, batch_size)
    with progress_bar(what, len(lengths), progress) as advance:
        while pending:
            group = pending.pop(0)
            try:
                result = run(group)
            except RuntimeError as error:
                # An allocation that failed, on a GPU or the CPU.
                failed = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
                if len(group) == 1 or not failed:
                    raise
            else:
                yield group, result
                for _ in group:
                    advance()
                continue
            # Behind the except block, whose traceback would hold on to what has to be freed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = (len(group) + 1) // 2
            warnings.warn(f"{what}: {len(group)} rows do not fit into memory, going on with {size}", stacklevel=3)
            pending = [each[i : i + size] for each in [group, *pending] for i in range(0, len(each), size)]


def rows_in_batches(
    lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], Iterable[T]], what: str, progress: bool
) -> list[T]:
    """Return what `run` gives of each row, in the order of the rows. Args and errors as `in_batches`."""
    by_row: dict[int, T] = {}
    for group, values in in_batches(lengths, batch_size, run, what, progress):
        by_row |= zip(group, values, strict=True)
    return [by_row[index] for index in range(len(lengths))]
