// 16 bytes (or one element) of a row at a time: loads, stores, and conversion to and from fp32. Knows no framework.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace faststeer {

// N elements that are loaded and stored together: 16 bytes, or one element. As words, since 16-bit elements on their own
// take a register each.
template <typename T, int N>
struct Pack {
  static constexpr int WORDS = N * sizeof(T) / 4;
  static_assert(WORDS == 4);
  uint32_t word[WORDS];
};

template <typename T>
struct Pack<T, 1> {
  T element;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T, int N>
__device__ __forceinline__ void unpack(const Pack<T, N>& pack, float* out) {
  if constexpr (N == 1) {
    out[0] = to_float(pack.element);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T, N>::WORDS; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        out[i] = bits_as<float>(pack.word[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(bits_as<__half2>(pack.word[i]));
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
      } else {  // bf16 is the upper half of fp32
        out[2 * i] = bits_as<float>(pack.word[i] << 16), out[2 * i + 1] = bits_as<float>(pack.word[i] & 0xffff0000u);
      }
    }
  }
}

// Pairs of 16-bit elements are rounded by one instruction.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> round_to_pack(const float* x) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.element = round_to<T>(x[0]);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T, N>::WORDS; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        pack.word[i] = bits_as<uint32_t>(x[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        pack.word[i] = bits_as<uint32_t>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
      } else {
        pack.word[i] = bits_as<uint32_t>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
      }
    }
  }
  return pack;
}

// a + b, or a b, of packs. Those of 16-bit elements are two at a time, and have the bits that fp32 numbers rounded once
// would have: fp32 has at least 2 p + 2 bits where the type has p. (Products below fp32's normal numbers apart.)
template <bool PRODUCT, typename T, int N>
__device__ __forceinline__ Pack<T, N> combine_packs(const Pack<T, N>& a, const Pack<T, N>& b) {
  static_assert(N > 1);
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < Pack<T, N>::WORDS; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      const float x = bits_as<float>(a.word[i]), y = bits_as<float>(b.word[i]);
      result.word[i] = bits_as<uint32_t>(PRODUCT ? __fmul_rn(x, y) : __fadd_rn(x, y));
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      const Pair x = bits_as<Pair>(a.word[i]), y = bits_as<Pair>(b.word[i]);
      result.word[i] = bits_as<uint32_t>(PRODUCT ? __hmul2(x, y) : __hadd2(x, y));
    }
  }
  return result;
}

// Load a number here and now, and not where it is first used.
__device__ __forceinline__ int32_t load_now(const int32_t* from) {
#if defined(__CUDA_ARCH__)
  int32_t number;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(number) : "l"(from));
  return number;
#else
  return *from;
#endif
}

// Load what is read once. It does not enter L1, which is left to the bank: rows that share a plan read the same
// vectors.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_once(const T* from) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.element = *from;
  } else {
#if defined(__CUDA_ARCH__)
    // volatile: the loads of a row are issued where they stand, together and before anything that waits.
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.word[0]), "=r"(pack.word[1]), "=r"(pack.word[2]), "=r"(pack.word[3])
                 : "l"(from));
#else
    memcpy(pack.word, from, sizeof(pack));
#endif
  }
  return pack;
}

// Load what no thread writes while the kernel runs, and other rows read too.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_shared_by_rows(const T* from) {
  if constexpr (N == 1)
    return {__ldg(from)};
  else
    return bits_as<Pack<T, N>>(__ldg(reinterpret_cast<const uint4*>(from)));
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1)
    *to = pack.element;
  else
    *reinterpret_cast<uint4*>(to) = bits_as<uint4>(pack);
}

// x, of which the compiler knows nothing: what is computed from it is computed where it stands, and not kept in a
// register from before a loop.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

__device__ __forceinline__ const float* opaque(const float* x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// No load that follows is moved ahead of this, where it would need a register for longer.
__device__ __forceinline__ void loads_stay_behind() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// N fp32 numbers of a bank row, 16 bytes at a time where N allows, or zeros. The address is computed in either case: a
// predicated load needs no branch, but a predicated address looks to the compiler as if it lived before, which costs
// the row its registers.
template <int N>
__device__ __forceinline__ void load_bank_if(bool wanted, const float* from, float* out) {
  constexpr int STEP = N % 4 == 0 ? 4 : 1;
  from = opaque(from);
#pragma unroll
  for (int i = 0; i < N; i += STEP) {
    Pack<float, STEP> pack{};
    if (wanted) pack = load_shared_by_rows<float, STEP>(from + i);
    unpack(pack, out + i);
  }
}

// Ask for the line that will be read next, without a register to wait in.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

}  // namespace faststeer
