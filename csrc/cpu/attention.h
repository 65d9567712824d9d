// Attention of one new token per sequence, a group of query heads that share their keys and values at a time.
//
// For each sequence and each head of keys:
//   0. rotary_attention_ only: the query and the new key are rotated to their position, and key and value go to the cache.
//   1. The columns that the mask leaves: what it hides at either end is not read.
//   2. A tile of columns after the other, keys and values once for the whole group: scores q . k, then their exponents
//      against the largest score so far, then the values weighted by them; what was summed before is scaled down when a
//      larger score turns up (Milakov and Gimelshein, 2018).
//   3. The sum over the sum of weights, rounded to the dtype.
// All in fp32, sums in an order that depends on nothing but the sizes: the same bits at every instruction set level.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "lanes.h"
#include "row.h"
#include "rows.h"

namespace faststeer {
namespace {

// Columns of a tile: keys and values of a head of 128 numbers stay in the second cache, scores in the first.
constexpr int64_t TILE = 128;

// Heads whose values are added up together, read once: as many as the registers hold sums for.
constexpr int TOGETHER = PARTS == 1 ? 2 : 1;

// One step of adding up several vectors' lanes side by side: x and y hold groups of 2 W lanes, the result their groups
// folded to W, x's first.
template <int W, int... I>
FASTSTEER_LANES Floats fold(Floats x, Floats y, std::integer_sequence<int, I...>) {
#define FASTSTEER_FROM(i) (((i) / W < PART / (2 * W) ? 0 : PART / 2) * 2 + ((i) / W % (PART / (2 * W))) * 2 * W + (i) % W)
#if defined(__clang__)
  return __builtin_shufflevector(x, y, FASTSTEER_FROM(I)...) + __builtin_shufflevector(x, y, (FASTSTEER_FROM(I) + W)...);
#else  // GCC has the other from version 12 on
  const Words even = {FASTSTEER_FROM(I)...}, odd = {(FASTSTEER_FROM(I) + W)...};
  return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, odd);
#endif
#undef FASTSTEER_FROM
}

template <int W>
FASTSTEER_LANES void fold_all(Floats* vectors, int count) {
  for (int i = 0; i < count / 2; ++i) {
    vectors[i] = fold<W>(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, PART>());
  }
  if constexpr (W > 1) fold_all<W / 2>(vectors, count / 2);
}

// Lane i is sum(from[i]), added in the same order.
FASTSTEER_LANES Lanes sums(const Lanes (&from)[LANES]) {
  Lanes result;
  for (int part = 0; part < PARTS; ++part) {
    Floats vectors[PART];
    for (int i = 0; i < PART; ++i) {
      Lanes lanes = from[part * PART + i];
      for (int width = PARTS / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) lanes.part[k] += lanes.part[k + width];
      }
      vectors[i] = lanes.part[0];
    }
    fold_all<PART / 2>(vectors, PART);
    result.part[part] = vectors[0];
  }
  return result;
}

// e^x for x <= 0, to a few units in the last place; 0 below -87, where it is less than the smallest normal number. NaN
// stays. x = n log 2 + r with |r| <= log(2) / 2, and e^r by its Taylor polynomial, whose error there is below 2^-27.
FASTSTEER_LANES Floats exponential(Floats x) {
  constexpr float SHIFT = 0x1.8p23f;  // adding it rounds to a whole number, which then is in the low bits
  const Floats shifted = x * 0x1.715476p+0f + SHIFT, n = shifted - SHIFT;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3F800000;
  return x < -87.0f ? Floats{} : p * reinterpret_cast<Floats>(power);
}

FASTSTEER_LANES Lanes exponential(Lanes x) {
  FASTSTEER_PARTS(x.part[i] = exponential(x.part[i]));
  return x;
}

// The larger of each two; of NaN and a number, either.
FASTSTEER_LANES Lanes larger(Lanes a, Lanes b) {
  FASTSTEER_PARTS(a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i]);
  return a;
}

// The query heads that share one head of keys and values.
template <class T>
class Group {
 public:
  // `scratch`: room for scratch(job) numbers.
  Group(const AttentionJob& job, float* scratch)
      : job_(job),
        query_(scratch),
        sum_(query_ + job.group * job.key_size),
        peak_(sum_ + job.group * job.value_size),
        weight_(peak_ + job.group),
        scores_(weight_ + job.group),
        rotated_(scores_ + job.group * TILE),
        mask_(rotated_ + 2 * job.key_size) {
    std::memset(mask_, 0, (job.columns + LANES) * sizeof(float));
  }

