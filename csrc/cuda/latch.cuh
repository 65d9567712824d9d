// latch_: decides latched gates on the rows of each prompt's last token, before anything acts on them. Knows no
// framework. It compiles, and runs on the host under tests/cuda/host_emulation; no GPU has run it yet.
//
// Few rows have position -1 (none in decode), so a block looks through LATCH_ROWS of them and its threads then decide
// one row after the other:
//   1. Each warp reads the positions of the block's rows, one per lane, and all agree which are -1.
//   2. For each such row and each of its LATCH entries: h . d and |h|^2 over the row, read once per entry; the verdict
//      goes to gate_state.
//
// What it cannot do: run fast when a block's rows all latch. That would be a batch of prompts of one token.
#pragma once

#include "entry.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace faststeer {

constexpr int LATCH_ROWS = WARP, LATCH_THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(LATCH_THREADS) latch_kernel(const __grid_constant__ RowArguments arguments) {
  RowGroup<LATCH_THREADS> group{threadIdx.x, LATCH_THREADS, *reinterpret_cast<Partials*>(shared_memory)};
  const Tables& tables = arguments.tables;
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) * LATCH_ROWS;
  const int32_t mine = first_row + static_cast<int32_t>(threadIdx.x % WARP);
  unsigned left = __ballot_sync(0xffffffffu, mine < arguments.rows && place_of(tables, mine).position == -1);
  for (; left != 0; left &= left - 1) {
    const int32_t row = first_row + __ffs(static_cast<int>(left)) - 1;
    const Place place = place_of(tables, row);
    const Range range = entries_of(tables, place.slot);
    for (int64_t i = range.first; i < range.end; ++i) {
      Entry entry;
      if (!read_entry(tables, i, entry) || entry.kind != LATCH) continue;
      const int64_t cell = gate_cell(tables, entry, place.sequence);
      if (cell < 0) continue;
      if (entry.gate_mode == GATE_NONE || entry.gate_mode == GATE_LATCHED) {  // nothing to compare: closed
        if (threadIdx.x == 0) tables.gate_state[cell] = 0;
        continue;
      }
      const float* d = tables.bank + int64_t{entry.gate_vector} * arguments.hidden_size;
      const T* x = arguments.x.row<const T>(row);
      const T* residual = arguments.residual.data != nullptr ? arguments.residual.row<const T>(row) : nullptr;
      float sums[2] = {0.0f, 0.0f};  // h . d, |h|^2
      for (int column = threadIdx.x; column < arguments.hidden_size; column += LATCH_THREADS) {
        float h = to_float(x[column]);
        if (residual != nullptr) h = to_float(round_to<T>(h + to_float(residual[column])));
        sums[0] += h * __ldg(d + column);
        sums[1] += h * h;
      }
      group.sum(sums);
      if (threadIdx.x == 0) tables.gate_state[cell] = gate_verdict(entry, sums[0], sums[1]);
    }
  }
}

}  // namespace faststeer
