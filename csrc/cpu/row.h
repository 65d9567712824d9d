// One row: the entries of its slot applied to its fp32 values, as docs/kernels.md says.
//
// The row is visited as few times as its entries allow: what an entry adds is noted and added when the row is next
// looked at, so that loading, adding and the next entry's dot product are one visit, and adding and storing another. An
// `Add` alone is one visit from memory to memory, an `Ablate` two. Between visits the row waits in a scratch buffer in
// the nearest cache, if anything has been added to what memory has. Each element sees the same additions in the same
// order however they are put together.
//
// Cannot do rows longer than MAX_HIDDEN, nor fp64.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "lanes.h"
#include "rows.h"

namespace faststeer {
namespace {

// What bf16 rows that share an addition add, w q: taken apart as the rows will be, and with no NaN that has anything in
// its lower half. A sum of such and a bf16 has none either, so that rounding it needs no care.
class Addend {
 public:
  // Null where the row before had another: making it for one row would cost more than it saves.
  const float* of(float w, const float* q, int64_t hidden) {
    if (w != w_ || q != q_) {
      w_ = w;
      q_ = q;
      made_ = false;
      return nullptr;
    }
    if (!made_) make(hidden);
    return values_;
  }

 private:
  void make(int64_t hidden) {
    float product[2 * PART];
    int64_t i = 0;
    for (; i + 2 * LANES <= hidden; i += 2 * LANES) {
      for (int64_t k = i; k < i + 2 * LANES; k += 2 * PART) {
        multiply(product, k, 2 * PART);
        for (int j = 0; j < PART; ++j) {
          values_[k + j] = product[2 * j];
          values_[k + PART + j] = product[2 * j + 1];
        }
      }
    }
    multiply(values_ + i, i, hidden - i);
    made_ = true;
  }

  void multiply(float* to, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const float product = w_ * q_[first + i];
      to[i] = product == product ? product : std::numeric_limits<float>::quiet_NaN();
    }
  }

  float w_ = 0;
  const float* q_ = nullptr;
  bool made_ = false;
  alignas(64) float values_[MAX_HIDDEN];
};

// A visit of a row that several places ask for: a function of its own, with all that it calls inlined, which a compiler
// left to itself finds too much.
#define FASTSTEER_VISIT __attribute__((noinline, flatten))

// A row that is being steered. It starts as x, or, where there is a residual, as x + residual rounded to T.
template <class T>
class Row {
 public:
  Row(const RowArguments& job, int64_t row, float* buffer)
      : x_(job.x.row<const T>(row)),
        residual_(job.residual.data != nullptr ? job.residual.row<const T>(row) : nullptr),
        h_(buffer),
        hidden_(job.hidden_size) {}

  // h . q
  FASTSTEER_VISIT float dot(const float* q) {
    return total([=](int64_t i, auto block, Lanes value) { return value * load(q + i, block); });
  }

  // |h|^2
  FASTSTEER_VISIT float norm_squared() {
    return total([](int64_t, auto, Lanes value) { return value * value; });
  }

  void clear() {
    std::memset(h_, 0, hidden_ * sizeof(float));
    settle();
  }

  // h <- h + w q
  void add(float w, const float* q) {
    if (n_terms_ == MAX_TERMS) {
      keep([](Lanes value) { return value; });
    }
    terms_[n_terms_++] = {w, q};
  }

  // h <- factor h, once its norm has been taken, which leaves nothing to be added.
  FASTSTEER_VISIT void scale(float factor) {
    keep([=](Lanes value) { return value * all(factor); });
  }

  // h rounded to T
  FASTSTEER_METHOD void write(T* out) const {
    with_values([&](auto value) {
      each_two_blocks(
          hidden_,
          [=](int64_t i) {
            prefetch_to_write(out + i);
            store_two_rounded(out + i, value(i, Whole{}), value(i + LANES, Whole{}));
          },
          [=](int64_t i, auto block) { store_rounded(out + i, value(i, block), block); });
    });
  }

