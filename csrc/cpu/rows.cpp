// The operators' loops over rows for one instruction set level: compiled once per level, exported as FASTSTEER_ROUTINES.
// ops.cpp chooses among the levels when it is loaded. Only `routines_<level>` leaves this file: a level's code must
// never be taken for another's (faststeer/build.py links the levels in ascending order for the same reason).
#include "rows.h"

#include "linear.h"
#include "row.h"

namespace faststeer {
namespace {

// The norm's weight, shifted, in fp32.
template <class W>
void load_weight(const RowArguments& job, float* weight) {
  const W* from = static_cast<const W*>(job.weight);
  const Lanes offset = all(job.weight_offset);
  const bool shifted = job.weight_offset != 0;  // adding 0 would turn a weight of -0 into 0
  each_block(job.hidden_size, [=](int64_t i, auto block) {
    const Lanes w = load(from + i, block);
    store(weight + i, shifted ? w + offset : w, block);
  });
}

// RMSNorm of a row h whose squares' sum is known.
template <class T>
void write_normed(const RowArguments& job, int64_t row, const float* h, float squares, const float* weight) {
  const Lanes factor = all(1.0f / std::sqrt(squares / static_cast<float>(job.hidden_size) + job.eps));
  T* const normed = static_cast<T*>(job.normed) + row * job.hidden_size;
  const auto write = [=](auto rounded) {
    each_block(job.hidden_size, [=](int64_t i, auto block) {
      store_rounded(normed + i, rounded(load(h + i, block) * factor) * load(weight + i, block), block);
    });
  };
  if (job.fp32_weight) {
    write([](Lanes n) { return n; });
  } else {
    write([](Lanes n) { return round_to<T>(n); });
  }
}

// Every operator but latch_: which one it is, its arguments say.
//
// Rows are taken first to last, as their columns are: one stream, which the processor's own prefetching follows from
// row to row. Last to first would find the end of what was just written in a nearer cache, and costs more than that
// saves: a twentieth in place, a quarter into other memory (512 fp32 rows of 4096, Zen 5).
//
// Everything is inlined here, but for what row.h has as a function of its own.
template <class T>
__attribute__((flatten)) void steer(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN], weight[MAX_HIDDEN];
  Weights weights;
  Addend addend;
  if (job.weight != nullptr) {
    const auto load = job.weight_dtype == Dtype::FP32   ? load_weight<float>
                      : job.weight_dtype == Dtype::FP16 ? load_weight<Half>
                                                        : load_weight<BFloat>;
    load(job, weight);
  }
  const bool is_pair = job.hidden.data == job.residual.data;
  for (int64_t row = first; row < end; ++row) {
    if (is_pair) {
      const Range range = entries_of(job.tables, place_of(job.tables, row).slot);
      if (range.first >= range.end) continue;
      if (job.probe_columns > 0) std::memset(job.probe + row * job.probe_columns, 0, job.probe_columns * sizeof(float));
    }
    Row<T> h(job, row, buffer);
    T* const out = job.hidden.row<T>(row);
    const bool changed = steer_row(job, row, h, weights);
    if (job.weight != nullptr) {
      write_normed<T>(job, row, buffer, h.write_rounded(out), weight);
    } else if (is_pair) {
      if (!changed) continue;
      h.write(out);
      std::memset(job.x.row<T>(row), 0, job.hidden_size * sizeof(T));
    } else if (changed || job.residual.data != nullptr) {
      if (!h.write_sum(out, addend)) h.write(out);
    } else {
      std::memcpy(out, job.x.row<T>(row), job.hidden_size * sizeof(T));
    }
  }
}

template <class T>
void latch(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN];
  const Tables& tables = job.tables;
  for (int64_t row = first; row < end; ++row) {
    const Place place = place_of(tables, row);
    if (place.position != -1) continue;
    Row<T> h(job, row, buffer);
    const Range range = entries_of(tables, place.slot);
    for (int64_t i = range.first; i < range.end; ++i) {
      Entry entry;
      if (!read_entry(tables, i, entry) || entry.kind != LATCH) continue;
      const int64_t cell = gate_cell(tables, entry, place.sequence);
      if (cell >= 0) tables.gate_state[cell] = compares(entry) && compare(tables, entry, h, job.hidden_size);
    }
  }
}

}  // namespace

#define FASTSTEER_BY_DTYPE(routine) {routine<float>, routine<Half>, routine<BFloat>}

const Routines FASTSTEER_ROUTINES = {FASTSTEER_BY_DTYPE(steer), FASTSTEER_BY_DTYPE(latch), FASTSTEER_BY_DTYPE(linear),
                                     UNIT};

}  // namespace faststeer
