"""What a program's tables do to one row that is held in registers: the part that the kernels share.

docs/kernels.md is the specification. A row is one fp32 tensor of BLOCK elements, the next power of two of the hidden
size; elements beyond the hidden size are zero and stay zero. One program works on one row, so that every number of an
entry is a scalar of the program and every branch is uniform.

Cannot do: hidden sizes above 16,384 (the row would not fit into one program's registers); share the vectors it reads
between rows (each program reads its own, from the caches).

The numbers that name columns and kinds come by a constexpr argument's default and not as globals: Triton compares every
global that a kernel uses again at every launch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

from faststeer.ops.tables import N_FIELDS, VECTORS, EntryKind, Field, GateMode

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether the kernels run in the interpreter, on CPU tensors."""
_INTERPRETED = tl.constexpr(INTERPRETED)


class TableLayout:
    """What kernels know of the tables: names that stand for numbers."""

    field, kind, mode, n_fields, n_kinds = Field, EntryKind, GateMode, N_FIELDS, len(EntryKind)
    # Two bits for each kind: how many vectors an entry of it has, or 0 for any number.
    counts = sum(vectors << 2 * kind for kind, vectors in VECTORS.items())


LAYOUT: Any = TableLayout if INTERPRETED else tl.constexpr(TableLayout)


@triton.jit
def load_row(pointer, row, stride, columns, HIDDEN: tl.constexpr, ALIGNED: tl.constexpr, POLICY: tl.constexpr):
    """Row `row` `[BLOCK]` of a matrix, in its own dtype, zero beyond HIDDEN. ALIGNED: every row starts at a multiple of
    16 bytes, which is what 16-byte accesses need. POLICY is the L1 cache's."""
    pointers = pointer + row * stride + columns
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    if columns.shape[0] == HIDDEN:
        value = tl.load(pointers, eviction_policy=POLICY)
    else:
        value = tl.load(pointers, mask=columns < HIDDEN, other=0.0, eviction_policy=POLICY)
    return value


@triton.jit
def store_row(pointer, row, stride, columns, value, HIDDEN: tl.constexpr, ALIGNED: tl.constexpr):
    """Write `value` `[BLOCK]` to row `row` of a matrix. ALIGNED as for `load_row`."""
    pointers = pointer + row * stride + columns
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    if columns.shape[0] == HIDDEN:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=columns < HIDDEN)


@triton.jit
def load_vector(bank, vector, columns, HIDDEN: tl.constexpr, ALIGNED: tl.constexpr):
    """Row `vector` of the bank. Other rows will want it: it is the last to leave the L1 cache."""
    return load_row(bank, vector.to(tl.int64), HIDDEN, columns, HIDDEN, ALIGNED, "evict_last")


@triton.jit
def product(w, q, INTERPRETED: tl.constexpr = _INTERPRETED):
    """w q, rounded, whatever it is added to. `enable_fp_fusion=False` alone does not do: for Blackwell the products
    become `mul.rn.f32x2`, and the ptxas of CUDA 12.9 (Triton 3.6) fuses even that with a sum that follows."""
    if INTERPRETED:
        rounded = w * q
    else:
        w = tl.broadcast_to(w, q.shape)
        rounded = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [w, q], tl.float32, is_pure=True, pack=1
        )
    return rounded


@triton.jit
def entries_of(row, rows, ranges, n_slots, n_entries):
    """`first, end`: the entries of the row's slot, cut to those there are; none for a slot that does not exist."""
    slot = tl.load(rows + row)
    exists = (slot >= 0) & (slot < n_slots)
    first = tl.load(ranges + 2 * slot.to(tl.int64), mask=exists, other=0)
    count = tl.load(ranges + 2 * slot.to(tl.int64) + 1, mask=exists, other=0)
    # Nothing here can overflow, whatever the numbers.
    begin = tl.maximum(first, 0)
    return begin, begin + tl.minimum(tl.maximum(count, 0) + tl.minimum(first, 0), n_entries - begin)


@triton.jit
def below(number, end):
    """0 <= number < end, for an end that is not negative: as unsigned numbers, negative ones are the largest."""
    return tl.cast(number, tl.uint32, bitcast=True) < tl.cast(end, tl.uint32, bitcast=True)


@triton.jit
def widen(value, INTERPRETED: tl.constexpr = _INTERPRETED):
    """fp32 of a row. bf16 is the upper half of fp32: two instructions for two numbers, where Triton takes three."""
    if INTERPRETED or value.dtype != tl.bfloat16:
        wide = value.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=f,=f,r", [value], tl.float32, is_pure=True, pack=2
        )
    return wide


