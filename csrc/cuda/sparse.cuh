// sparse_add_: adds to each row a multiple of one sparse vector, touching only its columns. Knows no framework. It
// compiles, and runs on the host under tests/cuda/host_emulation; no GPU has run it yet.
//
// One block per row: the row's vector and coefficient, then its elements, one per thread and turn. A vector's columns
// are distinct, so no two threads meet. Indices are as little trusted as those of the dense tables: vectors, ranges and
// columns that do not exist are left out. Coefficient 0 leaves the row's bits alone.
//
// What it cannot do: coalesce, since columns may be anywhere.
#pragma once

#include "kernels.h"
#include "vec.cuh"

namespace faststeer {

constexpr int SPARSE_THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(SPARSE_THREADS)
    sparse_add_kernel(const __grid_constant__ SparseAddArguments arguments) {
  const int64_t row = blockIdx.x;
  const int32_t vector = arguments.row_vector[row];
  const float coefficient = arguments.row_coefficient[row];
  if (vector < 0 || vector >= arguments.n_vectors || coefficient == 0.0f) return;
  const int64_t first = max(int64_t{0}, int64_t{arguments.offsets[vector]});
  const int64_t end = min(arguments.n_values, int64_t{arguments.offsets[vector + 1]});
  T* x = static_cast<T*>(arguments.x) + row * arguments.x_stride;
  for (int64_t i = first + threadIdx.x; i < end; i += SPARSE_THREADS) {
    const int32_t column = arguments.indices[i];
    if (column < 0 || column >= arguments.hidden_size) continue;
    x[column] = round_to<T>(__fadd_rn(to_float(x[column]), __fmul_rn(coefficient, arguments.values[i])));
  }
}

}  // namespace faststeer
