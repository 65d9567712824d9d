// Which launch configuration a row kernel takes: a pure function of the shape, for the CUDA launcher and for whoever
// wants to look at it. Knows no framework and no CUDA.
//
// Nothing here has been measured yet: the thresholds are derived from the numbers of the chip (65,536 registers, 2,048
// threads and 32 blocks per multiprocessor on sm_80, sm_90 and sm_100; 1,536 threads and 24 blocks on sm_89 and
// sm_120), and each says how. A measurement replaces its derivation.
#pragma once

#include <cstdint>

namespace faststeer {

constexpr int64_t MAX_HIDDEN = 16384;
constexpr int32_t WARP = 32;

// A row never takes more threads than this. 512 threads with 32 columns each hold the widest row; 1,024 with 16 would
// hold it too, but every warp repeats the reading of the entries and joins every barrier, so fewer warps do less
// besides the row.
constexpr int32_t MAX_THREADS_PER_ROW = 512;

// The register budget of every row kernel: what lets a block of MAX_THREADS_PER_ROW start. 65,536 / 512.
constexpr int32_t MAX_REGISTERS = 128;

// Columns a thread may hold. 8 is one 16-byte vector of a 16-bit type, the shortest chain of loads. 32 takes 128
// registers, 4 per column, where 16 takes 96, 6 per column: what a thread needs besides its columns weighs least, so
// more of the multiprocessor's registers hold rows in flight. At 4,096 columns that is 4 rows of 128 threads, which is
// 64 KiB of x and residual under way in bf16; 4.8 TB/s at 700 ns over 132 multiprocessors need 25 KiB.
constexpr int32_t FEWEST_COLUMNS = 8, MIDDLE_COLUMNS = 16, MOST_COLUMNS = 32;

// Up to this many rows per multiprocessor a kernel is bound by the latency of one row (decode): as many threads per row
// as help. Beyond it rows queue for registers, and the number in flight counts. One, because a multiprocessor with one
// row has nothing to overlap it with.
constexpr int64_t FEW_ROWS_PER_SM = 1;

// Rows per block where a row is one warp's. One row per block would leave 32 block slots with 32 warps, half of what a
// multiprocessor holds; blocks of four warps do not. A row of two warps or more takes a block of its own: 32 blocks of
// 64 threads are all the threads there are.
constexpr int32_t WARP_ROWS_PER_BLOCK = 4;

struct LaunchConfig {
  const int32_t threads_per_row;      // a multiple of 32, at most MAX_THREADS_PER_ROW
  const int32_t rows_per_block;       // more than 1 only where threads_per_row is 32
  const int32_t elements_per_vector;  // 16 bytes' worth, or 1 where rows are unaligned or odd
  const int32_t vectors_per_thread;

  constexpr int32_t columns_per_thread() const { return elements_per_vector * vectors_per_thread; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The columns per thread that the environment variable COLUMNS_VARIABLE asks for, so that a benchmark can compare launch
// configurations without a rebuild: 0 for none (`text` is null or empty), -1 where there are no kernels for it.
constexpr const char* COLUMNS_VARIABLE = "FASTSTEER_CUDA_COLUMNS";
constexpr int32_t columns_of(const char* text) {
  if (text == nullptr || text[0] == '\0') return 0;
  int32_t columns = 0;
  for (; *text >= '0' && *text <= '9' && columns <= MOST_COLUMNS; ++text) columns = 10 * columns + (*text - '0');
  const bool compiled = columns == FEWEST_COLUMNS || columns == MIDDLE_COLUMNS || columns == MOST_COLUMNS;
  return *text == '\0' && compiled ? columns : -1;
}

// rows >= 0, 1 <= hidden <= MAX_HIDDEN, itemsize 2 or 4. aligned: every row of every tensor starts on a 16-byte
// boundary. asked: columns per thread in place of the rule's, or 0; too few for a wide row give more than
// MAX_THREADS_PER_ROW, which cannot be launched.
constexpr LaunchConfig choose_launch(int64_t rows, int64_t hidden, int32_t itemsize, bool aligned, int32_t sm_count,
                                     int32_t asked = 0) {
  const int32_t wide = 16 / itemsize;
  const int32_t elements = aligned && hidden % wide == 0 ? wide : 1;
  const bool few = rows <= FEW_ROWS_PER_SM * sm_count;
  // Few rows: the fewest columns per thread that the thread limit allows. Many: the fewest that leave the row to one
  // warp, which then needs no barrier, or the most there are.
  const int64_t threads = few ? MAX_THREADS_PER_ROW : WARP;
  int32_t columns = FEWEST_COLUMNS;
  while (columns < MOST_COLUMNS && columns * threads < hidden) columns *= 2;
  if (asked > 0) columns = asked;
  // The scalar path is for odd shapes: it is not worth a third instantiation.
  if (elements == 1 && columns == MIDDLE_COLUMNS) columns = MOST_COLUMNS;
  const int32_t warps = static_cast<int32_t>(ceil_div(hidden, int64_t{columns} * WARP));
  return {warps * WARP, warps == 1 && !few ? WARP_ROWS_PER_BLOCK : 1, elements, columns / elements};
}

}  // namespace faststeer