@triton.jit
def read_entry(entries, entry, n_vectors, IS: tl.constexpr = LAYOUT):
    """`valid, kind, vector, count, mode, gate_vector`. An entry is not valid, and to be skipped, if it is of no known
    kind or gate mode, has a number of vectors that its kind cannot have, or points outside the bank."""
    f = entries + entry * IS.n_fields
    kind, vector, count = tl.load(f + IS.field.KIND), tl.load(f + IS.field.VECTOR), tl.load(f + IS.field.COUNT)
    mode, gate_vector = tl.load(f + IS.field.GATE_MODE), tl.load(f + IS.field.GATE_VECTOR)
    valid = below(kind, IS.n_kinds) & below(count - 1, n_vectors) & below(vector, n_vectors - count + 1)
    wanted = (IS.counts >> 2 * kind) & 3
    valid &= (wanted == 0) | (wanted == count)
    looks = below(mode + IS.mode.COSINE, 2 * IS.mode.COSINE + 1) & below(gate_vector, n_vectors)
    valid &= (mode == IS.mode.NONE) | (mode == IS.mode.LATCHED) | looks
    return valid, kind, vector, count, mode, gate_vector


@triton.jit
def number(pointer):
    """An fp32 number of an entry, whose columns are int32."""
    return tl.cast(tl.load(pointer), tl.float32, bitcast=True)


@triton.jit
def gate_verdict(
    h,
    columns,
    bank,
    gate_vector,
    mode,
    threshold,
    HIDDEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS: tl.constexpr = LAYOUT,
):
    """What a dot or cosine gate says of the row: h . d, or h . d / |h|, above the threshold; or, for a negative mode,
    not above it."""
    d = load_vector(bank, gate_vector, columns, HIDDEN, ALIGNED)
    value = tl.sum(h * d)
    if (mode == IS.mode.COSINE) | (mode == -IS.mode.COSINE):
        norm = tl.sqrt_rn(tl.sum(h * h))
        value = tl.where(norm > 0, tl.div_rn(value, tl.where(norm > 0, norm, 1.0)), 0.0)
    return (value > threshold) != (mode < 0)


@triton.jit
def gate_cell(entries, entry, sequence, n_gates, n_sequences, IS: tl.constexpr = LAYOUT):
    """Where the entry's latched decision for a sequence stands in `gate_state`, and whether there is such a place."""
    sequence = sequence.to(tl.int64)
    state = tl.load(entries + entry * IS.n_fields + IS.field.GATE_STATE).to(tl.int64)
    exists = (state >= 0) & (state < n_gates) & (sequence >= 0) & (sequence < n_sequences)
    return state * n_sequences + sequence, exists


@triton.jit
def latch_row(
    h,
    columns,
    row,
    first,
    end,
    bank,
    entries,
    rows,
    gate_state,
    place_stride,
    n_vectors,
    n_gates,
    n_sequences,
    HIDDEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS: tl.constexpr = LAYOUT,
):
    """Every valid LATCH entry writes its gate's verdict on h to the cell of its gate and the row's sequence. A gate
    without a direction decides nothing: closed."""
    sequence = tl.load(rows + 2 * place_stride + row)
    for entry in range(first, end):
        valid, kind, _vector, _count, mode, gate_vector = read_entry(entries, entry, n_vectors)
        if valid & (kind == IS.kind.LATCH):
            verdict = first < 0  # False, as a scalar of the program
            if (mode != IS.mode.NONE) & (mode != IS.mode.LATCHED):
                threshold = number(entries + entry * IS.n_fields + IS.field.THRESHOLD)
                verdict = gate_verdict(h, columns, bank, gate_vector, mode, threshold, HIDDEN, ALIGNED)
            cell, exists = gate_cell(entries, entry, sequence, n_gates, n_sequences)
            tl.store(gate_state + cell, verdict, mask=exists)


@triton.jit
def write_probe(probe, row, column, k, n_columns, p):
    """Write the k-th projection of an entry whose first probe column is `column` >= 0, if the probe has such a
    column."""
    place = tl.add(column, k, sanitize_overflow=False)  # 32 bits take fewer registers; past the largest, it is negative
    tl.store(probe + row * n_columns + place, p, mask=(place >= 0) & (place < n_columns))


@triton.jit
def rotation(p1, p2, cos, sin, relative):
    """What to add along the two directions of a plane so that the row's part in it points at an angle, or is turned by
    it."""
    radius = tl.sqrt_rn(p1 * p1 + p2 * p2)
    w1 = tl.where(relative, p1 * cos - p2 * sin, radius * cos) - p1
    w2 = tl.where(relative, p1 * sin + p2 * cos, radius * sin) - p2
    return w1, w2


