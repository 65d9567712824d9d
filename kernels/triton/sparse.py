"""`sparse_add_`: a few columns of each row get a coefficient times a sparse vector. docs/kernels.md is the
specification.

Run so far in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100; no GPU has run it yet. What it cannot do:
16-byte accesses, since the columns may be anywhere; it is for vectors with far fewer elements than the row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from faststeer.kernels.launch import on_device_of

# Elements of a vector per step: one per thread of four warps. A vector with a hundred elements is one step; one with a
# thousand is still only eight, and more threads would idle on the short ones.
BLOCK = 128
NUM_WARPS = 4

_VARYING = ["x_stride", "hidden", "n_vectors", "n_values"]
_POINTERS = ["x", "indices", "values", "offsets", "row_vector", "row_coefficient"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_POINTERS)
def sparse_add_kernel(
    x,
    indices,
    values,
    offsets,
    row_vector,
    row_coefficient,
    x_stride: tl.int64,
    hidden: tl.int64,
    n_vectors: tl.int64,
    n_values: tl.int64,
    BLOCK: tl.constexpr,
):
    """One row.

    1. Which vector, and how much of it? None, one that does not exist, or none of it: done.
    2. For its elements, cut to those there are: x[index] + coefficient * value in fp32, the product rounded before the
       sum, rounded to the dtype. An index outside the row is passed over.
    """
    row = tl.program_id(0).to(tl.int64)
    vector = tl.load(row_vector + row).to(tl.int64)
    coefficient = tl.load(row_coefficient + row)
    if (vector < 0) | (vector >= n_vectors) | (coefficient == 0):
        return
    first = tl.maximum(tl.load(offsets + vector).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + vector + 1).to(tl.int64), n_values)
    for start in range(first, end, BLOCK):
        element = start + tl.arange(0, BLOCK)
        there = element < end
        index = tl.load(indices + element, mask=there, other=-1).to(tl.int64)
        value = tl.load(values + element, mask=there, other=0.0)
        there = (index >= 0) & (index < hidden)
        pointers = x + row * x_stride + index
        before = tl.load(pointers, mask=there, other=0.0)
        tl.store(pointers, (before.to(tl.float32) + coefficient * value).to(before.dtype), mask=there)


def sparse_add_(
    x: Tensor, indices: Tensor, values: Tensor, offsets: Tensor, row_vector: Tensor, row_coefficient: Tensor
) -> None:
    """x[r, indices[i]] += row_coefficient[r] * values[i] for the elements i of vector row_vector[r], which are
    offsets[v] .. offsets[v + 1] - 1."""
    rows, hidden = x.shape
    if rows == 0:
        return
    with on_device_of(x):
        sparse_add_kernel[(rows,)](
            x,
            indices,
            values,
            offsets,
            row_vector,
            row_coefficient,
            x.stride(0),
            hidden,
            offsets.shape[0] - 1,
            values.shape[0],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
