// Sixteen fp32 values at a time, in the widest vectors that this translation unit is compiled for, and the conversions
// between fp32 and the dtypes of a row. GCC's vector extensions only, so that any machine compiles it; the one exception
// is fp16, for which x86 has instructions that the extensions do not reach.
//
// Sixteen lanes on every machine, whatever its vectors' width: sums then have the same order, and results the same bits,
// at every instruction set level. Nothing here may be compiled with -ffast-math or with contraction to fused
// multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)  // such a machine has fp16 conversion too; the build asks for both
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// Everything is inlined and nothing has external linkage: this header is compiled once per instruction set level, and a
// function shared between levels would be one that the lowest level's machines cannot run.
#define FASTSTEER_LANES static inline __attribute__((always_inline))
#define FASTSTEER_METHOD inline __attribute__((always_inline))

namespace faststeer {
namespace {

#if defined(__AVX512F__)
constexpr int PART = 16;
#elif defined(__AVX2__)
constexpr int PART = 8;
#else
constexpr int PART = 4;
#endif
constexpr int LANES = 16;
constexpr int PARTS = LANES / PART;

typedef float Floats __attribute__((vector_size(4 * PART)));
typedef uint32_t Words __attribute__((vector_size(4 * PART)));
typedef uint16_t Shorts __attribute__((vector_size(2 * PART)));

struct Lanes {
  Floats part[PARTS];
};

// The dtypes of a row: fp32 is float, the others are their bits.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// The bits of what stands at `from`, and bits to `to`, as many as Bits has.
template <class Bits>
FASTSTEER_LANES Bits read(const void* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

template <class Bits>
FASTSTEER_LANES void write(void* to, Bits bits) {
  std::memcpy(to, &bits, sizeof(bits));
}

// One vector of fp32 from and to each dtype: `decode` reads it; `rounded` rounds it to the dtype, to nearest even; `encode`
// writes what is rounded already. A quiet NaN, the only kind that arithmetic gives, stays a NaN.
//
// bf16 has no `rounded` but `rounding`: what to add to a number's bits for their upper half to be the nearest bf16. That
// is 0x7FFF, or 0x8000 where the upper half is odd. `encode` writes the upper halves and does not look at the lower.

FASTSTEER_LANES Floats decode(const float* from) { return read<Floats>(from); }

FASTSTEER_LANES Floats rounded(const float*, Floats value) { return value; }

FASTSTEER_LANES void encode(float* to, Floats value) { write(to, value); }

#if defined(__AVX512F__)

// GCC 12 does not find these instructions for what the vector extensions say further down.

FASTSTEER_LANES Floats decode(const BFloat* from) {
  // Short i becomes the upper half of word i.
  const __m512i up = _mm512_set_epi32(0xF0000, 0xE0000, 0xD0000, 0xC0000, 0xB0000, 0xA0000, 0x90000, 0x80000, 0x70000,
                                      0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, up, _mm512_castsi256_si512(read<__m256i>(from))));
}

// Short i of two vectors' upper halves is short 2 i + 1 of the two.
FASTSTEER_LANES void encode(BFloat* to, Floats first, Floats second) {
  const __m512i upper = _mm512_set_epi32(0x3F003D, 0x3B0039, 0x370035, 0x330031, 0x2F002D, 0x2B0029, 0x270025, 0x230021,
                                         0x1F001D, 0x1B0019, 0x170015, 0x130011, 0xF000D, 0xB0009, 0x70005, 0x30001);
  write(to, _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper, _mm512_castps_si512(second)));
}

FASTSTEER_LANES void encode(BFloat* to, Floats value) {
  const __m512i upper = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1F001D, 0x1B0019, 0x170015, 0x130011, 0xF000D,
                                         0xB0009, 0x70005, 0x30001);
  write(to, _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, _mm512_castps_si512(value))));
}

