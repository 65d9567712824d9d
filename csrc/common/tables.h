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
  int64_t n_vectors, n_entries, n_slots, n_gates, n_sequences;
};

struct Range {
  int64_t first, end;
};

struct Entry {
  int32_t kind, vector, count, position_low, position_high, gate_mode, gate_vector, gate_state, keep_norm, probe;
  float a, b, threshold;
};

// The entries of a row's slot, cut to those there are; empty for a slot that does not exist.
FASTSTEER_INLINE Range entries_of(const Tables& tables, int64_t row) {
  const int64_t slot = tables.row_slot[row];
  if (slot < 0 || slot >= tables.n_slots) return {0, 0};
  const int64_t first = tables.ranges[2 * slot];
  const int64_t end = first + tables.ranges[2 * slot + 1];
  return {first < 0 ? 0 : first, end > tables.n_entries ? tables.n_entries : end};
}

FASTSTEER_INLINE bool in_bank(const Tables& tables, int64_t vector, int64_t count) {
  return vector >= 0 && count >= 1 && vector + count <= tables.n_vectors;
}

// Read entry i. False: it must be skipped, because it points outside the tables or is of no known kind.
FASTSTEER_INLINE bool read_entry(const Tables& tables, int64_t i, Entry& entry) {
  const int32_t* f = tables.fields + i * N_FIELDS;
  const float* s = tables.scalars + i * N_SCALARS;
  entry = {f[FIELD_KIND],      f[FIELD_VECTOR],      f[FIELD_COUNT],      f[FIELD_POSITION_LOW], f[FIELD_POSITION_HIGH], f[FIELD_GATE_MODE],
           f[FIELD_GATE_VECTOR], f[FIELD_GATE_STATE], f[FIELD_KEEP_NORM], f[FIELD_PROBE],        s[0],                   s[1],
           s[2]};
  if (entry.kind < 0 || entry.kind >= N_KINDS || !in_bank(tables, entry.vector, entry.count)) return false;
  const bool single = entry.kind == ADD || entry.kind == CLAMP;
  const bool plane = entry.kind == ROTATE || entry.kind == ROTATE_RELATIVE;
  if ((single && entry.count != 1) || (plane && entry.count != 2)) return false;
  const int32_t mode = entry.gate_mode < 0 ? -entry.gate_mode : entry.gate_mode;
  if (mode == GATE_DOT || mode == GATE_COSINE) return in_bank(tables, entry.gate_vector, 1);
  return entry.gate_mode == GATE_NONE || entry.gate_mode == GATE_LATCHED;
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