  // h rounded to T, where T is bf16 and h is x + w q as that of the row before. False where not, and nothing is written.
  FASTSTEER_METHOD bool write_sum(T* out, Addend& addend) const {
    if constexpr (std::is_same_v<T, BFloat>) {
      if (residual_ != nullptr || settled_ || n_terms_ != 1) return false;
      const float* const sum = addend.of(terms_[0].w, terms_[0].q, hidden_);
      if (sum == nullptr) return false;
      const T* const x = x_;
      each_two_blocks(
          hidden_,
          [=](int64_t i) {
            prefetch_to_write(out + i);
#pragma GCC unroll 4
            for (int64_t k = i; k < i + 2 * LANES; k += 2 * PART) {
              const Apart values = take_apart(x + k);
              put_together(out + k, {values.even + decode(sum + k), values.odd + decode(sum + k + PART)});
            }
          },
          [=](int64_t i, auto block) { store_rounded(out + i, load(x + i, block) + load(sum + i, block), block); });
      return true;
    }
    return false;
  }

  // h rounded to T, also in the buffer; returns the sum of its squares.
  FASTSTEER_METHOD float write_rounded(T* out) {
    float* const h = h_;
    float result = 0;
    with_values([&](auto value) {
      result = sum_blocks(hidden_, [=](int64_t i, auto block) {
        const Lanes rounded = round_to<T>(value(i, block));
        store(out + i, rounded, block);
        store(h + i, rounded, block);
        return rounded * rounded;
      });
    });
    return result;
  }

 private:
  struct Term {
    float w;
    const float* q;
  };
  static constexpr int MAX_TERMS = 8;
  // Bytes ahead of which memory hears that it will be written, so that a store does not wait for what it overwrites. 512
  // to 12288 were tried on Zen 5: less leaves stores waiting, more gains nothing and takes more of a first cache.
  static constexpr int64_t AHEAD = 4096;
  static constexpr int64_t CACHE_LINE = 64;

  // Two blocks from `out` on are about to be written.
  FASTSTEER_METHOD static void prefetch_to_write(T* out) {
    constexpr int64_t SIZE = 2 * LANES * sizeof(T);
    for (int64_t i = 0; i < SIZE; i += CACHE_LINE) __builtin_prefetch(reinterpret_cast<char*>(out) + AHEAD + i, 1);
  }

  // use(value), where value(first column, Whole or Some) gives h. What it reads are copies, for a compiler that cannot
  // know that the row's stores leave this object alone; and the few forms a row can have are apart, so that none pays
  // in its loop for another.
  template <class Use>
  FASTSTEER_METHOD void with_values(Use use) const {
    if (settled_) {
      const float* const h = h_;
      with_terms([=](int64_t i, auto block) { return load(h + i, block); }, use);
    } else if (const T* const x = x_, * const residual = residual_; residual != nullptr) {
      with_terms([=](int64_t i, auto block) { return round_to<T>(load(x + i, block) + load(residual + i, block)); },
                 use);
    } else {
      with_terms([=](int64_t i, auto block) { return load(x + i, block); }, use);
    }
  }

  // Each product is rounded before it is added.
  template <class Value, class Use>
  FASTSTEER_METHOD void with_terms(Value value, Use use) const {
    if (n_terms_ == 0) {
      use(value);
    } else if (n_terms_ == 1) {
      const Term term = terms_[0];
      use([=](int64_t i, auto block) { return value(i, block) + all(term.w) * load(term.q + i, block); });
    } else {
      const Term* const terms = terms_;
      const int n_terms = n_terms_;
      use([=](int64_t i, auto block) {
        Lanes sum = value(i, block);
#pragma GCC unroll 1
        for (int k = 0; k < n_terms; ++k) sum = sum + all(terms[k].w) * load(terms[k].q + i, block);
        return sum;
      });
    }
  }

  // Each value of h becomes make(value); nothing is left to be added.
  template <class Make>
  FASTSTEER_METHOD void keep(Make make) {
    float* const h = h_;
    with_values([&](auto value) {
      each_block(hidden_, [=](int64_t i, auto block) { store(h + i, make(value(i, block)), block); });
    });
    settle();
  }

  // The sum of what the sink returns. What had to be put together is kept: after this, nothing is left to be added.
  template <class Sink>
  FASTSTEER_METHOD float total(Sink sink) {
    const bool keeps = n_terms_ > 0 || (residual_ != nullptr && !settled_);
    float* const h = h_;
    float result = 0;
    with_values([&](auto value) {
      if (keeps) {
        result = sum_blocks(hidden_, [=](int64_t i, auto block) {
          const Lanes kept = value(i, block);
          store(h + i, kept, block);
          return sink(i, block, kept);
        });
      } else {
        result = sum_blocks(hidden_, [=](int64_t i, auto block) { return sink(i, block, value(i, block)); });
      }
    });
    if (keeps) settle();
    return result;
  }