FASTSTEER_LANES Words rounding(Words bits) {
  const __m512 by_last_bit = _mm512_castsi512_ps(_mm512_set1_epi64(0x800000007FFF));
  const __m512i upper = _mm512_srli_epi32(reinterpret_cast<__m512i>(bits), 16);
  return reinterpret_cast<Words>(_mm512_permutevar_ps(by_last_bit, upper));
}

FASTSTEER_LANES bool any_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }

typedef __m256i Halves;

FASTSTEER_LANES Floats from_half(Halves bits) { return _mm512_cvtph_ps(bits); }

FASTSTEER_LANES Halves to_half(Floats value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

#if defined(__AVX2__)

FASTSTEER_LANES Floats decode(const BFloat* from) {
  // Short i becomes the upper half of word i, of the lower four words in the vector's lower half.
  const __m256i up = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10,
                                      11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read<__m128i>(from)), up));
}

FASTSTEER_LANES void encode(BFloat* to, Floats first, Floats second) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(first), 16),
                                             _mm256_srli_epi32(_mm256_castps_si256(second), 16));
  write(to, _mm256_permute4x64_epi64(packed, 0xD8));  // it packs half a vector at a time
}

FASTSTEER_LANES Words rounding(Words bits) {
  const __m256 by_last_bit = _mm256_castsi256_ps(_mm256_set1_epi64x(0x800000007FFF));
  const __m256i upper = _mm256_srli_epi32(reinterpret_cast<__m256i>(bits), 16);
  return reinterpret_cast<Words>(_mm256_permutevar_ps(by_last_bit, upper));
}

FASTSTEER_LANES bool any_nan(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0; }

typedef __m128i Halves;

FASTSTEER_LANES Floats from_half(Halves bits) { return _mm256_cvtph_ps(bits); }

FASTSTEER_LANES Halves to_half(Floats value) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

FASTSTEER_LANES Floats decode(const BFloat* from) {
  return reinterpret_cast<Floats>(__builtin_convertvector(read<Shorts>(from), Words) << 16);
}

FASTSTEER_LANES void encode(BFloat* to, Floats value) {
  write(to, __builtin_convertvector(reinterpret_cast<Words>(value) >> 16, Shorts));
}

FASTSTEER_LANES Words rounding(Words bits) { return 0x7FFF + ((bits >> 16) & 1); }

FASTSTEER_LANES bool any_nan(Floats, Floats) { return true; }  // looking costs as much as being careful

typedef Shorts Halves;

FASTSTEER_LANES Floats from_half(Halves halves) {
  const Words bits = __builtin_convertvector(halves, Words), magnitude = bits & 0x7FFF;
  // fp16's exponent and mantissa in fp32's places are 2^112 too small, subnormals included; infinity and NaN need the
  // largest exponent.
  const Floats scaled = reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(magnitude >= 0x7C00) & 0x7F800000;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(scaled) | special | ((bits & 0x8000) << 16));
}

FASTSTEER_LANES Halves to_half(Floats value) {
  const Words bits = reinterpret_cast<Words>(value), sign = bits & 0x80000000, magnitude = bits ^ sign;
  const Words normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lets the addition itself round at fp16's last subnormal place.
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3F000000;
  const Words special = magnitude > 0x7F800000 ? Words{} + 0x7E00 : Words{} + 0x7C00;
  const Words finite = magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector((magnitude >= 0x47800000 ? special : finite) | (sign >> 16), Shorts);
}

#endif
#endif

FASTSTEER_LANES Floats decode(const Half* from) { return from_half(read<Halves>(from)); }

FASTSTEER_LANES Floats rounded(const Half*, Floats value) { return from_half(to_half(value)); }

FASTSTEER_LANES void encode(Half* to, Floats value) { write(to, to_half(value)); }

// Sixteen at a time.

// body(i) for every part, written out: in a loop, GCC 12 would keep lanes of more than one part in memory.
template <class Body, int... I>
FASTSTEER_LANES void each_part(Body body, std::integer_sequence<int, I...>) {
  (body(I), ...);
}

template <class Body>
FASTSTEER_LANES void each_part(Body body) {
  each_part(body, std::make_integer_sequence<int, PARTS>());
}

