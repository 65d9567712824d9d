// What the operators' kernels are given, on every device. Knows no framework.
#pragma once

#include <cstdint>

#include "tables.h"

namespace faststeer {

enum class Dtype : int32_t { FP32, FP16, BF16, INT32, BOOL, OTHER };
constexpr int N_DTYPES = 3;  // of rows: the first ones

enum class RowOp : int32_t { STEER, ADD_STEER, STEER_PAIR, ADD_STEER_RMSNORM, LATCH };

// Rows at a distance of `stride` elements.
struct Rows {
  void* data;
  int64_t stride;

  template <class T>
  FASTSTEER_INLINE T* row(int64_t number) const {
    return static_cast<T*>(data) + number * stride;
  }
};

// hidden is residual itself where a pair is steered, whose x is then cleared. A null or empty probe is not written. latch_
// has x, the tables and perhaps a residual.
struct RowArguments {
  Rows x, residual, hidden;
  const void* weight;
  void* normed;  // contiguous
  float* probe;  // [rows, probe_columns]
  int64_t rows;
  int32_t hidden_size, probe_columns;
  float eps, weight_offset;
  bool fp32_weight;
  Dtype weight_dtype;
  Tables tables;
  Dtype dtype;  // of the rows; after the tables, which stand where a GPU reads two numbers at a time
};

// What each library exports as `faststeer_run`: run an op on a device, by torch's number of it. Returns null, or what was
// wrong, until this thread's next call. `size` is that of RowArguments: a library of other sources refuses.
using Run = const char* (*)(int64_t size, RowOp op, int32_t device, const RowArguments& arguments);

}  // namespace faststeer