  void settle() {
    settled_ = true;
    n_terms_ = 0;
  }

  const T* x_;
  const T* residual_;
  float* h_;
  int64_t hidden_;
  bool settled_ = false;  // h_ holds the row, but for the terms
  int n_terms_ = 0;
  Term terms_[MAX_TERMS];
};

// The numbers p_k and w_k of one entry. Few directions need no memory of their own; a subspace of any size works.
class Weights {
 public:
  float* of(int64_t count) {
    if (count <= FEW) return few_;
    if (count > room_) {
      many_.reset(new float[count]);
      room_ = count;
    }
    return many_.get();
  }

 private:
  static constexpr int64_t FEW = 64;
  float few_[FEW];
  std::unique_ptr<float[]> many_;
  int64_t room_ = 0;
};

// From p_k = h . q_k, in place, to w_k: what the entry adds along each direction. False: nothing changes.
inline bool weigh(const Entry& entry, float* p) {
  if (entry.kind == PROJECT) return true;
  if (is_plane(entry.kind)) {
    rotate(entry.kind, entry.a, entry.b, p[0], p[1]);
  } else {
    for (int32_t k = 0; k < entry.count; ++k) p[k] = weight_of(entry.kind, entry.a, entry.b, p[k]);
  }
  for (int32_t k = 0; k < entry.count; ++k) {
    if (p[k] != 0) return true;
  }
  return false;
}

inline bool compares(const Entry& entry) { return entry.gate_mode != GATE_NONE && entry.gate_mode != GATE_LATCHED; }

// The verdict of a dot or cosine gate on the row.
template <class Row>
inline bool compare(const Tables& tables, const Entry& entry, Row& h, int64_t hidden) {
  const bool cosine = entry.gate_mode == GATE_COSINE || entry.gate_mode == -GATE_COSINE;
  const float along = h.dot(tables.bank + entry.gate_vector * hidden);
  return gate_verdict(entry, along, cosine ? h.norm_squared() : 0.0f);
}

// Whether the entry may act as far as can be told without the row's values.
inline bool may_act(const Tables& tables, const Entry& entry, const Place& place) {
  if (entry.kind == PROBE || entry.kind == LATCH || !in_position(entry, place.position)) return false;
  if (entry.gate_mode != GATE_LATCHED) return true;
  const int64_t cell = gate_cell(tables, entry, place.sequence);
  return cell >= 0 && tables.gate_state[cell] != 0;
}

// All entries of the row's slot, in order. A row that no entry reads is not loaded. Returns whether any entry changed it.
template <class Row>
inline bool steer_row(const RowArguments& job, int64_t row, Row& h, Weights& weights) {
  const Tables& tables = job.tables;
  const int64_t hidden = job.hidden_size;
  const Place place = place_of(tables, row);
  const Range range = entries_of(tables, place.slot);
  bool changed = false;
  for (int64_t i = range.first; i < range.end; ++i) {
    Entry entry;
    if (!read_entry(tables, i, entry)) continue;
    const bool probes = entry.probe >= 0 && entry.probe < job.probe_columns;
    bool acts = may_act(tables, entry, place);
    if (acts && compares(entry)) acts = compare(tables, entry, h, hidden);
    if (!acts && !probes) continue;

    const float* q = tables.bank + entry.vector * hidden;
    float* p = weights.of(entry.count);
    const bool dots = probes || entry.kind != ADD;
    for (int32_t k = 0; k < entry.count; ++k) p[k] = dots ? h.dot(q + k * hidden) : 0.0f;
    if (probes) {
      const int64_t room = job.probe_columns - entry.probe;
      const int64_t count = entry.count < room ? entry.count : room;
      std::memcpy(job.probe + row * job.probe_columns + entry.probe, p, count * sizeof(float));
    }

    if (!acts || !weigh(entry, p)) continue;
    changed = true;
    const float before = entry.keep_norm ? h.norm_squared() : 0.0f;
    if (entry.kind == PROJECT) h.clear();
    for (int32_t k = 0; k < entry.count; ++k) h.add(p[k], q + k * hidden);
    if (entry.keep_norm) {
      const float after = h.norm_squared();
      if (after > 0) h.scale(std::sqrt(before) / std::sqrt(after));
    }
  }
  return changed;
}

}  // namespace
}  // namespace faststeer
