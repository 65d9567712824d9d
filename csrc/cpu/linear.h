// y = x W^T + b, with weights as a model keeps them, `[outputs, inputs]`, none copied beforehand. What it is for: 16-bit
// weights on machines without AVX-512, where PyTorch's product of them is slow.
//
// x is first written in strips of HEIGHT rows side by side, `[inputs][HEIGHT]` fp32. Then, for every sixteen outputs:
//   1. DEPTH inputs at a time, the weights of the sixteen are written side by side, `[inputs][16]` fp32, into the first
//      cache: little work beside the products as long as there are some rows to share it.
//   2. HEIGHT rows at a time stay in registers, sixteen sums each, while the inputs go by: one load of weights and one
//      broadcast of x an input.
//   3. Sums of DEPTH inputs are added up in fp32; the bias is added and the result rounded, once.
// A result depends on its own row and weights alone, never on which rows and outputs are computed beside it. Products
// are fused multiply-adds where the machine has them: the baseline level rounds otherwise.
#pragma once

#include <memory>
#include <utility>

#include "lanes.h"
#include "rows.h"

namespace faststeer {
namespace {

constexpr int64_t DEPTH = 256;  // 16 KB of weights, half of a first cache
// As many rows as there are registers for, beside a block of weights and what is broadcast.
constexpr int HEIGHT = PART == 16 ? 14 : PART == 8 ? 6 : 2;

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

// Weights `[count outputs][depth inputs]` at a distance of `stride`, to panel `[depth][16]`; outputs behind `count` zero.
template <class T>
void pack(float* panel, const T* weight, int64_t stride, int64_t count, int64_t depth) {
  for (int64_t first = 0; first < LANES; first += PART) {
    int64_t k = 0;
    for (; k + PART <= depth; k += PART) {
      Floats block[PART];
      for (int i = 0; i < PART; ++i) {
        block[i] = first + i < count ? decode(weight + (first + i) * stride + k) : Floats{};
      }
      transpose(block);
      for (int i = 0; i < PART; ++i) encode(panel + (k + i) * LANES + first, block[i]);
    }
    for (; k < depth; ++k) {
      for (int i = 0; i < PART; ++i) {
        T one[PART] = {};
        if (first + i < count) one[0] = weight[(first + i) * stride + k];
        panel[k * LANES + first + i] = decode(one)[0];
      }
    }
  }
}

// sums `[ROWS][16]` += (or = where FIRST) a strip's first ROWS rows `[depth][HEIGHT]` times the panel.
template <int ROWS, bool FIRST>
void multiply(float* sums, const float* strip, const float* panel, int64_t depth) {
  Lanes total[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) total[r] = all(0);
  for (int64_t k = 0; k < depth; ++k, strip += HEIGHT, panel += LANES) {
    const Lanes weights = load(panel);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Floats one = Floats{} + strip[r];
      FASTSTEER_PARTS(total[r].part[i] = multiply_add(one, weights.part[i], total[r].part[i]));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* const to = sums + r * LANES;
    store(to, FIRST ? total[r] : load(to) + total[r]);
  }
}

template <bool FIRST, int ROWS = HEIGHT>
FASTSTEER_LANES void multiply_some(int64_t rows, float* sums, const float* strip, const float* panel, int64_t depth) {
  if (rows == ROWS) {
    multiply<ROWS, FIRST>(sums, strip, panel, depth);
  } else if constexpr (ROWS > 1) {
    multiply_some<FIRST, ROWS - 1>(rows, sums, strip, panel, depth);
  }
}

// The sums `[rows][16]` of the outputs from `first` on, of which there are `count`.
template <class T>
void products(const LinearJob& job, int64_t first, int64_t count, float* panel, float* sums) {
  for (int64_t k = 0; k < job.inputs; k += DEPTH) {
    const int64_t depth = job.inputs - k < DEPTH ? job.inputs - k : DEPTH;
    pack(panel, static_cast<const T*>(job.weight) + first * job.weight_stride + k, job.weight_stride, count, depth);
    for (int64_t row = 0; row < job.rows; row += HEIGHT) {
      const int64_t rows = job.rows - row < HEIGHT ? job.rows - row : HEIGHT;
      const float* const strip = job.strips + row * job.inputs + k * HEIGHT;
      float* const to = sums + row * LANES;
      if (k == 0) {
        multiply_some<true>(rows, to, strip, panel, depth);
      } else {
        multiply_some<false>(rows, to, strip, panel, depth);
      }
    }
  }
}

// Units are sixteens of outputs.
template <class T>
void linear(const LinearJob& job, int64_t first_unit, int64_t end_unit) {
  const std::unique_ptr<float[]> scratch(new float[(DEPTH + job.rows) * LANES]);
  float *const panel = scratch.get(), *const sums = panel + DEPTH * LANES;
  for (int64_t unit = first_unit; unit < end_unit; ++unit) {
    const int64_t first = unit * LANES, count = job.outputs - first < LANES ? job.outputs - first : LANES;
    const Some some{count};
    products<T>(job, first, count, panel, sums);
    const Lanes bias = job.bias == nullptr ? all(0) : load(static_cast<const T*>(job.bias) + first, some);
    for (int64_t row = 0; row < job.rows; ++row) {
      T* const to = static_cast<T*>(job.out) + row * job.outputs + first;
      store_rounded(to, load(sums + row * LANES) + bias, some);
    }
  }
}

// Units are strips of HEIGHT rows of x; rows behind the last are zero.
template <class T>
void write_strips(const StripsJob& job, int64_t first_unit, int64_t end_unit) {
  for (int64_t unit = first_unit; unit < end_unit; ++unit) {
    float* const to = job.to + unit * HEIGHT * job.inputs;
    for (int64_t r = 0; r < HEIGHT; ++r) {
      const int64_t row = unit * HEIGHT + r;
      const T* const from = static_cast<const T*>(job.x) + row * job.stride;
      each_block(row < job.rows ? job.inputs : 0, [=](int64_t k, auto block) {
        float values[LANES];
        store(values, load(from + k, block));
        for (int64_t i = 0; i < LANES && k + i < job.inputs; ++i) to[(k + i) * HEIGHT + r] = values[i];
      });
      for (int64_t k = row < job.rows ? job.inputs : 0; k < job.inputs; ++k) to[k * HEIGHT + r] = 0;
    }
  }
}

}  // namespace
}  // namespace faststeer
