// The row kernel: optional residual add, any number of interventions, optional RMSNorm, in one pass over device memory.
// Knows no framework; docs/kernels.md is the specification. It compiles, and runs on the host under
// tests/cuda/host_emulation; no GPU has run it yet.
//
// A row belongs to one warp or to one block (common/launch.h says when). A thread holds 8, 16 or 32 of its columns as
// fp32 in registers from the first load to the last store. Per row:
//   1. Issue the loads of x and residual, ask for the norm's weight, then follow slot -> range -> first entry ->
//      first vector while they are under way. In place, follow slot -> range first: most rows have no entries.
//   2. s = x, or x + residual rounded; h = s in fp32.
//   3. For each entry: what its kind, position and latched gate forbid is dropped before any vector is read. Dots, gate
//      dot and |h|^2 are summed together, with one barrier. Then the weights, the same bits in every thread, and
//      h <- h + sum_k w_k q_k.
//   4. Round and store h. A row that nothing acted on is copied, or, in place, left alone.
//   5. RMSNorm from the rounded row.
//
// An entry of one vector keeps it in registers between dot and axpy (not on the scalar path with 32 columns, which has
// none to spare). An entry of more sums the dots of CHUNK vectors with one barrier and reads each vector again for the
// axpy, which L1 should answer. All its dots must be of the h that it finds, so beyond one CHUNK the sum collects in
// shared memory; a second register array would cost every row its registers. The two vectors of a plane have a way of their
// own where the row's size is known: one sum for both dots.
//
// What it cannot do: hidden sizes above MAX_HIDDEN; a row across several blocks (one row leaves most of the chip idle);
// dots in anything but fp32; bank rows narrower than fp32. At 16,384 columns one row fills a multiprocessor's
// registers, so that its loads, sums and stores do not overlap another's.
#pragma once

#include "entry.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace faststeer {