  static int64_t scratch(const AttentionJob& job) {
    return job.group * (job.key_size + job.value_size + 2 + TILE) + 2 * job.key_size + job.columns + LANES;
  }

  void attend(int64_t row, int64_t head) {
    if (row != row_) {
      row_ = row;
      job_.mask == nullptr ? make_mask(row) : read_mask(row);
    }
    if (job_.column != nullptr && job_.tokens == 1) keep_new(row, head);
    begin(row, head);
    for (int64_t tile = first_; tile < end_; tile += TILE) {
      const int64_t count = end_ - tile < TILE ? end_ - tile : TILE;
      const T* keys = job_.keys.at<T>(row / job_.tokens, head) + tile * job_.keys.column;
      const T* values = job_.values.at<T>(row / job_.tokens, head) + tile * job_.values.column;
      prefetch(values, count);
      // Each step for the whole group: none of its heads waits for another.
      for (int64_t g = 0; g < job_.group; ++g) score(g, keys, mask_ + tile, count);
      for (int64_t g = 0; g < job_.group; ++g) weigh(g, count);
      int64_t g = 0;
      for (; g + TOGETHER <= job_.group; g += TOGETHER) add<TOGETHER>(g, values, count);
      for (; g < job_.group; ++g) add<1>(g, values, count);
    }
    write(row, head);
  }

  // A row's own key and value go to the cache.
  void keep_new(int64_t row, int64_t head) {
    const int64_t column = job_.column[row];
    T* const key = const_cast<T*>(job_.keys.at<T>(row / job_.tokens, head)) + column * job_.keys.column;
    T* const value = const_cast<T*>(job_.values.at<T>(row / job_.tokens, head)) + column * job_.values.column;
    float* const rotated = rotated_;
    rotate(job_.key.at<T>(row, head), row, rotated);
    each_block(job_.key_size, [=](int64_t i, auto block) { store(key + i, load(rotated + i, block), block); });
    std::memcpy(value, job_.value.at<T>(row, head), job_.value_size * sizeof(T));
  }

 private:
  static constexpr float INFINITE = std::numeric_limits<float>::infinity();
  static constexpr float lowest(const float*) { return -std::numeric_limits<float>::max(); }
  static constexpr float lowest(const BFloat*) { return -0x1.fep127f; }
  static constexpr float lowest(const Half*) { return -65504.0f; }