@triton.jit
def steer_row(
    h,
    columns,
    row,
    first,
    end,
    bank,
    entries,
    rows,
    gate_state,
    probe,
    place_stride,
    n_vectors,
    n_gates,
    n_sequences,
    n_columns,
    HIDDEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS: tl.constexpr = LAYOUT,
):
    """`h` `[BLOCK]` fp32 after the entries [first, end), and whether any of them acted. For each entry, in order:

    1. read it; skip it if it is not valid;
    2. decide whether it acts on this row: by kind, position and gate;
    3. for each of its vectors q_k: p_k = h . q_k; write it if the entry probes; moved += w_k q_k, product rounded
       before the sum. h itself stays until the entry is done, so that all p_k are of the same h;
    4. with keep norm, scale moved to the norm of h;
    5. if it acts and some weight is not 0, h = moved.
    """
    touched = first < 0  # False, as a scalar of the program
    for entry in range(first, end):
        valid, kind, vector, count, mode, gate_vector = read_entry(entries, entry, n_vectors)
        f = entries + entry * IS.n_fields
        low, high = tl.load(f + IS.field.POSITION_LOW), tl.load(f + IS.field.POSITION_HIGH)
        keeps_norm, column = tl.load(f + IS.field.KEEP_NORM), tl.load(f + IS.field.PROBE)
        a, b, threshold = number(f + IS.field.A), number(f + IS.field.B), number(f + IS.field.THRESHOLD)

        position = tl.load(rows + place_stride + row)
        acts = valid & (kind < IS.kind.PROBE) & (low <= position) & (position < high)
        if acts & (mode == IS.mode.LATCHED):
            sequence = tl.load(rows + 2 * place_stride + row)
            cell, exists = gate_cell(entries, entry, sequence, n_gates, n_sequences)
            acts = tl.load(gate_state + cell, mask=exists, other=0) != 0
        elif acts & (mode != IS.mode.NONE):
            acts = gate_verdict(h, columns, bank, gate_vector, mode, threshold, HIDDEN, ALIGNED)

        probes = valid & (column >= 0)
        if acts | probes:
            norm = 0.0
            if acts & (keeps_norm != 0):
                norm = tl.sqrt_rn(tl.sum(h * h))
            if (kind == IS.kind.ROTATE) | (kind == IS.kind.ROTATE_RELATIVE):
                p1 = tl.sum(h * load_vector(bank, vector, columns, HIDDEN, ALIGNED))
                p2 = tl.sum(h * load_vector(bank, vector + 1, columns, HIDDEN, ALIGNED))
                if probes:
                    write_probe(probe, row, column, 0, n_columns, p1)
                    write_probe(probe, row, column, 1, n_columns, p2)
                w1, w2 = rotation(p1, p2, a, b, kind == IS.kind.ROTATE_RELATIVE)
                changes = acts & ((w1 != 0) | (w2 != 0))
                if changes:
                    h = h + product(w1, load_vector(bank, vector, columns, HIDDEN, ALIGNED))
                    h = h + product(w2, load_vector(bank, vector + 1, columns, HIDDEN, ALIGNED))
            elif (count == 1) & (kind != IS.kind.PROJECT):
                q = load_vector(bank, vector, columns, HIDDEN, ALIGNED)
                w = a
                if probes | (kind != IS.kind.ADD):
                    p = tl.sum(h * q)
                    if probes:
                        write_probe(probe, row, column, 0, n_columns, p)
                    if kind == IS.kind.ABLATE:
                        w = -a * p
                    elif kind != IS.kind.ADD:
                        w = tl.minimum(tl.maximum(p, a), b) - p
                changes = acts & (w != 0)
                if changes:
                    h = h + product(w, q)
            else:
                changes = acts & (kind == IS.kind.PROJECT)
                moved = tl.where(changes, 0.0, h)
                for k in range(0, count):
                    p = tl.sum(h * load_vector(bank, vector + k, columns, HIDDEN, ALIGNED))
                    if probes:
                        write_probe(probe, row, column, k, n_columns, p)
                    w = tl.where(kind == IS.kind.PROJECT, p, -a * p)
                    moved = moved + product(w, load_vector(bank, vector + k, columns, HIDDEN, ALIGNED))
                    changes |= acts & (w != 0)
                if changes:
                    h = moved
            if changes:
                if columns.shape[0] != HIDDEN:
                    h = tl.where(columns < HIDDEN, h, 0.0)  # an infinite weight has made NaN of zeros
                if keeps_norm != 0:
                    now = tl.sqrt_rn(tl.sum(h * h))
                    h = h * tl.where(now > 0, tl.div_rn(norm, tl.where(now > 0, now, 1.0)), 1.0)
            touched = touched | changes
    return h, touched
