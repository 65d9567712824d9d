// bf16 on the host, with CUDA's names.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t word = static_cast<uint32_t>(b.bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof(x));
  return x;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  word += 0x7fff + (word >> 16 & 1);
  return {static_cast<uint16_t>(word >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
