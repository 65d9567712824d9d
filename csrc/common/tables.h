// What a program's tables say about one row, for host and device code alike. Knows no framework. docs/kernels.md is the specification; the column
// numbers are those of faststeer/ops/tables.py (a test compares them).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSTEER_INLINE __host__ __device__ __forceinline__
#else
#define FASTSTEER_INLINE inline
#endif

namespace faststeer {

enum Kind : int32_t { ADD, ABLATE, PROJECT, CLAMP, ROTATE, ROTATE_RELATIVE, PROBE, LATCH, N_KINDS };
enum GateMode : int32_t { GATE_NONE, GATE_DOT, GATE_COSINE, GATE_LATCHED };
enum Field : int32_t {
  FIELD_KIND,
  FIELD_VECTOR,
  FIELD_COUNT,
  FIELD_POSITION_LOW,
  FIELD_POSITION_HIGH,
  FIELD_GATE_MODE,
  FIELD_GATE_VECTOR,
  FIELD_GATE_STATE,
  FIELD_KEEP_NORM,
  FIELD_PROBE,
};
constexpr int N_FIELDS = 12;
constexpr int N_SCALARS = 4;

struct Tables {
  const float* bank;          // [n_vectors, hidden]
  const int32_t* fields;      // [n_entries, N_FIELDS]
  const float* scalars;       // [n_entries, N_SCALARS]
  const int32_t* ranges;      // [n_slots, 2], one site's
  const int32_t* row_slot;    // [rows]
  const int32_t* row_position;
  const int32_t* row_sequence;
  const uint8_t* gate_state;  // [n_gates, n_sequences] bool, or null
  int32_t n_vectors, n_entries, n_slots, n_gates, n_sequences;
};

struct Range {
  int32_t first, end;
};

struct Entry {
  int32_t kind, vector, count, position_low, position_high, gate_mode, gate_vector, gate_state, keep_norm, probe;
  float a, b, threshold;
};

// The entries of a row's slot, cut to those there are; empty for a slot that does not exist.
FASTSTEER_INLINE Range entries_of(const Tables& tables, int64_t row) {
  const int32_t slot = tables.row_slot[row];
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

// Read entry i. False: it must be skipped, because it points outside the tables or is of no known kind.
FASTSTEER_INLINE bool read_entry(const Tables& tables, int64_t i, Entry& entry) {
  const int32_t* f = tables.fields + i * N_FIELDS;
  const float* s = tables.scalars + i * N_SCALARS;
  entry = {f[FIELD_KIND],      f[FIELD_VECTOR],      f[FIELD_COUNT],      f[FIELD_POSITION_LOW], f[FIELD_POSITION_HIGH], f[FIELD_GATE_MODE],
           f[FIELD_GATE_VECTOR], f[FIELD_GATE_STATE], f[FIELD_KEEP_NORM], f[FIELD_PROBE],        s[0],                   s[1],
           s[2]};
  if (static_cast<uint32_t>(entry.kind) >= N_KINDS || !in_bank(tables, entry.vector, entry.count)) return false;
  const int32_t vectors = vectors_of(entry.kind);
  if (vectors != 0 && vectors != entry.count) return false;
  if (entry.gate_mode == GATE_NONE || entry.gate_mode == GATE_LATCHED) return true;
  return entry.gate_mode >= -GATE_COSINE && entry.gate_mode <= GATE_COSINE && in_bank(tables, entry.gate_vector, 1);
}

FASTSTEER_INLINE bool in_position(const Entry& entry, int32_t position) {
  return entry.position_low <= position && position < entry.position_high;
}

// Where a latched decision stands in gate_state, or -1.
FASTSTEER_INLINE int64_t gate_cell(const Tables& tables, const Entry& entry, int64_t sequence) {
  const bool inside = tables.gate_state != nullptr && entry.gate_state >= 0 && entry.gate_state < tables.n_gates && sequence >= 0 &&
                      sequence < tables.n_sequences;
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
