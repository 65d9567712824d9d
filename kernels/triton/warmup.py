"""Compiles the kernels before they are needed, so that serving never waits for a compiler and a graph capture never
meets one."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch

from faststeer.kernels import residual
from faststeer.ops.schema import ARGUMENTS
from faststeer.ops.tables import N_FIELDS, N_PLACES


def warmup(
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    operators: Collection[str] = tuple(ARGUMENTS),
) -> None:
    """Compile and load all that these operators will ever launch on `device` for rows of this size and dtype.

    A kernel is compiled per hidden size, dtype, operator (`add_steer_rmsnorm`: per `fp32_weight` and weight dtype, here
    that of the rows; `latch_`: with and without residual) and per answer to one question: do all rows start at
    multiples of 16 bytes?
    Nothing else that may change between calls (rows, strides, table sizes, addresses, numbers) makes another variant.

    Args:
        hidden: columns of x.
        dtype: of x.
        device: where to.
        operators: which.
    """
    integers = functools.partial(torch.zeros, dtype=torch.int32, device=device)
    shared: dict[str, Any] = {
        "weight": torch.ones(hidden, dtype=dtype, device=device),
        "bank": torch.zeros(1, hidden, device=device),
        "entries": integers(1, N_FIELDS),
        "ranges": integers(1, 2),
        "rows": integers(N_PLACES, 1) - 1,  # nothing acts
        "gate_state": torch.zeros(1, 1, dtype=torch.bool, device=device),
        **{"eps": 1e-6, "weight_offset": 0.0, "scalars": None, "columns": 0, "probe": None},
    }
    for start in (0, 1) if hidden * dtype.itemsize % 16 == 0 else (1,):  # elements from a 16-byte boundary
        x, other = (torch.zeros(hidden + start, dtype=dtype, device=device)[start:].unsqueeze(0) for _ in range(2))
        for op in operators:
            names = ARGUMENTS[op]
            for fp32_weight in (False, True) if "fp32_weight" in names else (False,):
                for second in (other, None) if op == "latch_" else (other,):
                    arguments = shared | {"x": x, "residual": second, "fp32_weight": fp32_weight}
                    getattr(residual, op)(*(arguments[name] for name in names))
