// What the operators' kernels are given, on every device. Knows no framework.
#pragma once

#include <cstdint>

#include "tables.h"

namespace faststeer {

// Of a row.
enum class Dtype : int32_t { FP32, FP16, BF16 };
constexpr int N_DTYPES = 3;

enum class RowOp : int32_t { STEER, STEER_IN_PLACE, ADD_STEER, STEER_PAIR, ADD_STEER_RMSNORM, LATCH };
constexpr int N_OPS = 6;

// Rows: `[rows, hidden]`, each row contiguous; stride in elements.
struct RowShape {
  int64_t rows, hidden, stride;
  Dtype dtype;
  int32_t device_type, device_index;  // by torch's numbers
};

// Strides in elements. hidden is x itself where the op is in place, and residual where a pair is steered, whose x is
// then also `cleared`. A null or empty probe is not written. latch_ has x, the tables and perhaps a residual.
struct RowArguments {
  const void *x, *residual, *weight;
  void *hidden, *normed, *cleared;  // normed is contiguous
  float* probe;                     // [rows, probe_columns]
  int64_t rows, x_stride, residual_stride, hidden_stride;
  int32_t hidden_size, probe_columns;
  float eps, weight_offset;
  bool fp32_weight;
  Dtype weight_dtype;
  Tables tables;
};

// What each library exports under the name of RUN_NAME: run an op on rows on a device. Returns null, or what was wrong,
// until this thread's next call. `size` is that of RowArguments: a library of other sources refuses.
using Run = const char* (*)(int64_t size, RowOp op, const RowShape& shape, const RowArguments& arguments);

}  // namespace faststeer