// A sum in N chains, 1, 2 or 4: of four, no addition waits for the one before it.
template <int N>
struct ChainsOf {
  float sum[N] = {};
  __device__ __forceinline__ void add(int i, float a, float b) { sum[i % N] += a * b; }
  __device__ __forceinline__ float total() const {
    if constexpr (N == 1)
      return sum[0];
    else if constexpr (N == 2)
      return sum[0] + sum[1];
    else
      return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

// Chains of each of two sums at once, such that nothing is spilled (seen: ptxas of CUDA 13.0).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int CHAINS_OF_TWO = 4;
#else
constexpr int CHAINS_OF_TWO = 2;
#endif

// HIDDEN: the row's size where it is known and fills its threads, which spares a third of the instructions; else 0.
template <typename T, int ELEMENTS, int VECTORS, int HIDDEN>
struct Row {
  static constexpr int COLUMNS = ELEMENTS * VECTORS;
  static constexpr int THREADS = HIDDEN / COLUMNS;
  static_assert(HIDDEN == 0 || (THREADS > WARP && THREADS % WARP == 0 && THREADS * COLUMNS == HIDDEN && ELEMENTS > 1));
  static constexpr bool KEEPS_VECTOR = ELEMENTS > 1 || COLUMNS == FEWEST_COLUMNS;
  // Numbers of shared memory per thread; the four keep the 16-byte accesses of neighbours in different banks.
  static constexpr int STASH = COLUMNS + 4;
  static constexpr int KEPT = KEEPS_VECTOR ? COLUMNS : 1;
  static constexpr bool PLANES = HIDDEN > 0;  // elsewhere `act_in_plane` would take more registers than there are
  using Raw = Pack<T, ELEMENTS>;
  using Chains = ChainsOf<(HIDDEN > 0) ? 4 : 1>;  // where columns are counted, registers are short

  const RowArguments& arguments;
  RowGroup<THREADS> group;
  int32_t row;
  int32_t entry = 0;
  float h[COLUMNS];

  __device__ __forceinline__ Row(const RowArguments& arguments, RowGroup<THREADS> group, int32_t row)
      : arguments(arguments), group(group), row(row) {}

  // The group's threads take vectors in turn, so that a warp's accesses are contiguous. Counted anew wherever it is
  // asked for: columns and their predicates that stay in registers through the entries are registers that the row
  // needs.
  struct Columns {
    int32_t first, step, end;
    __device__ __forceinline__ int operator[](int vector) const { return first + vector * step; }
    __device__ __forceinline__ bool has(int vector) const { return HIDDEN > 0 || first + vector * step < end; }
  };
  __device__ __forceinline__ Columns columns() const {
    const auto first = static_cast<int32_t>(opaque(group.thread) * ELEMENTS);
    return {first, static_cast<int32_t>(group.threads() * ELEMENTS), hidden_size()};
  }
  __device__ __forceinline__ int32_t hidden_size() const { return HIDDEN > 0 ? HIDDEN : arguments.hidden_size; }

  __device__ __forceinline__ const float* bank(int64_t i) const {
    return opaque(arguments.tables.bank + i * hidden_size());
  }

  // What only a gate or a probe needs of the entry at hand is read where it is needed: rarely, and then from L1.
  __device__ __forceinline__ const Entry& at_hand() const {
    return arguments.tables.entries[static_cast<int32_t>(opaque(entry))];
  }

  __device__ __forceinline__ float gate_dot() const { return dot(bank(at_hand().gate_vector)); }

  __device__ __forceinline__ bool gate_opens(float dot, float square) const {
    return gate_verdict(at_hand(), dot, square);
  }

  // Call f(v, column) with each vector v of columns that this thread has, and its first column.
  template <typename F>
  __device__ __forceinline__ void each_vector(F f) const {
    const Columns column = columns();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      if (column.has(v)) f(v, column[v]);
  }

  __device__ __forceinline__ void load(const Rows& rows, Raw (&raw)[VECTORS]) const {
    const T* from = rows.row<const T>(row);
    each_vector([&](int v, int column) { raw[v] = load_once<T, ELEMENTS>(from + column); });
  }

  // The weight is asked for with the row, and read when the entries have freed the registers that it takes.
  __device__ __forceinline__ void prefetch_weight() const {
    if constexpr (ELEMENTS > 1) {
      if (arguments.weight_dtype != dtype_of<T>()) return;
      each_vector([&](int, int column) { prefetch(static_cast<const T*>(arguments.weight) + column); });
    }
  }

  __device__ __forceinline__ void write(const Rows& rows, const Raw (&raw)[VECTORS]) const {
    T* to = rows.row<T>(row);
    each_vector([&](int v, int column) { store(to + column, raw[v]); });
  }

  // Call f(v, q) with each vector v of columns that this thread has and the bank's numbers there.
  template <typename F>
  __device__ __forceinline__ void with_bank(const float* from, F f) const {
    const Columns column = columns();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float q[ELEMENTS];
      load_bank_if<ELEMENTS>(column.has(v), from + column[v], q);
      f(v, q);
    }
  }

  // q keeps the vector of an entry that has only one.
  __device__ __forceinline__ void keep(const Request& r, float (&q)[KEPT]) const {
    if constexpr (KEEPS_VECTOR) {
      const bool wanted = r.live() && r.count == 1;
      const float* from = bank(r.vector);
      const Columns column = columns();
      if (HIDDEN > 0 && !wanted) return;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        load_bank_if<ELEMENTS>(HIDDEN > 0 || (wanted && column.has(v)), from + column[v], q + v * ELEMENTS);
    }
  }

  // The next entry's first vector, asked for while this one acts: a line of 128 bytes by each thread.
  __device__ __forceinline__ void prefetch_next() const {
    static_assert(HIDDEN == 0 || COLUMNS * sizeof(float) == 128);
    const int32_t vector = arguments.tables.entries[entry + 1].vector;
    if (in_bank(arguments.tables, vector, 1)) prefetch(bank(vector) + opaque(group.thread) * COLUMNS);
  }

  __device__ __forceinline__ float dot(const float* from) const {
    Chains sum;
    with_bank(from, [&](int v, const float* q) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) sum.add(v * ELEMENTS + i, h[v * ELEMENTS + i], q[i]);
    });
    return sum.total();
  }

  __device__ __forceinline__ float square() const {
    Chains sum;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sum.add(i, h[i], h[i]);
    return sum.total();
  }

  // Each probe column has one thread that writes it, so that a zero and the value that follows it arrive in order.
  __device__ __forceinline__ void probe(uint32_t column, float p) const {
    if (group.thread == column % WARP && column < static_cast<uint32_t>(arguments.probe_columns))
      arguments.probe[int64_t{row} * arguments.probe_columns + column] = p;
  }

  // One vector. Returns whether the row changed; square_before is |h|^2 before, where the entry wants it.
  __device__ __forceinline__ bool act_along(const Request& r, const float (&q)[KEPT], float& square_before) {
    const bool dots = r.kind() != ADD || r.has(Request::PROBES);
    float sums[3] = {0.0f, 0.0f, 0.0f};  // h . q, h . d, |h|^2
    if (dots) {
      if constexpr (KEEPS_VECTOR) {
        Chains sum;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sum.add(i, h[i], q[i]);
        sums[0] = sum.total();
      } else {
        sums[0] = dot(bank(r.vector));
      }
    }
    if (r.has(Request::GATED | Request::NORM)) {
      if (r.has(Request::GATED)) sums[1] = gate_dot();
      if (r.has(Request::NORM)) sums[2] = square();
      group.sum(sums);
    } else if (dots) {
      float one[1] = {sums[0]};
      group.sum(one);
      sums[0] = one[0];
    }
    if (r.has(Request::PROBES)) probe(at_hand().probe, sums[0]);
    if (!r.has(Request::MAY_ACT) || (r.has(Request::GATED) && !gate_opens(sums[1], sums[2]))) return false;
    square_before = sums[2];
    const float w = weight_of(r.kind(), r.a, r.b, sums[0]);
    if (w == 0.0f) return false;
    if constexpr (KEEPS_VECTOR) {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) h[i] = __fadd_rn(h[i], __fmul_rn(w, q[i]));
    } else {
      add(w, bank(r.vector));
    }
    return true;
  }

  __device__ __forceinline__ void add(float w, const float* from) {
    with_bank(from, [&](int v, const float* q) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) h[v * ELEMENTS + i] = __fadd_rn(h[v * ELEMENTS + i], __fmul_rn(w, q[i]));
    });
  }

  // The two vectors of a plane: one sum for both dots.
  __device__ __forceinline__ bool act_in_plane(const Request& r, float& square_before) {
    const float *const first = bank(r.vector), *const second = opaque(first + hidden_size());
    float sums[4];  // h . q_1, h . q_2, h . d, |h|^2
    sum_two(first, second, sums[0], sums[1]);
    if (r.has(Request::GATED | Request::NORM)) {
      sums[2] = r.has(Request::GATED) ? gate_dot() : 0.0f;
      sums[3] = r.has(Request::NORM) ? square() : 0.0f;
      group.sum(sums);
    } else {
      float two[2] = {sums[0], sums[1]};
      group.sum(two);
      sums[0] = two[0], sums[1] = two[1];
    }
    if (r.has(Request::PROBES)) {
      const auto column = static_cast<uint32_t>(at_hand().probe);
      probe(column, sums[0]), probe(column + 1, sums[1]);
    }
    if (!r.has(Request::MAY_ACT) || (r.has(Request::GATED) && !gate_opens(sums[2], sums[3]))) return false;
    square_before = sums[3];
    float w1 = sums[0], w2 = sums[1];
    rotate(r.kind(), r.a, r.b, w1, w2);
    if (w1 != 0.0f) add(w1, opaque(first));
    if (w2 != 0.0f) add(w2, opaque(second));
    return w1 != 0.0f || w2 != 0.0f;
  }

  // This thread's part of h . a and h . b.
  __device__ __forceinline__ void sum_two(const float* a, const float* b, float& of_a, float& of_b) const {
    const Columns column = columns();
    ChainsOf<(HIDDEN > 0) ? CHAINS_OF_TWO : 1> first, second;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float p[ELEMENTS], q[ELEMENTS];
      load_bank_if<ELEMENTS>(column.has(v), a + column[v], p);
      load_bank_if<ELEMENTS>(column.has(v), b + column[v], q);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) {
        first.add(v * ELEMENTS + i, h[v * ELEMENTS + i], p[i]);
        second.add(v * ELEMENTS + i, h[v * ELEMENTS + i], q[i]);
      }
    }
    of_a = first.total(), of_b = second.total();
  }

  // The stash: one more number per column, in shared memory, each thread's own: no barrier. Few entries need it, so it
  // is not unrolled where it need not be, for the sake of the registers.
  __device__ __forceinline__ float4& stashed(int i) const {
    float* const stash = reinterpret_cast<float*>(shared_memory) + sizeof(Partials) / sizeof(float);
    const unsigned thread = opaque(threadIdx.y) * group.threads() + opaque(group.thread);
    return *reinterpret_cast<float4*>(stash + thread * STASH + i);
  }

  __device__ __forceinline__ void clear_stash() const {
#pragma unroll 1
    for (int i = 0; i < COLUMNS; i += 4) stashed(i) = float4{0.0f, 0.0f, 0.0f, 0.0f};
  }

  __device__ __forceinline__ void add_to_stash(float w, const float* from) const {
    const Columns column = columns();
#pragma unroll 1
    for (int i = 0; i < COLUMNS; i += 4) {
      float q[4];
      if constexpr (ELEMENTS > 1) {
        load_bank_if<4>(column.has(i / ELEMENTS), from + column[i / ELEMENTS] + i % ELEMENTS, q);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) load_bank_if<1>(column.has(i + j), from + column[i + j], q + j);
      }
      float4& s = stashed(i);
      s = {__fadd_rn(s.x, __fmul_rn(w, q[0])), __fadd_rn(s.y, __fmul_rn(w, q[1])), __fadd_rn(s.z, __fmul_rn(w, q[2])),
           __fadd_rn(s.w, __fmul_rn(w, q[3]))};
    }
  }

  // h <- h + stash, or, for PROJECT, stash. Chosen, not multiplied by 0, which would make a NaN of infinity.
  __device__ __forceinline__ void add_stash(bool projects) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i += 4) {
      const float4 s = stashed(i);
      const float more[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) h[i + j] = (projects ? 0.0f : h[i + j]) + more[j];
    }
  }

  // Several vectors, CHUNK at a time, all dots of the row as it is: where more than one CHUNK is to come, or where
  // nothing of the row stays, sum_k w_k q_k collects in the stash. p_k and w_k are lane k's, so that a loop may run over them.
  __device__ __forceinline__ bool act_within(const Request& r, float& square_before) {
    const bool stashes = r.count > CHUNK || r.kind() == PROJECT;
    bool acts = r.has(Request::MAY_ACT), changes = r.kind() == PROJECT;
    if (stashes) clear_stash();
#pragma unroll 1
    for (int first = 0; first < r.count; first += CHUNK) {
      const int count = min(CHUNK, r.count - first);
      const float* q = bank(r.vector + int64_t{first});
      float p = dots(q, count);
      if (first == 0 && r.has(Request::GATED | Request::NORM)) {
        float two[2] = {r.has(Request::GATED) ? gate_dot() : 0.0f, square()};
        group.sum_in_warp(two);
        if (group.lane() == CHUNK) p = two[0];
        if (group.lane() == CHUNK + 1) p = two[1];
      }
      p = group.sum_lanes(p);
      if (first == 0) {
        square_before = group.from_lane(p, CHUNK + 1);
        const float gate = group.from_lane(p, CHUNK);
        acts = acts && (!r.has(Request::GATED) || gate_opens(gate, square_before));
      }
      if (r.has(Request::PROBES)) {
#pragma unroll 1
        for (int k = 0; k < count; ++k)
          probe(static_cast<uint32_t>(at_hand().probe) + first + k, group.from_lane(p, k));
      } else if (!acts) {
        return false;
      }
      if (!acts) continue;
      float w = r.kind() == PROJECT ? p : -r.a * p;
      if (!PLANES && is_plane(r.kind())) {
        float w1 = group.from_lane(p, 0), w2 = group.from_lane(p, 1);
        rotate(r.kind(), r.a, r.b, w1, w2);
        w = group.lane() == 0 ? w1 : w2;
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        const float w_k = group.from_lane(w, k);
        if (w_k == 0.0f) continue;
        changes = true;
        if (stashes)
          add_to_stash(w_k, q + k * hidden_size());
        else
          add(w_k, q + k * hidden_size());
      }
    }
    if (!acts || !changes) return false;
    if (stashes) add_stash(r.kind() == PROJECT);
    return true;
  }

  // Lane k: this warp's sum of h . q_k. Two at a time, so that their loads and exchanges overlap.
  __device__ __forceinline__ float dots(const float* q, int count) const {
    float p = 0.0f;
#pragma unroll 1
    for (int k = 0; k < count; k += 2) {
      float two[2];
      sum_two(q, k + 1 < count ? q + hidden_size() : q, two[0], two[1]);
      group.sum_in_warp(two);
      if (group.lane() == k) p = two[0];
      if (group.lane() == k + 1) p = two[1];  // beyond the last vector: a number that nobody reads
      q = opaque(q + 2 * hidden_size());
    }
    return p;
  }

  __device__ __forceinline__ bool act(const Request& r, const float (&q)[KEPT]) {
    float square_before = 0.0f;
    const uint32_t kind = opaque(r.bits) >> Request::KIND_SHIFT;  // or all that asks for the kind becomes one table
    bool changed;
    if (r.count == 1 && kind != PROJECT)
      changed = act_along(r, q, square_before);
    else if (PLANES && kind - ROTATE <= ROTATE_RELATIVE - ROTATE)
      changed = act_in_plane(r, square_before);
    else
      changed = act_within(r, square_before);
    if (!changed || !r.has(Request::KEEPS_NORM)) return changed;
    float after[1] = {square()};
    group.sum(after);
    if (after[0] > 0.0f) {
      const float scale = sqrtf(square_before) / sqrtf(after[0]);
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) h[i] *= scale;
    }
    return true;
  }

  // h <- fp32 of x, or of x + residual rounded to T. Columns beyond the row are 0, which no sum notices.
  template <bool ADD_RESIDUAL>
  __device__ __forceinline__ void begin(const Raw (&x)[VECTORS], const Raw (&residual)[VECTORS]) {
    const Columns column = columns();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float s[ELEMENTS] = {};
      if (column.has(v)) unpack(ADD_RESIDUAL ? combine_packs<false>(x[v], residual[v]) : x[v], s);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) h[v * ELEMENTS + i] = s[i];
    }
  }

  // The same for the scalar path, which has no registers for rows to wait in: from memory, a few columns at a time, so
  // that not every column's address is computed ahead.
  template <bool ADD_RESIDUAL>
  __device__ __forceinline__ void begin_late() {
    const T* x = arguments.x.row<const T>(row);
    const T* residual = arguments.residual.row<const T>(row);
#pragma unroll
    for (int first = 0; first < COLUMNS; first += FEWEST_COLUMNS) {
      const Columns column = columns();
#pragma unroll
      for (int v = first; v < first + FEWEST_COLUMNS; ++v) {
        h[v] = column.has(v) ? to_float(x[column[v]]) : 0.0f;
        if (ADD_RESIDUAL && column.has(v)) h[v] = to_float(round_to<T>(h[v] + to_float(residual[column[v]])));
      }
      loads_stay_behind();
    }
  }

  // The weight's numbers from column j on, where it is not of the row's type.
  __device__ __forceinline__ void convert_weight(int j, float (&w)[ELEMENTS]) const {
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const void* weight = arguments.weight;
      if (arguments.weight_dtype == Dtype::FP32)
        w[i] = static_cast<const float*>(weight)[j + i];
      else if (arguments.weight_dtype == Dtype::FP16)
        w[i] = to_float(static_cast<const __half*>(weight)[j + i]);
      else
        w[i] = to_float(static_cast<const __nv_bfloat16*>(weight)[j + i]);
    }
  }

  // hidden = h, rounded once; h becomes what was stored.
  __device__ __forceinline__ void finish() {
    T* to = arguments.hidden.row<T>(row);
    each_vector([&](int v, int column) {
      const Raw out = round_to_pack<T, ELEMENTS>(h + v * ELEMENTS);
      unpack(out, h + v * ELEMENTS);
      store(to + column, out);
    });
  }

  // hidden = x, bit for bit.
  __device__ __forceinline__ void copy() const {
    const T* from = arguments.x.row<const T>(row);
    T* to = arguments.hidden.row<T>(row);
    const Columns column = columns();
#pragma unroll 4
    for (int v = 0; v < VECTORS; ++v)
      if (column.has(v)) store(to + column[v], load_once<T, ELEMENTS>(from + column[v]));
  }

  // normed = RMSNorm of h, which holds the rounded row.
  __device__ __forceinline__ void normalise() {
    const bool same = arguments.weight_dtype == dtype_of<T>();
    const T* from = static_cast<const T*>(arguments.weight);
    Raw weight[VECTORS];
    if constexpr (ELEMENTS > 1) {
      if (same) each_vector([&](int v, int column) { weight[v] = load_shared_by_rows<T, ELEMENTS>(from + column); });
    }
    float squares[1] = {square()};
    group.sum(squares);
    const float scale = rsqrtf(squares[0] / static_cast<float>(hidden_size()) + arguments.eps);
    T* to = static_cast<T*>(arguments.normed) + int64_t{row} * hidden_size();
    if constexpr (ELEMENTS > 1) {
      if (same && !arguments.fp32_weight) {  // Llama: both factors are of the row's type
        each_vector([&](int v, int column) {
          float n[ELEMENTS];
#pragma unroll
          for (int i = 0; i < ELEMENTS; ++i) n[i] = h[v * ELEMENTS + i] * scale;
          store(to + column, combine_packs<true>(round_to_pack<T, ELEMENTS>(n), weight[v]));
        });
        return;
      }
    }
    each_vector([&](int v, int column) {
      float w[ELEMENTS], n[ELEMENTS];
      if constexpr (ELEMENTS == 1) {
        if (v % FEWEST_COLUMNS == 0) loads_stay_behind();
        if (same) weight[v] = load_shared_by_rows<T, ELEMENTS>(from + column);
      }
      if (same)
        unpack(weight[v], w);
      else
        convert_weight(column, w);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) n[i] = h[v * ELEMENTS + i] * scale;
      if (!arguments.fp32_weight) unpack(round_to_pack<T, ELEMENTS>(n), n);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) n[i] *= arguments.weight_offset + w[i];
      store(to + column, round_to_pack<T, ELEMENTS>(n));
    });
  }
};