#define FASTSTEER_PARTS(statement) each_part([&](int i) __attribute__((always_inline)) { statement; })

FASTSTEER_LANES Lanes operator+(Lanes a, Lanes b) {
  FASTSTEER_PARTS(a.part[i] += b.part[i]);
  return a;
}

FASTSTEER_LANES Lanes operator*(Lanes a, Lanes b) {
  FASTSTEER_PARTS(a.part[i] *= b.part[i]);
  return a;
}

FASTSTEER_LANES Lanes all(float value) {
  Lanes lanes;
  FASTSTEER_PARTS(lanes.part[i] = value - Floats{});  // adding zero would be an addition
  return lanes;
}

// How much of a block of sixteen there is: all of it, or the first `count` lanes at a row's end, the rest reading zero
// and not written.
struct Whole {};
struct Some {
  int64_t count;
};

template <class T, class Block = Whole>
FASTSTEER_LANES Lanes load(const T* from, Block block = {}) {
  if constexpr (std::is_same_v<Block, Some>) {
    T copy[LANES] = {};
    std::memcpy(copy, from, block.count * sizeof(T));
    return load(copy);
  } else {
    Lanes lanes;
    FASTSTEER_PARTS(lanes.part[i] = decode(from + i * PART));
    return lanes;
  }
}

// The upper half of each word becomes the nearest bf16, the lower half anything. A NaN keeps its bits, since a carry
// could turn it into a zero: it is looked for in two vectors at once, for a branch that is all but never taken.
FASTSTEER_LANES void make_nearest(Floats& a, Floats& b) {
  const Words a_bits = reinterpret_cast<Words>(a), b_bits = reinterpret_cast<Words>(b);
  Words to_a = rounding(a_bits), to_b = rounding(b_bits);
  if (__builtin_expect(any_nan(a, b), 0)) {
    to_a &= reinterpret_cast<Words>(a == a);
    to_b &= reinterpret_cast<Words>(b == b);
  }
  a = reinterpret_cast<Floats>(a_bits + to_a);
  b = reinterpret_cast<Floats>(b_bits + to_b);
}

FASTSTEER_LANES Lanes nearest(Lanes lanes) {
  if constexpr (PARTS == 1) {
    Floats same = lanes.part[0];
    make_nearest(lanes.part[0], same);
  } else {
    FASTSTEER_PARTS(if (i % 2 == 0) make_nearest(lanes.part[i], lanes.part[i + 1]));
  }
  return lanes;
}

// Bf16 values of 2 PART columns, those at even and those at odd ones: what costs least to take apart and put together.
struct Apart {
  Floats even, odd;
};

FASTSTEER_LANES Apart take_apart(const BFloat* from) {
  const Words pairs = read<Words>(from);
  return {reinterpret_cast<Floats>(pairs << 16), reinterpret_cast<Floats>(pairs & 0xFFFF0000)};
}

// Rounds, without care for a NaN with anything in its lower half.
FASTSTEER_LANES void put_together(BFloat* to, Apart values) {
  Words even = reinterpret_cast<Words>(values.even), odd = reinterpret_cast<Words>(values.odd);
  even += rounding(even);
  odd += rounding(odd);
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 does not find this instruction either
  const __m256i upper = _mm256_srli_epi32(reinterpret_cast<__m256i>(even), 16);
  const __m256i pairs = _mm256_blend_epi16(upper, reinterpret_cast<__m256i>(odd), 0xAA);
#else
  const Words pairs = (even >> 16) | (odd & 0xFFFF0000);
#endif
  write(to, pairs);
}

template <class T>
FASTSTEER_LANES Lanes round_to(Lanes lanes) {
  if constexpr (std::is_same_v<T, BFloat>) {
    lanes = nearest(lanes);
    FASTSTEER_PARTS(lanes.part[i] = reinterpret_cast<Floats>(reinterpret_cast<Words>(lanes.part[i]) & 0xFFFF0000));
  } else {
    FASTSTEER_PARTS(lanes.part[i] = rounded(static_cast<const T*>(nullptr), lanes.part[i]));
  }
  return lanes;
}

