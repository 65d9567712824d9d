// y = x W^T + b, with weights as a model keeps them, `[outputs, inputs]`, none copied beforehand.
//
// A panel is the weights of WIDTH outputs side by side, `[inputs][WIDTH]` fp32. For every panel:
//   1. DEPTH inputs at a time are written to scratch: little work beside the products as long as there are some rows to
//      share it.
//   2. HEIGHT rows at a time stay in registers, WIDTH sums each, while the inputs go by: two loads of weights an input,
//      and for each row one broadcast and two multiply-adds.
//   3. Sums of DEPTH inputs are added up in fp32; the bias follows, and the result is rounded, once.
// A result depends on its own row and weights alone, never on which rows and outputs are computed beside it. Products
// are fused multiply-adds where the machine has them: the baseline level rounds otherwise.
#pragma once

#include <memory>
#include <utility>

#include "lanes.h"
#include "row.h"
#include "rows.h"

namespace faststeer {
namespace {

constexpr int64_t DEPTH = 512;  // 64 KB of weights at most: every HEIGHT rows they come from the second cache
constexpr int WIDTH = 2 * PART;
constexpr int64_t PREFETCHED = 2;  // outputs of the next panel whose weights are prefetched, every HEIGHT rows
// Rows of which two sums each leave room for two vectors of weights and what is broadcast. 24 sums of 12 rows would fit
// AVX-512's registers and are no faster, and fewer batches are a multiple of 12.
constexpr int HEIGHT = PART == 16 ? 8 : PART == 8 ? 6 : 4;

FASTSTEER_LANES Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Exchange the off-diagonal quarters of every two vectors W apart; after all W, PART vectors are transposed.
template <int W, int... I>
FASTSTEER_LANES void exchange(Floats& x, Floats& y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const Floats low = __builtin_shufflevector(x, y, ((I & W) ? PART + I - W : I)...);
  y = __builtin_shufflevector(x, y, ((I & W) ? PART + I : I + W)...);
#else
  const Words lower = {((I & W) ? PART + I - W : I)...}, upper = {((I & W) ? PART + I : I + W)...};
  const Floats low = __builtin_shuffle(x, y, lower);
  y = __builtin_shuffle(x, y, upper);
#endif
  x = low;
}

template <int W = PART / 2>
FASTSTEER_LANES void transpose(Floats* vectors) {
  for (int i = 0; i < PART; ++i) {
    if ((i & W) == 0) exchange<W>(vectors[i], vectors[i + W], std::make_integer_sequence<int, PART>());
  }
  if constexpr (W > 1) transpose<W / 2>(vectors);
}

// Weights `[count outputs][depth inputs]` at a distance of `stride`, to half a panel `[depth][first PART of WIDTH]`;
// outputs behind `count` zero.
template <class T>
void pack_half(float* panel, const T* weight, int64_t stride, int64_t count, int64_t depth) {
  int64_t k = 0;
  for (; k + PART <= depth; k += PART) {
    Floats block[PART];
    for (int i = 0; i < PART; ++i) block[i] = i < count ? decode(weight + i * stride + k) : Floats{};
    transpose(block);
    for (int i = 0; i < PART; ++i) encode(panel + (k + i) * WIDTH, block[i]);
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < PART; ++i) {
      T one[PART] = {};
      if (i < count) one[0] = weight[i * stride + k];
      panel[k * WIDTH + i] = decode(one)[0];
    }
  }
}

// One panel of the inputs from `k` on.
template <class T>
void pack(float* panel, const LinearJob& job, int64_t unit, int64_t k, int64_t depth) {
  const Rows& weight = job.weight;
  for (int64_t half = 0; half < WIDTH; half += PART) {
    const int64_t first = unit * WIDTH + half;
    pack_half(panel + half, weight.row<const T>(first) + k, weight.stride, job.outputs - first, depth);
  }
}

// sums `[ROWS][WIDTH]` += (or = where FIRST) ROWS rows of x times the panel.
template <int ROWS, bool FIRST>
void multiply(float* sums, const float* x, int64_t stride, const float* panel, int64_t depth) {
  Floats total[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = Floats{};
  for (int64_t k = 0; k < depth; ++k, panel += WIDTH) {
    const Floats low = decode(panel), high = decode(panel + PART);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Floats one = x[r * stride + k] - Floats{};  // broadcast; adding zero would be an addition
      total[r][0] = multiply_add(one, low, total[r][0]);
      total[r][1] = multiply_add(one, high, total[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* const to = sums + r * WIDTH;
    encode(to, FIRST ? total[r][0] : decode(to) + total[r][0]);
    encode(to + PART, FIRST ? total[r][1] : decode(to + PART) + total[r][1]);
  }
}

template <bool FIRST, int ROWS = HEIGHT>
FASTSTEER_LANES void multiply_some(int64_t rows, float* sums, const float* x, int64_t stride, const float* panel,
                                   int64_t depth) {
  if (rows == ROWS) {
    multiply<ROWS, FIRST>(sums, x, stride, panel, depth);
  } else if constexpr (ROWS > 1) {
    multiply_some<FIRST, ROWS - 1>(rows, sums, x, stride, panel, depth);
  }
}

// Ask for the weights of one output in each half of a panel to be brought from memory: packing reads too many rows at
// once for the processor to see them coming.
template <class T>
FASTSTEER_LANES void prefetch(const LinearJob& job, int64_t unit, int64_t output, int64_t k, int64_t depth) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t from = unit * WIDTH + output; from < (unit + 1) * WIDTH; from += PART) {
    for (int64_t i = 0; i < depth && from < job.outputs; i += LINE) {
      __builtin_prefetch(job.weight.row<const T>(from) + k + i);
    }
  }
}

// The sums `[rows][WIDTH]` of a panel, which has room for DEPTH inputs.
template <class T>
void products(const LinearJob& job, int64_t unit, float* panel, float* sums) {
  for (int64_t k = 0; k < job.inputs; k += DEPTH) {
    const int64_t depth = job.inputs - k < DEPTH ? job.inputs - k : DEPTH;
    pack<T>(panel, job, unit, k, depth);
    int64_t prefetched = 0;
    for (int64_t row = 0; row < job.rows; row += HEIGHT) {
      const int64_t rows = job.rows - row < HEIGHT ? job.rows - row : HEIGHT;
      for (int64_t i = 0; i < PREFETCHED && prefetched < PART; ++i, ++prefetched) prefetch<T>(job, unit + 1, prefetched, k, depth);
      const float* const x = job.x.row<const float>(row) + k;
      if (k == 0) {
        multiply_some<true>(rows, sums + row * WIDTH, x, job.x.stride, panel, depth);
      } else {
        multiply_some<false>(rows, sums + row * WIDTH, x, job.x.stride, panel, depth);
      }
    }
  }
}

// The first `count` of PART values, rounded.
template <class T>
FASTSTEER_LANES void write_some(T* to, Floats value, int64_t count) {
  T copy[LANES] = {};
  Lanes lanes = all(0);
  lanes.part[0] = value;
  if (count >= PART && PARTS == 1) return store_rounded(to, lanes);
  store_rounded(copy, lanes);
  std::memcpy(to, copy, (count < PART ? count : PART) * sizeof(T));
}

// Units are panels.
template <class T>
void linear(const LinearJob& job, int64_t first_unit, int64_t end_unit) {
  const std::unique_ptr<float[]> scratch(new float[(DEPTH + job.rows) * WIDTH]);
  float *const panel = scratch.get(), *const sums = panel + DEPTH * WIDTH;
  for (int64_t unit = first_unit; unit < end_unit; ++unit) {
    products<T>(job, unit, panel, sums);
    const int64_t first = unit * WIDTH, count = job.outputs - first;
    T bias[WIDTH] = {};
    if (job.bias != nullptr) {
      std::memcpy(bias, static_cast<const T*>(job.bias) + first, (count < WIDTH ? count : WIDTH) * sizeof(T));
    }
    const Floats low = decode(bias), high = decode(bias + PART);
    for (int64_t row = 0; row < job.rows; ++row) {
      const Floats a = decode(sums + row * WIDTH), b = decode(sums + row * WIDTH + PART);
      T* const to = job.out.row<T>(row) + first;
      write_some(to, a + low, count);
      if (count > PART) write_some(to + PART, b + high, count - PART);
    }
  }
}

// x to fp32. Units are rows.
template <class T>
void widen(const WidenJob& job, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    const T* const from = static_cast<const T*>(job.x) + row * job.stride;
    float* const to = job.to + row * job.inputs;
    each_block(job.inputs, [=](int64_t k, auto block) { store(to + k, load(from + k, block), block); });
  }
}

}  // namespace
}  // namespace faststeer
