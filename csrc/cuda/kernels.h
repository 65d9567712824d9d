// What the kernels are given, and how they are launched: the room between the binding and the kernels. Knows CUDA's
// runtime and no framework.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../common/arguments.h"
#include "../common/launch.h"

namespace faststeer {

template <typename T>
FASTSTEER_INLINE constexpr Dtype dtype_of() {
  return std::is_same_v<T, float> ? Dtype::FP32 : std::is_same_v<T, __half> ? Dtype::FP16 : Dtype::BF16;
}

// rows > 0. What LATCH launches does not depend on config. Where config is vectorised, every tensor that is read and
// written by 16 bytes stands on 16-byte boundaries, the weight only if it is of x's dtype.
using Launch = cudaError_t(RowOp op, const LaunchConfig& config, const RowArguments& arguments, cudaStream_t stream);
Launch launch_fp32, launch_fp16, launch_bf16;  // launch.cu, compiled for each

inline cudaError_t launch_row(RowOp op, const LaunchConfig& config, const RowArguments& arguments,
                              cudaStream_t stream) {
  Launch* const of_16_bits = arguments.dtype == Dtype::FP16 ? launch_fp16 : launch_bf16;
  return (arguments.dtype == Dtype::FP32 ? launch_fp32 : of_16_bits)(op, config, arguments, stream);
}

}  // namespace faststeer
