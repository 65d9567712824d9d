// Checks of an operator's arguments: what must hold lest memory be read that is not there. A wrong argument raises with
// its name; faststeer.ops then says what was expected and what came (schema.py). What the tables hold is not checked: it
// may change between two replays of a graph, and tables.h keeps it from doing harm. Knows no framework.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "launch.h"

namespace faststeer {

struct Unfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Raise Unfit unless it holds.
inline void require(bool holds, const char* name) {
  if (!holds) throw Unfit(std::string(name) + " does not fit this operator: faststeer.ops says why not");
}

// A tensor, whatever its framework, whose numbers of devices these are.
struct Layout {
  void* data;
  int32_t dimensions;
  const int64_t *sizes, *strides;
  Dtype dtype;
  int32_t device_type, device_index;

  bool is_contiguous() const {
    int64_t elements = 1;
    bool dense = true;
    for (int32_t i = dimensions - 1; i >= 0; elements *= sizes[i--]) dense &= sizes[i] == 1 || strides[i] == elements;
    return dense || elements == 0;
  }

  bool is_with(const Layout& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

inline Dtype check_float(const Layout& tensor, const char* name) {
  require(tensor.dtype <= Dtype::BF16, name);
  return tensor.dtype;
}

// `[rows, hidden]`, of one of the three dtypes, each row contiguous and apart from the others.
inline Rows check_rows(const Layout& x, const char* name) {
  check_float(x, name);
  require(x.dimensions == 2, name);
  const int64_t rows = x.sizes[0], hidden = x.sizes[1];
  require(hidden >= 1 && hidden <= MAX_HIDDEN, name);
  require((hidden == 1 || x.strides[1] == 1) && (rows <= 1 || x.strides[0] >= hidden), name);
  return {x.data, rows > 1 ? x.strides[0] : hidden};
}

// Of exactly these sizes (-1: any) and this dtype, beside `other`, contiguous unless said otherwise.
inline void check_table(const Layout& table, const char* name, Dtype dtype, std::initializer_list<int64_t> sizes,
                        const Layout& other, bool contiguous = true) {
  bool fits = table.dtype == dtype && table.dimensions == static_cast<int32_t>(sizes.size()) && table.is_with(other);
  for (int32_t i = 0; fits && i < table.dimensions; ++i) {
    fits = sizes.begin()[i] < 0 || table.sizes[i] == sizes.begin()[i];
  }
  require(fits && (!contiguous || table.is_contiguous()), name);
}

inline int32_t count_of(const Layout& table, int32_t dimension, const char* name) {
  require(table.sizes[dimension] <= std::numeric_limits<int32_t>::max(), name);
  return static_cast<int32_t>(table.sizes[dimension]);
}

// The tables of a call on `n_rows` rows like those of `other`, once all of them fit. gate_state may be null.
inline Tables make_tables(const Layout& other, int64_t n_rows, int64_t hidden, const Layout& bank,
                          const Layout& entries, const Layout& ranges, const Layout& rows, const Layout* gate_state) {
  check_table(bank, "bank", Dtype::FP32, {-1, hidden}, other);
  check_table(entries, "entries", Dtype::INT32, {-1, N_FIELDS}, other);
  require(reinterpret_cast<uintptr_t>(entries.data) % alignof(Entry) == 0, "entries");
  check_table(ranges, "ranges", Dtype::INT32, {-1, 2}, other);
  check_table(rows, "rows", Dtype::INT32, {N_PLACES, -1}, other, false);
  require(rows.sizes[1] >= n_rows && (rows.sizes[1] <= 1 || rows.strides[1] == 1), "rows");
  Tables tables{};
  tables.bank = static_cast<const float*>(bank.data);
  tables.entries = static_cast<const Entry*>(entries.data);
  tables.ranges = static_cast<const int32_t*>(ranges.data);
  tables.slots = static_cast<const int32_t*>(rows.data);
  tables.positions = tables.slots + rows.strides[0];
  tables.sequences = tables.positions + rows.strides[0];
  tables.n_vectors = count_of(bank, 0, "bank");
  tables.n_entries = count_of(entries, 0, "entries");
  tables.n_slots = count_of(ranges, 0, "ranges");
  if (gate_state != nullptr) {
    check_table(*gate_state, "gate_state", Dtype::BOOL, {-1, -1}, other);
    tables.gate_state = static_cast<uint8_t*>(gate_state->data);
    tables.n_gates = count_of(*gate_state, 0, "gate_state");
    tables.n_sequences = count_of(*gate_state, 1, "gate_state");
  }
  return tables;
}

// The weight of rows of a size, and what else a norm has.
inline void set_norm(RowArguments& arguments, const Layout& weight, int64_t hidden, const Layout& other, float eps,
                     float weight_offset, bool fp32_weight) {
  arguments.weight_dtype = check_float(weight, "weight");
  check_table(weight, "weight", weight.dtype, {hidden}, other);
  arguments.weight = weight.data;
  arguments.eps = eps;
  arguments.weight_offset = weight_offset;
  arguments.fp32_weight = fp32_weight;
}

}  // namespace faststeer
