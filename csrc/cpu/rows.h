// What the operators hand to the row routines of rows.cpp, which is compiled once per instruction set level. Plain
// numbers and pointers, no framework.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/launch.h"
#include "../common/tables.h"

namespace faststeer {

// `rows` rows at a distance of `stride` elements.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

struct Norm {
  const void* weight = nullptr;  // [hidden], of weight_dtype
  Dtype weight_dtype = Dtype::FP32;
  float eps = 0, weight_offset = 0;
  bool fp32_weight = false;
  Rows normed;
};

struct Job {
  Tables tables;
  int64_t hidden = 0;
  Rows x;
  Rows residual;  // the add_* operators and latch_ only
  Rows out;       // x itself when steering in place
  float* probe = nullptr;
  int64_t columns = 0;
  uint8_t* latched = nullptr;  // latch_ only: gate_state to be written
  Norm norm;                   // add_steer_rmsnorm only
};

struct SparseJob {
  int64_t hidden, n_vectors, n_values;
  Rows x;
  const int32_t* indices;
  const float* values;
  const int32_t* offsets;
  const int32_t* row_vector;
  const float* row_coefficient;
};

// Numbers of `[rows, heads, ...]`, distances in elements. `column` only where there are columns.
struct Heads {
  const void* data = nullptr;
  int64_t row = 0, head = 0, column = 0;

  template <class T>
  const T* at(int64_t r, int64_t h) const {
    return static_cast<const T*>(data) + r * row + h * head;
  }
};

struct AttentionJob {
  int64_t heads, group, columns, key_size, value_size;  // heads of the query; how many share keys and values
  Heads query, keys, values;
  const void* mask;  // [rows, columns], of the query's dtype
  int64_t mask_stride;
  float scaling, softcap;  // softcap 0: none
  void* out;               // [rows, heads, value_size], contiguous
};

// x `[rows, inputs]`, at a distance of `stride` elements, to strips of Routines::strip rows, fp32.
struct StripsJob {
  const void* x;
  int64_t stride, rows, inputs;
  float* to;
};

// out = x weight^T + bias.
struct LinearJob {
  int64_t rows, inputs, outputs;
  const float* strips;  // x, as write_strips leaves it
  const void* weight;   // [outputs, inputs], at a distance of weight_stride elements
  int64_t weight_stride;
  const void* bias;  // [outputs], or null
  void* out;         // [rows, outputs], contiguous, of the weights' dtype
};

// The routines at one instruction set level, indexed by Dtype. Each does the rows `first` to `end` - 1 and touches no other.
struct Routines {
  using Rows = void (*)(const Job&, int64_t first, int64_t end);
  using Sparse = void (*)(const SparseJob&, int64_t first, int64_t end);
  using Attention = void (*)(const AttentionJob&, int64_t first, int64_t end);
  using Strips = void (*)(const StripsJob&, int64_t first, int64_t end);
  using Linear = void (*)(const LinearJob&, int64_t first, int64_t end);
  Rows steer[N_DTYPES], add_steer[N_DTYPES], add_steer_rmsnorm[N_DTYPES], latch[N_DTYPES];
  Sparse sparse_add[N_DTYPES];
  Attention decode_attention[N_DTYPES];
  Strips write_strips[N_DTYPES];
  Linear linear[N_DTYPES];
  int64_t strip;  // rows
};

extern const Routines routines_baseline;
#if defined(__x86_64__)
extern const Routines routines_avx2;
extern const Routines routines_avx512;
#endif

}  // namespace faststeer
