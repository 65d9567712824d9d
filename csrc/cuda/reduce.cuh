// The threads that hold one row, and sums over them. Knows no framework.
#pragma once

#include "../common/launch.h"
#include "vec.cuh"

namespace faststeer {

constexpr int MAX_WARPS = MAX_THREADS_PER_ROW / WARP;

// Vectors of one entry whose dots are summed together, and sums that go with them (h . d and |h|^2).
constexpr int CHUNK = 16, MAX_SUMS = CHUNK + 2;

// Partial sums, one per warp, of several sums: in shared memory. Two sets, used in turn: a thread that enters the next
// sum writes to the set that no slower thread still reads, since it has passed a barrier that the slower thread had to
// reach after reading. So one barrier per sum is enough. Four floats more per sum keep the 16-byte reads of eight
// neighbouring lanes in different banks.
using Partials = float[2][MAX_SUMS][MAX_WARPS + 4];

// All shared memory of a kernel: Partials, then what else it asked for at launch.
extern __shared__ float4 shared_memory[];

// A group is one warp, with other groups in its block, or a whole block: only then may it use the block's barrier.
//
// All threads of a group get the same bits, so that all take the same branch on them: the exchange within a warp is
// symmetric (a + b = b + a), and the warps' partial sums are added in one order.
//
// THREADS: how many they are, or 0 where only the launch says.
template <int THREADS>
struct RowGroup {
  unsigned thread, launched;
  Partials& partials;
  unsigned turn = 0;

  __device__ __forceinline__ unsigned threads() const { return THREADS > 0 ? THREADS : launched; }

  __device__ __forceinline__ unsigned lane() const { return opaque(thread) % WARP; }

  template <int N>
  __device__ __forceinline__ void sum_in_warp(float (&value)[N]) const {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], distance);
    }
  }

  // Every value[i] becomes its sum over the group.
  template <int N>
  __device__ __forceinline__ void sum(float (&value)[N]) {
    static_assert(N <= MAX_SUMS);
    sum_in_warp(value);
    if (threads() == WARP) return;
    const unsigned warp = opaque(thread) / WARP, warps = THREADS > 0 ? THREADS / WARP : opaque(launched) / WARP;
    float (&mine)[MAX_SUMS][MAX_WARPS + 4] = partials[turn];
    turn ^= 1;
    if (lane() <= padding(warp, warps)) {
#pragma unroll
      for (int i = 0; i < N; ++i) mine[i][warp + lane()] = lane() == 0 ? value[i] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = total(mine[i], warps);
  }

  // Many sums in one register: lane j holds its warp's sum j, and gets the group's.
  __device__ __forceinline__ float sum_lanes(float value) {
    if (threads() == WARP) return value;
    const unsigned warp = opaque(thread) / WARP, warps = THREADS > 0 ? THREADS / WARP : opaque(launched) / WARP;
    float (&mine)[MAX_SUMS][MAX_WARPS + 4] = partials[turn];
    turn ^= 1;
    if (lane() < MAX_SUMS) {
      mine[lane()][warp] = value;
#pragma unroll 1
      for (unsigned i = padding(warp, warps); i > 0; --i) mine[lane()][warp + i] = 0.0f;
    }
    __syncthreads();
    return lane() < MAX_SUMS ? total(mine[lane()], warps) : 0.0f;
  }

  __device__ __forceinline__ float from_lane(float value, int lane) const {
    return __shfl_sync(0xffffffffu, value, lane);
  }

 private:
  // How many of the next lanes' places the last warp fills with zeros, so that all may be read four at a time.
  static __device__ __forceinline__ unsigned padding(unsigned warp, unsigned warps) {
    return warp == warps - 1 ? 3 - warp % 4 : 0;
  }

  static __device__ __forceinline__ float total(const float* of_warps, unsigned warps) {
    float sum = 0.0f;
#pragma unroll(THREADS > 0 ? THREADS / WARP : 1)
    for (unsigned first = 0; first < warps; first += 4) {
      const float4 four = *reinterpret_cast<const float4*>(of_warps + first);
      sum += (four.x + four.y) + (four.z + four.w);
    }
    return sum;
  }
};

}  // namespace faststeer
