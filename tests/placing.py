"""The device tables of an op, as tests write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from faststeer.ops.tables import N_FIELDS, Field

PLACES = ("slot", "position", "sequence")


def placed(slot: Any, position: Any = 0, sequence: Any = 0) -> Tensor:
    """`[3, n]` int32 of each row's slot, position and sequence; a number stands for all rows."""
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(t).int() for t in (slot, position, sequence))))


def moved(rows: Tensor, **changes: Any) -> Tensor:
    """A copy of `rows` with another slot, position or sequence."""
    rows = rows.clone()
    for name, numbers in changes.items():
        rows[PLACES.index(name)] = torch.as_tensor(numbers)
    return rows


def entries_of(fields: Sequence[Sequence[int]], numbers: Sequence[Sequence[float]]) -> Tensor:
    """`[n, 16]` int32 of each entry's integers, by `Field`, and its numbers (a, b, threshold)."""
    entries = torch.zeros(len(fields), N_FIELDS, dtype=torch.int32)
    for row, (integers, floats) in enumerate(zip(fields, numbers, strict=True)):
        entries[row, : Field.A] = torch.tensor(integers, dtype=torch.int32)[: Field.A]
        entries.view(torch.float32)[row, Field.A : Field.THRESHOLD + 1] = torch.tensor(floats)
    return entries


def numbers_of(entries: Tensor) -> Tensor:
    """The same memory as fp32, for the columns from `Field.A` on."""
    return entries.view(torch.float32)
