// What an entry asks of a row, known before any arithmetic. Knows no framework.
#pragma once

#include "../common/tables.h"
#include "vec.cuh"

namespace faststeer {

// Five registers, because they live as long as the row does. What only a gate or a probe needs is read again there.
struct Request {
  enum : uint32_t {
    MAY_ACT = 1,  // kind, position and latched gate allow it; a dot or cosine gate may still refuse
    PROBES = 2,   // writes at least one probe column
    GATED = 4,    // needs h . d
    NORM = 8,     // needs |h|^2
    KEEPS_NORM = 16,
    KIND_SHIFT = 8,
  };
  int32_t vector, count;
  float a, b;
  uint32_t bits;

  __device__ __forceinline__ bool has(uint32_t any) const { return (bits & any) != 0; }
  __device__ __forceinline__ bool live() const { return has(MAY_ACT | PROBES); }
  __device__ __forceinline__ int32_t kind() const { return static_cast<int32_t>(bits >> KIND_SHIFT); }
};

__device__ __forceinline__ uint32_t bits_of(const Tables& tables, const Entry& e, int32_t row, int32_t position,
                                            int32_t probe_columns) {
  uint32_t bits = static_cast<uint32_t>(e.kind) << Request::KIND_SHIFT;
  if (e.probe >= 0 && e.probe < probe_columns) bits |= Request::PROBES;
  if (e.kind >= PROBE || !in_position(e, position)) return bits;
  bits |= Request::MAY_ACT;
  if (e.keep_norm != 0) bits |= Request::KEEPS_NORM | Request::NORM;
  if (e.gate_mode == GATE_NONE) return bits;
  if (e.gate_mode == GATE_LATCHED) {
    const int64_t cell = gate_cell(tables, e, tables.sequences[row]);
    return cell >= 0 && tables.gate_state[cell] != 0 ? bits : bits & ~uint32_t{Request::MAY_ACT};
  }
  bits |= Request::GATED;
  if (e.gate_mode == GATE_COSINE || e.gate_mode == -GATE_COSINE) bits |= Request::NORM;
  return bits;
}

// Read entry i for this row; `more` says that another follows it, which is asked for at once.
__device__ __forceinline__ Request read_request(const Tables& tables, int32_t i, bool more, int32_t row,
                                                int32_t probe_columns) {
  // With the entry, and not after it: beside it it costs no time. Every time, from L1: so it needs no register.
  const int32_t position = load_now(tables.positions + row);
  Entry e;
  const bool valid = read_entry(tables, i, e);
  if (more) {  // 64 bytes: both of the 32-byte sectors that L1 loads
    prefetch(tables.entries + i + 1);
    prefetch(&tables.entries[i + 1].keep_norm);
  }
  return {e.vector, e.count, e.a, e.b, valid ? bits_of(tables, e, row, position, probe_columns) : 0u};
}

}  // namespace faststeer
