"""All operators: one kernel, in which an operand that an operator does not have is None and its code is not there. What
each computes, to the bit where bits are promised: docs/kernels.md.

Each launch has one program per row, and the number of threads depends on the hidden size alone: a row comes out with
the same bits whatever the batch around it.

Run so far in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100; no GPU has run it yet. What it cannot do:
see row.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from faststeer.kernels.launch import DEVICES, Launch, no_gates, on_device_of, starts
from faststeer.kernels.row import _INTERPRETED, entries_of, latch_row, load_row, steer_row, store_row, widen
from faststeer.ops.schema import implements

_VARYING = [
    *("x_stride", "residual_stride", "place_stride", "zero", "n_vectors", "n_entries", "n_slots", "n_gates"),
    *("n_sequences", "n_columns"),
]
_POINTERS = ["x", "residual", "weight", "normed", "hidden", "probe", "bank", "entries", "ranges", "rows", "gate_state"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_POINTERS)
def residual_kernel(
    x,
    residual,
    weight,
    normed,
    hidden,
    probe,
    bank,
    entries,
    ranges,
    rows,
    gate_state,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    place_stride: tl.int64,
    zero: tl.int64,
    n_vectors: tl.int32,
    n_entries: tl.int32,
    n_slots: tl.int32,
    n_gates: tl.int32,
    n_sequences: tl.int32,
    n_columns: tl.int32,
    eps: tl.float32,
    weight_offset: tl.float32,
    FP32_WEIGHT: tl.constexpr,
    EARLY_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LATCHES: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr = _INTERPRETED,
):
    """One row.

    1. Which entries does the row's slot have? In place, none: done, without having read the row. So too where gates are
       to be decided (LATCHES, in place) and the row is not the last of its prompt.
    2. s = x, or x + residual rounded to the dtype.
    3. The entries act on s in fp32 (`steer_row`); the result is rounded once. LATCHES: they decide their gates on it
       (`latch_row`), and that is all.
    4. Write hidden; in place only if something acted: into residual, and zeros into x.
    5. With a weight: n = hidden * rsqrt(mean(hidden^2) + eps); normed is n, rounded, times the weight, rounded; or
       (FP32_WEIGHT) n times the weight, rounded once.

    `zero` is 0, which the compiler does not know: addresses of a pair that are made with it are computed where they are
    needed, and wait in no registers beside the row. (Without it 8 bytes per thread do not fit into them at 4,096
    columns on sm_80, and 40 at 8,192; there 8 with it.)
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if IN_PLACE:
        first, end = entries_of(row, rows, ranges, n_slots, n_entries)
        if first >= end:
            return
        if LATCHES:
            if tl.load(rows + place_stride + row) != -1:
                return
        else:  # its caller's probe may hold what an earlier pass has seen
            for column in range(0, n_columns):
                tl.store(probe + (row - zero) * n_columns + column, 0.0)
    s = load_row(x, row, x_stride, columns, HIDDEN, ALIGNED, "evict_first")
    if residual is not None:
        r = load_row(residual, row, residual_stride, columns, HIDDEN, ALIGNED, "evict_first")
        s = (s.to(tl.float32) + r.to(tl.float32)).to(s.dtype)
    if EARLY_WEIGHT:  # before the reductions, so that nothing waits for it after them
        w = load_row(weight, 0, HIDDEN, columns, HIDDEN, ALIGNED, "evict_last")
    if not IN_PLACE:
        if not INTERPRETED:
            tl.debug_barrier()  # ptxas would have the loads of the row wait for the slot
        first, end = entries_of(row, rows, ranges, n_slots, n_entries)

    if LATCHES:
        latch_row(
            widen(s), columns, row, first, end, bank, entries, rows, gate_state, place_stride, n_vectors, n_gates,
            n_sequences, HIDDEN, ALIGNED,
        )  # fmt: skip
    else:
        h, touched = s.to(tl.float32), first < 0  # False, as a scalar of the program
        if first < end:
            h, touched = steer_row(
                widen(s), columns, row, first, end, bank, entries, rows, gate_state, probe, place_stride, n_vectors,
                n_gates, n_sequences, n_columns, HIDDEN, ALIGNED,
            )  # fmt: skip
        g = h.to(x.dtype.element_ty)
        if IN_PLACE:
            if touched:
                store_row(residual, row + zero, residual_stride, columns, g, HIDDEN, ALIGNED)
                store_row(x, row + zero, x_stride, columns, tl.zeros_like(g), HIDDEN, ALIGNED)
        elif residual is None:
            if touched:
                store_row(hidden, row, HIDDEN, columns, g, HIDDEN, ALIGNED)
            else:  # not g: the way through fp32 and back loses the payload of a NaN
                s = load_row(x, row, x_stride, columns, HIDDEN, ALIGNED, "evict_first")
                store_row(hidden, row, HIDDEN, columns, s, HIDDEN, ALIGNED)
        else:  # the addition has rounded already: g has the bits of s where nothing acted
            store_row(hidden, row, HIDDEN, columns, g, HIDDEN, ALIGNED)

    if weight is not None:
        if not EARLY_WEIGHT:
            w = load_row(weight, 0, HIDDEN, columns, HIDDEN, ALIGNED, "evict_last")
        n = g.to(tl.float32)
        n = n * tl.rsqrt(tl.sum(n * n) / HIDDEN + eps)
        if FP32_WEIGHT:  # noqa: SIM108
            n = n * (weight_offset + w.to(tl.float32))
        else:
            n = n.to(g.dtype).to(tl.float32) * w.to(tl.float32)
        store_row(normed, row, HIDDEN, columns, n.to(g.dtype), HIDDEN, ALIGNED)


