"""Compiles the kernels before they are needed, so that serving never waits for a compiler and a graph capture never
meets one."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from faststeer.kernels.residual import add_steer, add_steer_rmsnorm, latch_, steer, steer_, steer_pair_
from faststeer.ops.tables import N_FIELDS, N_PLACES

OPERATORS = ("steer", "steer_", "add_steer", "steer_pair_", "add_steer_rmsnorm", "latch_")


def warmup(
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    weight_dtype: torch.dtype | None = None,
    operators: Collection[str] = OPERATORS,
) -> None:
    """Compile and load all that these operators will ever launch on `device` for rows of this size and dtype.

    A kernel is compiled per hidden size, dtype, operator (`add_steer_rmsnorm`: per weight dtype and `fp32_weight`;
    `latch_`: with and without residual) and per answer to one question: do all rows start at multiples of 16 bytes?
    Nothing else that may change between calls (rows, strides, table sizes, addresses, numbers) makes another variant.

    Args:
        hidden: columns of x.
        dtype: of x.
        device: where to.
        weight_dtype: of the norm's weight; default: dtype.
        operators: which.
    """
    for start in (0, 1) if hidden * dtype.itemsize % 16 == 0 else (1,):  # elements from a 16-byte boundary

        def one_row(start: int = start) -> Tensor:
            return torch.zeros(hidden + start, dtype=dtype, device=device)[start:].unsqueeze(0)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        bank, gates = torch.zeros(1, hidden, device=device), torch.zeros(1, 1, dtype=torch.bool, device=device)
        tables = bank, integers(1, N_FIELDS), integers(1, 2), integers(N_PLACES, 1) - 1, gates  # nothing acts
        if "steer" in operators:
            steer(one_row(), *tables, None, 0)
        if "steer_" in operators:
            steer_(one_row(), *tables, None)
        if "add_steer" in operators:
            add_steer(one_row(), one_row(), *tables, None, 0)
        if "steer_pair_" in operators:
            steer_pair_(one_row(), one_row(), *tables, None)
        if "add_steer_rmsnorm" in operators:
            weight = torch.ones(hidden, dtype=weight_dtype or dtype, device=device)
            for fp32_weight in (False, True):
                add_steer_rmsnorm(one_row(), one_row(), weight, 1e-6, 0.0, fp32_weight, *tables, None, 0)
        if "latch_" in operators:
            latch_(one_row(), None, *tables)
            latch_(one_row(), one_row(), *tables)
