// The operators' loops over rows, for one instruction set level: compiled once per level, with FASTSTEER_ISA naming it.
// ops.cpp chooses among the levels when it is loaded. Only `routines_<level>` leaves this file: a level's code must
// never be taken for another's (faststeer/build.py links the levels in ascending order for the same reason).
#include "rows.h"

#include "linear.h"
#include "row.h"

#define FASTSTEER_JOIN_(a, b) a##b
#define FASTSTEER_JOIN(a, b) FASTSTEER_JOIN_(a, b)

namespace faststeer {
namespace {

// Rows are taken first to last, as their columns are: one stream, which the processor's own prefetching follows from
// row to row. Last to first would find the end of what was just written in a nearer cache, and costs more than that
// saves: a twentieth in place, a quarter into other memory (512 fp32 rows of 4096, Zen 5).

template <class T>
void steer(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN];
  Weights weights;
  Addend addend;
  for (int64_t row = first; row < end; ++row) {
    Row<T, false> h(job, row, buffer);
    T* out = job.hidden.row<T>(row);
    if (steer_row(job, row, h, weights)) {
      if (!h.write_sum(out, addend)) h.write(out);
    } else if (job.hidden.data != job.x.data) {
      std::memcpy(out, job.x.row<T>(row), job.hidden_size * sizeof(T));
    }
  }
}

template <class T>
void add_steer(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN];
  Weights weights;
  for (int64_t row = first; row < end; ++row) {
    Row<T, true> h(job, row, buffer);
    steer_row(job, row, h, weights);
    h.write(job.hidden.row<T>(row));
  }
}

template <class T>
void steer_pair(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN];
  Weights weights;
  for (int64_t row = first; row < end; ++row) {
    const Range range = entries_of(job.tables, place_of(job.tables, row).slot);
    if (range.first >= range.end) continue;
    if (job.probe_columns > 0) std::memset(job.probe + row * job.probe_columns, 0, job.probe_columns * sizeof(float));
    Row<T, true> h(job, row, buffer);
    if (!steer_row(job, row, h, weights)) continue;
    h.write(job.hidden.row<T>(row));
    std::memset(job.x.row<T>(row), 0, job.hidden_size * sizeof(T));
  }
}

template <class W>
void load_weight(const RowArguments& job, float* weight) {
  const int64_t hidden = job.hidden_size;
  const W* from = static_cast<const W*>(job.weight);
  const Lanes offset = all(job.weight_offset);
  const bool shifted = job.weight_offset != 0;  // adding 0 would turn a weight of -0 into 0
  each_block(hidden, [=](int64_t i, auto block) {
    const Lanes w = load(from + i, block);
    store(weight + i, shifted ? w + offset : w, block);
  });
}

template <class T, bool ROUND_FIRST>
void store_normed(T* normed, const float* h, float factor, const float* weight, int64_t hidden) {
  const Lanes factors = all(factor);
  each_block(hidden, [=](int64_t i, auto block) {
    const Lanes n = load(h + i, block) * factors;
    store_rounded(normed + i, (ROUND_FIRST ? round_to<T>(n) : n) * load(weight + i, block), block);
  });
}

template <class T>
void add_steer_rmsnorm(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN], weight[MAX_HIDDEN];
  Weights weights;
  const int64_t hidden = job.hidden_size;
  switch (job.weight_dtype) {
    case Dtype::FP16:
      load_weight<Half>(job, weight);
      break;
    case Dtype::BF16:
      load_weight<BFloat>(job, weight);
      break;
    case Dtype::FP32:
      load_weight<float>(job, weight);
  }
  for (int64_t row = first; row < end; ++row) {
    Row<T, true> h(job, row, buffer);
    steer_row(job, row, h, weights);
    const float squares = h.write_rounded(job.hidden.row<T>(row));
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(hidden) + job.eps);
    T* normed = static_cast<T*>(job.normed) + row * hidden;
    if (job.fp32_weight) {
      store_normed<T, false>(normed, buffer, factor, weight, hidden);
    } else {
      store_normed<T, true>(normed, buffer, factor, weight, hidden);
    }
  }
}

template <class T, bool ADDS>
void latch_rows(const RowArguments& job, int64_t first, int64_t end) {
  alignas(64) float buffer[MAX_HIDDEN];
  const Tables& tables = job.tables;
  for (int64_t row = first; row < end; ++row) {
    const Place place = place_of(tables, row);
    if (place.position != -1) continue;
    Row<T, ADDS> h(job, row, buffer);
    const Range range = entries_of(tables, place.slot);
    for (int64_t i = range.first; i < range.end; ++i) {
      Entry entry;
      if (!read_entry(tables, i, entry) || entry.kind != LATCH) continue;
      const int64_t cell = gate_cell(tables, entry, place.sequence);
      if (cell >= 0) tables.gate_state[cell] = compares(entry) && compare(tables, entry, h, job.hidden_size);
    }
  }
}

template <class T>
void latch(const RowArguments& job, int64_t first, int64_t end) {
  if (job.residual.data == nullptr) {
    latch_rows<T, false>(job, first, end);
  } else {
    latch_rows<T, true>(job, first, end);
  }
}

}  // namespace

#define FASTSTEER_BY_DTYPE(routine) {routine<float>, routine<Half>, routine<BFloat>}

const Routines FASTSTEER_JOIN(routines_, FASTSTEER_ISA) = {
    {FASTSTEER_BY_DTYPE(steer), FASTSTEER_BY_DTYPE(steer), FASTSTEER_BY_DTYPE(add_steer),
     FASTSTEER_BY_DTYPE(steer_pair), FASTSTEER_BY_DTYPE(add_steer_rmsnorm), FASTSTEER_BY_DTYPE(latch)},
    FASTSTEER_BY_DTYPE(widen),
    FASTSTEER_BY_DTYPE(linear),
    UNIT,
};

}  // namespace faststeer
