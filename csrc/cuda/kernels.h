// What the kernels are given, and how they are launched: the room between the binding and the kernels. Knows CUDA's
// runtime and no framework.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../common/dtype.h"
#include "../common/launch.h"
#include "../common/tables.h"

namespace faststeer {

enum class RowOp : int32_t { STEER, STEER_IN_PLACE, ADD_STEER, STEER_PAIR, ADD_STEER_RMSNORM };

template <typename T>
FASTSTEER_INLINE constexpr Dtype dtype_of() {
  return std::is_same_v<T, float> ? Dtype::FP32 : std::is_same_v<T, __half> ? Dtype::FP16 : Dtype::BF16;
}

// Strides in elements. hidden is x itself where the op is in place, and residual where a pair is steered, whose x is
// then also `cleared`. A null or empty probe is not written.
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

struct LatchArguments {
  const void *x, *residual;  // residual may be null
  uint8_t* gate_state;       // the one in tables, to be written
  int64_t rows, x_stride, residual_stride;
  int32_t hidden_size;
  Tables tables;
};

struct Launched {
  cudaError_t error;
  dim3 grid, block;
};

// rows > 0. Where config is vectorised, every tensor it reads and writes by 16 bytes stands on 16-byte boundaries, the
// weight only if it is of x's dtype.
Launched launch_row(RowOp op, Dtype dtype, const LaunchConfig& config, const RowArguments& arguments,
                    cudaStream_t stream);
Launched launch_latch(Dtype dtype, const LatchArguments& arguments, cudaStream_t stream);

}  // namespace faststeer