# The arguments of the schemas (faststeer/ops/schema.py), of which the five tables are handed on as they come.
# `scalars` are for gradients alone: their numbers are those of `entries`.


@implements("steer.triton", *DEVICES)
def steer(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`(hidden, probe)`: x `[rows, hidden]` after the entries of each row's slot, and what they probed `[rows,
    columns]` fp32."""
    *tables, _scalars, columns = rest
    hidden, probe = x.new_empty(x.shape), x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    _launch(x, None, None, None, hidden, probe, tables)
    return hidden, probe


@implements("add_steer.triton", *DEVICES)
def add_steer(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`steer` of x + residual."""
    *tables, _scalars, columns = rest
    hidden, probe = x.new_empty(x.shape), x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    _launch(x, residual, None, None, hidden, probe, tables)
    return hidden, probe


@implements("steer_pair_.triton", *DEVICES)
def steer_pair_(x: Tensor, residual: Tensor, *rest: Any) -> None:
    """The pair (x, residual) in place: (0, `add_steer` of it) where something acts; other rows are left alone."""
    *tables, probe = rest
    _launch(x, residual, None, None, None, probe, tables)


@implements("add_steer_rmsnorm.triton", *DEVICES)
def add_steer_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float, fp32_weight: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`(normed, hidden, probe)`: `add_steer`, and the RMSNorm of its result."""
    *tables, _scalars, columns = rest
    normed, hidden = x.new_empty(x.shape), x.new_empty(x.shape)
    probe = x.new_zeros(x.shape[0], columns, dtype=torch.float32)
    _launch(x, residual, weight, normed, hidden, probe, tables, float(eps), float(weight_offset), bool(fp32_weight))
    return normed, hidden, probe


@implements("latch_.triton", *DEVICES)
def latch_(x: Tensor, residual: Tensor | None, *tables: Tensor) -> None:
    """Write to `gate_state` `[n_gates, n_sequences]` what the LATCH entries say of the rows at position -1 of x, or of
    x + residual."""
    _launch(x, residual, None, None, None, None, tables, latches=True)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    normed: Tensor | None,
    hidden: Tensor | None,
    probe: Tensor | None,
    tables: Sequence[Any],
    eps: float = 0.0,
    weight_offset: float = 0.0,
    fp32_weight: bool = False,
    latches: bool = False,
) -> None:
    """One program per row; in place where there is no `hidden`."""
    n_rows, size = x.shape
    if n_rows == 0:
        return
    bank, entries, ranges, rows, gate_state = tables
    bits = starts(x, bank) | size * x.element_size()
    if residual is not None:
        bits |= starts(residual)
    if weight is not None:
        bits |= weight.data_ptr()
    n_gates, n_sequences = (0, 0) if gate_state is None else gate_state.shape
    is_aligned = bits % 16 == 0
    how = Launch.of(size, x.element_size(), is_aligned, 0 if weight is None else weight.element_size())
    with on_device_of(x):
        residual_kernel[(n_rows,)](
            x,
            residual,
            weight,
            normed,
            hidden,
            bank if probe is None else probe,  # with 0 columns nothing is written
            bank,
            entries,
            ranges,
            rows,
            no_gates(x.device) if gate_state is None else gate_state,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            rows.stride(0),
            0,
            len(bank),
            len(entries),
            len(ranges),
            n_gates,
            n_sequences,
            0 if probe is None else probe.shape[1],
            eps,
            weight_offset,
            FP32_WEIGHT=fp32_weight,
            EARLY_WEIGHT=how.early_weight,
            IN_PLACE=hidden is None,
            LATCHES=latches,
            HIDDEN=size,
            BLOCK=how.block,
            ALIGNED=is_aligned,
            num_warps=how.num_warps,
            num_stages=1,
            maxnreg=how.registers,
            enable_fp_fusion=False,  # a product is rounded before it is added
        )
