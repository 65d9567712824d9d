// What a program's tables say about one row, for host and device code alike. Knows no framework. docs/kernels.md is the
// specification; kinds, gate modes and the columns of an entry are those of faststeer/ops/tables.py (a test compares
// them).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTSTEER_INLINE __host__ __device__ __forceinline__
#else
#define FASTSTEER_INLINE inline
#endif

namespace faststeer {

enum Kind : int32_t { ADD, ABLATE, PROJECT, CLAMP, ROTATE, ROTATE_RELATIVE, PROBE, LATCH, N_KINDS };
enum GateMode : int32_t { GATE_NONE, GATE_DOT, GATE_COSINE, GATE_LATCHED };

// One entry as it lies in memory: a line of 64 bytes. `_` is not used.
struct alignas(16) Entry {
  int32_t kind, vector, count, position_low, position_high, gate_mode, gate_vector, gate_state, keep_norm, probe, _[2];
  float a, b, threshold, __;
};
constexpr int N_FIELDS = sizeof(Entry) / sizeof(int32_t), N_SCALARS = 2, N_PLACES = 3;

struct Tables {
  const float* bank;                             // [n_vectors, hidden]
  const Entry* entries;                          // [n_entries]
  const int32_t* ranges;                         // [n_slots, 2], one site's
  const int32_t *slots, *positions, *sequences;  // of the rows
  uint8_t* gate_state;                           // [n_gates, n_sequences] bool, or null; written by latch_ alone
  int32_t n_vectors, n_entries, n_slots, n_gates, n_sequences;
};

// What is known of a row: the slot of its plan, its position counted from the prompt's end, whose row it is.
struct Place {
  int32_t slot, position, sequence;
};

FASTSTEER_INLINE Place place_of(const Tables& tables, int64_t row) {
  return {tables.slots[row], tables.positions[row], tables.sequences[row]};
}

struct Range {
  int32_t first, end;
};

// The entries of a slot, cut to those there are; empty for a slot that does not exist.
FASTSTEER_INLINE Range entries_of(const Tables& tables, int32_t slot) {
  if (slot < 0 || slot >= tables.n_slots) return {0, 0};
  const int32_t first = tables.ranges[2 * int64_t{slot}], count = tables.ranges[2 * int64_t{slot} + 1];
  // Nothing here can overflow, whatever the numbers.
  const int32_t begin = first > 0 ? first : 0, room = tables.n_entries - begin;
  const int32_t left = (count > 0 ? count : 0) + (first < 0 ? first : 0);
  return {begin, begin + (left < room ? left : room)};
}

// As unsigned numbers, negative ones are larger than any that is allowed.
FASTSTEER_INLINE bool in_bank(const Tables& tables, int32_t vector, int32_t count) {
  const uint32_t n = tables.n_vectors;
  return static_cast<uint32_t>(count) - 1u < n && static_cast<uint32_t>(vector) <= n - static_cast<uint32_t>(count);
}

// How many vectors an entry of this kind has; 0: any number.
FASTSTEER_INLINE int32_t vectors_of(int32_t kind) {
  constexpr uint32_t TWO_BITS_EACH = 1u << 2 * ADD | 1u << 2 * CLAMP | 2u << 2 * ROTATE | 2u << 2 * ROTATE_RELATIVE;
  return TWO_BITS_EACH >> 2 * kind & 3u;
}

// Read entry i, 16 bytes at a time. False: it must be skipped, because it points outside the tables or is of no known
// kind.
FASTSTEER_INLINE bool read_entry(const Tables& tables, int64_t i, Entry& entry) {
#if defined(__CUDA_ARCH__)
  int4 quads[sizeof(Entry) / sizeof(int4)];
  for (int j = 0; j < 4; ++j) quads[j] = __ldg(reinterpret_cast<const int4*>(tables.entries + i) + j);
  memcpy(&entry, quads, sizeof(entry));
#else
  entry = tables.entries[i];
#endif
  if (static_cast<uint32_t>(entry.kind) >= N_KINDS || !in_bank(tables, entry.vector, entry.count)) return false;
  const int32_t vectors = vectors_of(entry.kind);
  if (vectors != 0 && vectors != entry.count) return false;
  if (entry.gate_mode == GATE_NONE || entry.gate_mode == GATE_LATCHED) return true;
  return entry.gate_mode >= -GATE_COSINE && entry.gate_mode <= GATE_COSINE && in_bank(tables, entry.gate_vector, 1);
}

FASTSTEER_INLINE bool in_position(const Entry& entry, int32_t position) {
  return entry.position_low <= position && position < entry.position_high;
}

// Sums and products that are rounded each by itself, as the reference has them. (The CPU's compiler is told so, by
// -ffp-contract=off.)
FASTSTEER_INLINE float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTSTEER_INLINE float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// w, what an entry of a and b adds along one of its vectors, from p = h . q. Not of a plane, which has two of each.
FASTSTEER_INLINE float weight_of(int32_t kind, float a, float b, float p) {
  switch (kind) {
    case ADD:
      return a;
    case ABLATE:
      return times(-a, p);
    case CLAMP:
      return fminf(fmaxf(p, a), b) - p;
    default:
      return p;  // PROJECT, which starts from 0 instead of h
  }
}

FASTSTEER_INLINE bool is_plane(int32_t kind) { return kind == ROTATE || kind == ROTATE_RELATIVE; }

// From p_1 and p_2 of a plane, in place, to w_1 and w_2.
FASTSTEER_INLINE void rotate(int32_t kind, float a, float b, float& first, float& second) {
  const float p1 = first, p2 = second;
  if (kind == ROTATE) {
    const float radius = sqrtf(plus(times(p1, p1), times(p2, p2)));
    first = plus(times(radius, a), -p1);
    second = plus(times(radius, b), -p2);
  } else {
    first = plus(plus(times(p1, a), -times(p2, b)), -p1);
    second = plus(plus(times(p1, b), times(p2, a)), -p2);
  }
}

// Where a latched decision stands in gate_state, or -1.
FASTSTEER_INLINE int64_t gate_cell(const Tables& tables, const Entry& entry, int64_t sequence) {
  const bool inside = tables.gate_state != nullptr && entry.gate_state >= 0 && entry.gate_state < tables.n_gates &&
                      sequence >= 0 && sequence < tables.n_sequences;
  return inside ? entry.gate_state * tables.n_sequences + sequence : -1;
}

// The verdict of a dot or cosine gate, from h . d and |h|^2.
FASTSTEER_INLINE bool gate_verdict(const Entry& entry, float dot, float norm_squared) {
  const int32_t mode = entry.gate_mode < 0 ? -entry.gate_mode : entry.gate_mode;
  const float value = mode == GATE_COSINE ? (norm_squared > 0 ? dot / sqrtf(norm_squared) : 0.0f) : dot;
  const bool above = value > entry.threshold;
  return entry.gate_mode < 0 ? !above : above;
}

}  // namespace faststeer