// Of values that are rounded to T already.
template <class T, class Block = Whole>
FASTSTEER_LANES void store(T* to, Lanes lanes, Block block = {}) {
  if constexpr (std::is_same_v<Block, Some>) {
    T copy[LANES];
    store(copy, lanes);
    std::memcpy(to, copy, block.count * sizeof(T));
  } else if constexpr (std::is_same_v<T, BFloat> && PARTS == 2) {
    encode(to, lanes.part[0], lanes.part[1]);
  } else {
    FASTSTEER_PARTS(encode(to + i * PART, lanes.part[i]));
  }
}

// Of any values. For fp16 it is the instruction that writes which rounds.
template <class T, class Block = Whole>
FASTSTEER_LANES void store_rounded(T* to, Lanes lanes, Block block = {}) {
  if constexpr (std::is_same_v<T, BFloat>) lanes = nearest(lanes);
  store(to, lanes, block);
}

// Two blocks side by side.
template <class T>
FASTSTEER_LANES void store_two_rounded(T* to, Lanes first, Lanes second) {
  if constexpr (std::is_same_v<T, BFloat> && PARTS == 1) {
    make_nearest(first.part[0], second.part[0]);
    encode(to, first.part[0], second.part[0]);
  } else {
    store_rounded(to, first);
    store_rounded(to + LANES, second);
  }
}

// Lane i of the result is lane I[i] of x and, behind it, y.
template <int... I>
FASTSTEER_LANES Floats shuffled(Floats x, Floats y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, I...);
#else  // GCC has the other from version 12 on
  const Words from = {I...};
  return __builtin_shuffle(x, y, from);
#endif
}

// The sum of all lanes: first of those sixteen, eight, ... apart, in registers throughout.
template <int W, int... I>
FASTSTEER_LANES float sum(Floats x, std::integer_sequence<int, I...> lanes) {
  x += shuffled<(I + W) % PART...>(x, x);
  if constexpr (W > 1) {
    return sum<W / 2>(x, lanes);
  } else {
    return x[0];
  }
}

FASTSTEER_LANES float sum(Lanes lanes) {
  for (int width = PARTS / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes.part[i] += lanes.part[i + width];
  }
  return sum<PART / 2>(lanes.part[0], std::make_integer_sequence<int, PART>());
}

// body(first column, Whole or Some) for every block of sixteen of a row, from column i on.
template <class Body>
FASTSTEER_LANES void each_block(int64_t hidden, Body body, int64_t i = 0) {
  for (; i + LANES <= hidden; i += LANES) body(i, Whole{});
  if (i < hidden) body(i, Some{hidden - i});
}

// The same, but two(first column) for two whole blocks side by side as long as there are such.
template <class Two, class Body>
FASTSTEER_LANES void each_two_blocks(int64_t hidden, Two two, Body body) {
  int64_t i = 0;
  for (; i + 2 * LANES <= hidden; i += 2 * LANES) two(i);
  each_block(hidden, body, i);
}

// The sum over a row of body(first column, Whole or Some), lane by lane in four accumulators: long enough chains to hide
// the addition's latency, and an order that depends on nothing but `hidden`.
template <class Body>
FASTSTEER_LANES float sum_blocks(int64_t hidden, Body body) {
  constexpr int64_t STEP = 4 * LANES;
  Lanes a = all(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + STEP <= hidden; i += STEP) {
    a = a + body(i, Whole{});
    b = b + body(i + LANES, Whole{});
    c = c + body(i + 2 * LANES, Whole{});
    d = d + body(i + 3 * LANES, Whole{});
  }
  for (; i + LANES <= hidden; i += LANES) a = a + body(i, Whole{});
  if (i < hidden) b = b + body(i, Some{hidden - i});
  return sum((a + b) + (c + d));
}

}  // namespace
}  // namespace faststeer
