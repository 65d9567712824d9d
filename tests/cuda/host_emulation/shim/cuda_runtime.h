// Stands in for CUDA's own header where g++ compiles the kernels' sources for the host: as much of the language and of the
// runtime as they use. emulator.cpp runs the threads of a block.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the thread that runs. One runs at a time.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int distance);
float __shfl_sync(unsigned mask, float value, int lane);
unsigned __ballot_sync(unsigned mask, bool vote);

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
inline float __fadd_rn(float a, float b) { return a + b; }  // compiled without contraction
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }


using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {
using Thread = void (*)(void* context);
void allow_shared_memory(const void* kernel, size_t bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, Thread thread, void* context);
}  // namespace emulator

template <typename A>
cudaError_t cudaFuncSetAttribute(void (*kernel)(A), cudaFuncAttribute, int bytes) {
  emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

template <typename A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(A), const A& arguments) {
  struct Call {
    void (*kernel)(A);
    const A& arguments;
  } call{kernel, arguments};
  const auto thread = [](void* context) {
    Call& call = *static_cast<Call*>(context);
    call.kernel(call.arguments);
  };
  return emulator::run(*config, reinterpret_cast<const void*>(kernel), thread, &call);
}
