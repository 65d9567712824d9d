"""`latch_`: decides the latched gates of a site, at the rows that are the last of their prompts, before the steering op
of the site runs. docs/kernels.md is the specification.

Run so far in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100; no GPU has run it yet. What it cannot do:
see row.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from faststeer.kernels.launch import DEVICES, Launch, on_device_of, starts
from faststeer.kernels.row import entries_of, gate_cell, gate_verdict, load_row, read_entry
from faststeer.ops.schema import implements
from faststeer.ops.tables import N_SCALARS, GateMode, Kind, Scalar

_VARYING = ["x_stride", "residual_stride", "n_vectors", "n_entries", "n_slots", "n_gates", "n_sequences"]
_POINTERS = [
    *("x", "residual", "bank", "fields", "scalars", "ranges"),
    *("row_slot", "row_position", "row_sequence", "gate_state"),
]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_POINTERS)
def latch_kernel(
    x,
    residual,
    bank,
    fields,
    scalars,
    ranges,
    row_slot,
    row_position,
    row_sequence,
    gate_state,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    n_vectors: tl.int32,
    n_entries: tl.int32,
    n_slots: tl.int32,
    n_gates: tl.int32,
    n_sequences: tl.int32,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALARS: tl.constexpr = N_SCALARS,
    THRESHOLD: tl.constexpr = int(Scalar.THRESHOLD),
    LATCH: tl.constexpr = int(Kind.LATCH),
    NONE: tl.constexpr = int(GateMode.NONE),
    LATCHED: tl.constexpr = int(GateMode.LATCHED),
):
    """One row.

    1. Is it the last of a prompt, and has its slot entries? Else done, without having read it.
    2. s = x, or x + residual rounded to the dtype.
    3. Every valid LATCH entry writes its gate's verdict on s to the cell of its gate and the row's sequence. A gate
       without a direction decides nothing: closed.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    first, end = entries_of(row, row_slot, ranges, n_slots, n_entries)
    if (tl.load(row_position + row) != -1) | (first >= end):
        return
    sequence = tl.load(row_sequence + row).to(tl.int64)
    s = load_row(x, row, x_stride, columns, HIDDEN, ALIGNED, "evict_first")
    if residual is not None:
        r = load_row(residual, row, residual_stride, columns, HIDDEN, ALIGNED, "evict_first")
        s = (s.to(tl.float32) + r.to(tl.float32)).to(s.dtype)
    h = s.to(tl.float32)
    for entry in range(first, end):
        valid, kind, _vector, _count, mode, gate_vector = read_entry(fields, entry, n_vectors)
        if valid & (kind == LATCH):
            verdict = first < 0  # False, as a scalar of the program
            if (mode != NONE) & (mode != LATCHED):
                threshold = tl.load(scalars + entry * SCALARS + THRESHOLD)
                verdict = gate_verdict(h, columns, bank, gate_vector, mode, threshold, HIDDEN, ALIGNED)
            cell, exists = gate_cell(fields, entry, sequence, n_gates, n_sequences)
            tl.store(gate_state + cell, verdict, mask=exists)


@implements("latch_.triton", *DEVICES)
def latch_(x: Tensor, residual: Tensor | None, *tables: Tensor) -> None:
    """Write to `gate_state` `[n_gates, n_sequences]` what the LATCH entries say of the rows at position -1 of x, or of
    x + residual."""
    rows, size = x.shape
    bank, fields, scalars, ranges, row_slot, row_position, row_sequence, gate_state = tables
    if rows == 0:
        return
    bits = starts(x, bank) | size * x.element_size()
    if residual is not None:
        bits |= starts(residual)
    is_aligned = bits % 16 == 0
    how = Launch.of(size, x.element_size(), is_aligned)
    with on_device_of(x):
        latch_kernel[(rows,)](
            x,
            residual,
            bank,
            fields,
            scalars,
            ranges,
            row_slot,
            row_position,
            row_sequence,
            gate_state,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            bank.shape[0],
            fields.shape[0],
            ranges.shape[0],
            gate_state.shape[0],
            gate_state.shape[1],
            HIDDEN=size,
            BLOCK=how.block,
            ALIGNED=is_aligned,
            num_warps=how.num_warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
