// y = x W^T + b, with weights as a model keeps them, `[outputs, inputs]`, none copied.
//
// A tile is ROWS rows by OUTPUTS outputs. Each of its sums is a vector in a register while the inputs go by, PART at a
// time; then every PART of them are folded into one vector with a sum in each lane.
//   1. OUTPUTS outputs at a time pass by all rows, so that weights come from memory once. Meanwhile the weights of the
//      next OUTPUTS are prefetched, at the pace at which the tiles are computed: so many rows are read at once that the
//      processor does not see them coming.
//   2. DEPTH inputs at a time: what a tile reads stays in the nearest cache.
//   3. The bias follows, and the result is rounded, once.
// A result depends on its own row and weights alone, never on which rows and outputs are computed beside it. Products
// are fused multiply-adds where the machine has them: the baseline level rounds otherwise.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "lanes.h"
#include "row.h"
#include "rows.h"

namespace faststeer {
namespace {

// Sums, the weights of each output and one row's inputs fill the registers: 32 vectors of AVX-512, 16 of the others.
constexpr int ROWS = 4, OUTPUTS = PART == 16 ? 6 : PART == 8 ? 3 : 2;
constexpr int SUMS = ROWS * OUTPUTS, SUM_LANES = (SUMS + LANES - 1) / LANES * LANES;
constexpr int64_t DEPTH = 768;
constexpr int64_t MOST_ROWS = 64;  // of which inputs stay in the second cache while a unit's weights go by
constexpr int64_t UNIT = 48;       // outputs that a thread takes at a time: some tiles of every size

// Keeps GCC from reading a vector from memory again wherever it is used.
#if defined(__AVX512F__)
#define FASTSTEER_IN_REGISTER(vector) asm("" : "+v"(vector))
#elif defined(__x86_64__)
#define FASTSTEER_IN_REGISTER(vector) asm("" : "+x"(vector))
#else
#define FASTSTEER_IN_REGISTER(vector)
#endif

FASTSTEER_LANES Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Lanes 0 to W - 1 of every 2 W: those of x plus those W behind them; the others: the same of y.
template <int W, int... I>
FASTSTEER_LANES Floats fold_pair(Floats x, Floats y, std::integer_sequence<int, I...>) {
  return shuffled<((I & W) ? PART + I - W : I)...>(x, y) + shuffled<((I & W) ? PART + I : I + W)...>(x, y);
}

// Lane i of the result is the sum of vector i's lanes, for COUNT vectors: PART of them, or half as many.
template <int COUNT, int W = PART / 2>
FASTSTEER_LANES Floats fold(Floats* vectors) {
#pragma GCC unroll 16
  for (int i = 0; i < std::min(COUNT, W); ++i) {
    vectors[i] = fold_pair<W>(vectors[i], vectors[COUNT > W ? i + W : i], std::make_integer_sequence<int, PART>());
  }
  if constexpr (W > 1) {
    return fold<std::min(COUNT, W), W / 2>(vectors);
  } else {
    return vectors[0];
  }
}

// PART values, the first `count` of them and zeros.
template <class T>
FASTSTEER_LANES Floats decode_some(const T* from, int64_t count) {
  T copy[PART] = {};
  std::memcpy(copy, from, count * sizeof(T));
  return decode(copy);
}

// sums[r * OUTPUTS + o] += row r of x times row o of weights, lane by lane.
template <class T>
FASTSTEER_LANES void multiply(Floats* sums, const float* const* x, const T* const* weight, const T* next, int64_t pace,
                              int64_t depth) {
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + PART <= depth; k += PART) {
    Floats w[OUTPUTS];
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; ++o) {
      w[o] = decode(weight[o] + k);
      FASTSTEER_IN_REGISTER(w[o]);
    }
    __builtin_prefetch(next, 0, 2);
    next += pace;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Floats one = decode(x[r] + k);
#pragma GCC unroll 16
      for (int o = 0; o < OUTPUTS; ++o) sums[r * OUTPUTS + o] = multiply_add(one, w[o], sums[r * OUTPUTS + o]);
    }
  }
  if (k < depth) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Floats one = decode_some(x[r] + k, depth - k);