  // Ask for the values of some columns while their scores are computed: each head's are too few, and too far from the
  // next one's, for the processor to see them coming.
  void prefetch(const T* values, int64_t count) const {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t i = 0; i < count * job_.values.column; i += LINE) __builtin_prefetch(values + i);
  }

  // The row's mask with minus infinity for what is hidden, also behind its end; and where it begins and ends.
  void read_mask(int64_t row) {
    const T* from = static_cast<const T*>(job_.mask) + row * job_.mask_stride;
    float* const mask = mask_;
    each_block(job_.columns, [=](int64_t c, auto block) {
      Lanes shift = load(from + c, block);
      FASTSTEER_PARTS(shift.part[i] = shift.part[i] <= lowest(from) ? Floats{} - INFINITE : shift.part[i]);
      store(mask + c, shift, block);
    });
    store(mask + job_.columns, all(-INFINITE));
    for (end_ = job_.columns; end_ > 0 && mask[end_ - 1] == -INFINITE; --end_) {
    }
    for (first_ = 0; first_ < end_ && mask[first_] == -INFINITE; ++first_) {
    }
  }

  // The same where a row looks at its own column and those before, as far as its window: only what stands behind the end
  // is ever read with them.
  void make_mask(int64_t row) {
    std::memset(mask_ + end_, 0, LANES * sizeof(float));
    end_ = job_.column[row] + 1;
    first_ = job_.window > 0 && end_ > job_.window ? end_ - job_.window : 0;
    store(mask_ + end_, all(-INFINITE));
  }

  void begin(int64_t row, int64_t head) {
    const Lanes scaling = all(job_.scaling);
    for (int64_t g = 0; g < job_.group; ++g) {
      float* const to = query_ + g * job_.key_size;
      rotate(job_.query.at<T>(row, head * job_.group + g), row, to);
      each_block(job_.key_size, [=](int64_t i, auto block) { store(to + i, load(to + i, block) * scaling, block); });
      peak_[g] = -INFINITE;
      weight_[g] = 0;
    }
    std::memset(sum_, 0, job_.group * job_.value_size * sizeof(float));
  }

  // The first `rotary` numbers, in two halves (a, b), rotated by their angles: (a cos - b sin, b cos + a sin), each
  // product and sum rounded to the dtype, as PyTorch's operators do; the others as they are.
  void rotate(const T* from, int64_t row, float* to) {
    each_block(job_.key_size, [=](int64_t i, auto block) { store(to + i, load(from + i, block), block); });
    if (job_.rotary == 0) return;
    const int64_t half = job_.rotary / 2;
    float* const across = rotated_ + job_.key_size;
    for (int64_t i = 0; i < half; ++i) across[i] = -to[half + i];
    std::memcpy(across + half, to, half * sizeof(float));
    const T *cosine = row_of<const T>(job_.cosine, row), *sine = row_of<const T>(job_.sine, row);
    each_block(job_.rotary, [=](int64_t i, auto block) {
      const Lanes along = round_to<T>(load(to + i, block) * load(cosine + i, block));
      const Lanes other = round_to<T>(load(across + i, block) * load(sine + i, block));
      store(to + i, round_to<T>(along + other), block);
    });
  }

  // The scores of a tile's columns, minus infinity behind them.
  void score(int64_t g, const T* keys, const float* mask, int64_t count) {
    switch (job_.key_size) {
      case 32:
        return score_sized<2>(g, keys, mask, count);
      case 64:
        return score_sized<4>(g, keys, mask, count);
      case 128:
        return score_sized<8>(g, keys, mask, count);
      default:
        return score_sized<0>(g, keys, mask, count);
    }
  }

  // BLOCKS of sixteen numbers, known to the compiler: a loop over two of them costs more than what it does. 0: any size.
  template <int BLOCKS>
  void score_sized(int64_t g, const T* keys, const float* mask, int64_t count) {
    const float* const query = query_ + g * job_.key_size;
    const int64_t size = job_.key_size, column = job_.keys.column;
    const auto product = [=](const T* key) {
      Lanes sum = all(0);
      if constexpr (BLOCKS == 0) {
        each_block(size, [&](int64_t k, auto block) { sum = sum + load(query + k, block) * load(key + k, block); });
      } else {
#pragma GCC unroll 8
        for (int k = 0; k < BLOCKS; ++k) sum = sum + load(query + k * LANES) * load(key + k * LANES);
      }
      return sum;
    };
    float* const to = scores_ + g * TILE;
    for (int64_t c = 0; c < count; c += LANES) {
      Lanes products[LANES];
      if (count - c >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) products[i] = product(keys + (c + i) * column);
      } else {  // the last column again: the mask hides what lies behind it
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) products[i] = product(keys + (c + i < count ? c + i : count - 1) * column);
      }
      Lanes scores = sums(products);
      if (job_.softcap > 0) scores = capped(scores);
      store(to + c, scores + load(mask + c));
    }
  }

  Lanes capped(Lanes scores) const {
    float each[LANES];
    store(each, scores);
    for (float& one : each) one = job_.softcap * std::tanh(one / job_.softcap);
    return load(each);
  }

  // From a tile's scores to its weights, unnormalised. What is summed already shrinks where the peak is a new one.
  void weigh(int64_t g, int64_t count) {
    float* const scores = scores_ + g * TILE;
    Lanes peaks = all(peak_[g]);
    for (int64_t c = 0; c < count; c += LANES) peaks = larger(load(scores + c), peaks);
    const float peak =
        reduced(peaks, [](Floats a, Floats b) __attribute__((always_inline)) { return a > b ? a : b; });
    const Lanes below = all(peak == -INFINITE ? 0 : -peak);  // nothing but hidden columns, or NaN, so far
    Lanes total = all(0);
    for (int64_t c = 0; c < count; c += LANES) {
      const Lanes weights = exponential(load(scores + c) + below);
      store(scores + c, weights);
      total = total + weights;
    }
    if (peak_[g] < peak && weight_[g] != 0) {
      const Lanes shrink = exponential(all(peak_[g] - peak));
      float* const to = sum_ + g * job_.value_size;
      each_block(job_.value_size, [=](int64_t i, auto block) { store(to + i, load(to + i, block) * shrink, block); });
      weight_[g] *= shrink.part[0][0];
    }
    peak_[g] = peak;
    weight_[g] += sum(total);
  }

  // The weighted values of a tile, for G heads from g on.
  template <int G>
  void add(int64_t g, const T* values, int64_t count) {
    float* const to = sum_ + g * job_.value_size;
    const int64_t size = job_.value_size;
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) add_blocks<4, G>(to + i, g, values + i, count, Whole{});
    for (; i + 2 * LANES <= size; i += 2 * LANES) add_blocks<2, G>(to + i, g, values + i, count, Whole{});
    for (; i + LANES <= size; i += LANES) add_blocks<1, G>(to + i, g, values + i, count, Whole{});
    if (i < size) add_blocks<1, G>(to + i, g, values + i, count, Some{size - i});
  }

  // N blocks of sixteen. Even and odd columns are summed apart: an addition need not wait for the one before.
  template <int N, int G, class Block>
  FASTSTEER_METHOD void add_blocks(float* to, int64_t g, const T* values, int64_t count, Block block) const {
    const float* const weights = scores_ + g * TILE;
    const int64_t size = job_.value_size, column = job_.values.column;
    Lanes even[G][N], odd[G][N];
    for (int h = 0; h < G; ++h) {
      for (int i = 0; i < N; ++i) {
        even[h][i] = load(to + h * size + i * LANES, block);
        odd[h][i] = all(0);
      }
    }
    const auto add_column = [&](Lanes (&sums)[G][N], int64_t c) __attribute__((always_inline)) {
      for (int i = 0; i < N; ++i) {
        const Lanes value = load(values + c * column + i * LANES, block);
        for (int h = 0; h < G; ++h) sums[h][i] = sums[h][i] + all(weights[h * TILE + c]) * value;
      }
    };
    int64_t c = 0;
    for (; c + 2 <= count; c += 2) {
      add_column(even, c);
      add_column(odd, c + 1);
    }
    if (c < count) add_column(even, c);
    for (int h = 0; h < G; ++h) {
      for (int i = 0; i < N; ++i) store(to + h * size + i * LANES, even[h][i] + odd[h][i], block);
    }
  }

  void write(int64_t row, int64_t head) const {
    for (int64_t g = 0; g < job_.group; ++g) {
      const float* const from = sum_ + g * job_.value_size;
      T* const to = static_cast<T*>(job_.out) + (row * job_.heads + head * job_.group + g) * job_.value_size;
      const Lanes factor = all(weight_[g] == 0 ? 0 : 1 / weight_[g]);  // a row that may look at nothing gets zeros
      each_block(job_.value_size, [=](int64_t i, auto block) {
        store_rounded(to + i, load(from + i, block) * factor, block);
      });
    }
  }

  const AttentionJob& job_;
  float *query_, *sum_, *peak_, *weight_, *scores_, *rotated_, *mask_;
  int64_t row_ = -1, first_ = 0, end_ = 0;  // whose mask is read, and the columns it leaves
};

// each(group, row, head) for every unit: heads of keys, of one row after the other.
template <class T, class Each>
FASTSTEER_METHOD void each_head(const AttentionJob& job, int64_t first, int64_t end, Each each) {
  const std::unique_ptr<float[]> scratch(new float[Group<T>::scratch(job)]);
  Group<T> group(job, scratch.get());
  const int64_t heads = job.heads / job.group;
  for (int64_t unit = first; unit < end; ++unit) each(group, unit / heads, unit % heads);
}

template <class T>
void decode_attention(const AttentionJob& job, int64_t first, int64_t end) {
  each_head<T>(job, first, end, [](Group<T>& group, int64_t row, int64_t head) { group.attend(row, head); });
}

// Before attention where a row looks at what others of them write.
template <class T>
void keep_new(const AttentionJob& job, int64_t first, int64_t end) {
  each_head<T>(job, first, end, [](Group<T>& group, int64_t row, int64_t head) { group.keep_new(row, head); });
}

}  // namespace
}  // namespace faststeer