// Where a row's entries end, and whether one of them has acted: one register for both.
struct Last {
  uint32_t bits;
  __device__ __forceinline__ int32_t end() const { return static_cast<int32_t>(bits & 0x7fffffffu); }
  __device__ __forceinline__ void touch() { bits |= 0x80000000u; }
  __device__ __forceinline__ bool touched() const { return bits >> 31 != 0; }
};

template <typename T, int ELEMENTS, int VECTORS, int HIDDEN, RowOp OP>
__global__ void __launch_bounds__(MAX_THREADS_PER_ROW, 1) row_kernel(const __grid_constant__ RowArguments arguments) {
  using R = Row<T, ELEMENTS, VECTORS, HIDDEN>;
  constexpr bool ADDS = OP != RowOp::STEER, IN_PLACE = OP == RowOp::STEER_PAIR;
  const int32_t index = static_cast<int32_t>(HIDDEN > 0 ? blockIdx.x : blockIdx.x * blockDim.y + threadIdx.y);
  if (HIDDEN == 0 && index >= arguments.rows) return;  // only where rows share a block
  const RowGroup<R::THREADS> group{threadIdx.x, blockDim.x, *reinterpret_cast<Partials*>(shared_memory)};
  R row(arguments, group, index);
  const Tables& tables = arguments.tables;

  // 1. Loads. The scalar path has one register per element and none to wait in: it loads when it converts.
  typename R::Raw x[VECTORS], residual[VECTORS];
  constexpr bool EARLY = ELEMENTS > 1;
  const auto fetch = [&] {
    row.load(arguments.x, x);
    if constexpr (ADDS) row.load(arguments.residual, residual);
  };
  const auto clear_probe = [&] {
    for (int c = threadIdx.x % WARP; c < arguments.probe_columns; c += WARP) row.probe(c, 0.0f);
  };
  if constexpr (!IN_PLACE) {
    if constexpr (EARLY) fetch();
    clear_probe();
  }
  const Range range = entries_of(tables, tables.slots[index]);
  const bool steered = range.first < range.end;
  Last last{steered ? static_cast<uint32_t>(range.end) : 0u};
  if constexpr (IN_PLACE) {
    if (!steered) return;
    if constexpr (EARLY) fetch();  // only now: most rows of most batches have nothing to do
    clear_probe();
  }
  if constexpr (OP == RowOp::STEER) {
    if (!steered) {
      if constexpr (EARLY)
        row.write(arguments.hidden, x);
      else
        row.copy();
      return;
    }
  }
  if constexpr (OP == RowOp::ADD_STEER_RMSNORM) row.prefetch_weight();
  Request request;
  float q[R::KEPT];
  const auto read = [&] {
    const bool more = row.entry + 1 < last.end();
    request = read_request(tables, row.entry, more, index, arguments.probe_columns);
    row.keep(request, q);
  };
  // Beside two fp32 rows there are no registers for an entry and its vector to wait in.
  constexpr bool WAITS = EARLY && (ADDS ? 2 : 1) * sizeof(x) + sizeof(q) <= 64 * sizeof(float);
  row.entry = range.first;
  const auto read_first = [&] {
    if (steered) read();
  };
  if constexpr (WAITS) read_first();

  // 2. The row in fp32.
  if constexpr (EARLY)
    row.template begin<ADDS>(x, residual);
  else
    row.template begin_late<ADDS>();

  // 3. The entries.
  if constexpr (!WAITS) read_first();
  if (steered) {
#pragma unroll 1
    for (;;) {
      if (HIDDEN > 0 && row.entry + 1 < last.end()) row.prefetch_next();
      if (request.live() && row.act(request, q)) last.touch();
      if (++row.entry >= last.end()) break;
      read();
    }
  }

  // 4. and 5.
  const bool touched = last.touched();
  if (!touched && IN_PLACE) return;
  if (!touched && OP == RowOp::STEER) {
    row.copy();  // rounding would keep every number, but not the bits of a NaN
    return;
  }
  row.finish();
  if constexpr (IN_PLACE) {  // the row is now all in the other of the pair
    const typename R::Raw none[VECTORS] = {};
    row.write(arguments.x, none);
  }
  if constexpr (OP == RowOp::ADD_STEER_RMSNORM) row.normalise();
}

}  // namespace faststeer