#pragma GCC unroll 16
      for (int o = 0; o < OUTPUTS; ++o) {
        sums[r * OUTPUTS + o] = multiply_add(one, decode_some(weight[o] + k, depth - k), sums[r * OUTPUTS + o]);
      }
    }
  }
}

// OUTPUTS outputs from `output` on, of the rows `first` to `end` - 1, at most MOST_ROWS. Outputs and rows that are not
// there are the last one over again, and are not written.
template <class T>
void some_outputs(const LinearJob& job, int64_t output, int64_t first, int64_t end, float* scratch) {
  const int64_t count = std::min<int64_t>(OUTPUTS, job.outputs - output), groups = (end - first + ROWS - 1) / ROWS;
  T bias[SUM_LANES] = {};
  for (int i = 0; i < SUMS && job.bias != nullptr; ++i) {
    bias[i] = static_cast<const T*>(job.bias)[output + std::min<int64_t>(i % OUTPUTS, count - 1)];
  }
  for (int64_t k = 0; k < job.inputs; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, job.inputs - k);
    const T* weight[OUTPUTS];
    for (int o = 0; o < OUTPUTS; ++o) weight[o] = job.weight.row<const T>(output + std::min<int64_t>(o, count - 1)) + k;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = first + group * ROWS;
      const float* x[ROWS];
      for (int r = 0; r < ROWS; ++r) x[r] = job.x.row<const float>(std::min(row + r, end - 1)) + k;
      // All groups together ask for the next outputs' weights, each for its share.
      const int64_t share = group * OUTPUTS * depth / groups, pace = std::min<int64_t>(PART, PART * OUTPUTS / groups);
      const T* const next = job.weight.row<const T>(std::min(output + OUTPUTS + share / depth, job.outputs - 1)) + k;
      Floats sums[SUMS];
      float* const kept = scratch + group * SUMS * PART;
#pragma GCC unroll 32
      for (int i = 0; i < SUMS; ++i) sums[i] = k == 0 ? Floats{} : decode(kept + i * PART);
      multiply<T>(sums, x, weight, next + share % depth, pace, depth);
      if (k + DEPTH < job.inputs) {
#pragma GCC unroll 32
        for (int i = 0; i < SUMS; ++i) encode(kept + i * PART, sums[i]);
        continue;
      }
      float folded[SUM_LANES] = {};
      T out[SUM_LANES];
#pragma GCC unroll 32
      for (int i = 0; i + PART <= SUMS; i += PART) encode(folded + i, fold<PART>(sums + i));
      if constexpr (SUMS % PART != 0) encode(folded + SUMS - SUMS % PART, fold<SUMS % PART>(sums + SUMS - SUMS % PART));
      for (int i = 0; i < SUM_LANES; i += LANES) store_rounded(out + i, load(folded + i) + load(bias + i));
      for (int r = 0; r < ROWS && row + r < end; ++r) {
        T* const to = job.out.row<T>(row + r) + output;
        if (count == OUTPUTS) {
          std::memcpy(to, out + r * OUTPUTS, OUTPUTS * sizeof(T));
        } else {
          std::memcpy(to, out + r * OUTPUTS, count * sizeof(T));
        }
      }
    }
  }
}

template <class T>
void linear(const LinearJob& job, int64_t first_unit, int64_t end_unit) {
  const std::unique_ptr<float[]> scratch(new float[MOST_ROWS / ROWS * SUMS * PART]);
  const int64_t end_output = std::min(end_unit * UNIT, job.outputs);
  for (int64_t unit = first_unit * UNIT; unit < end_output; unit += UNIT) {
    for (int64_t row = 0; row < job.rows; row += MOST_ROWS) {
      const int64_t end = std::min(row + MOST_ROWS, job.rows);
      for (int64_t output = unit; output < std::min(unit + UNIT, end_output); output += OUTPUTS) {
        some_outputs<T>(job, output, row, end, scratch.get());
      }
    }
  }
}

}  // namespace
}  // namespace faststeer
