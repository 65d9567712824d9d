// What the operators hand to the row routines of rows.cpp, which is compiled once per instruction set level. Plain
// numbers and pointers, no framework.
#pragma once

#include <cstdint>

#include "../common/arguments.h"
#include "../common/launch.h"

namespace faststeer {

// out = x weight^T + bias.
struct LinearJob {
  int64_t rows, inputs, outputs;
  Rows x;            // fp32
  Rows weight;       // [outputs, inputs]
  const void* bias;  // [outputs], or null
  Rows out;          // [rows, outputs]
};

// The routines at one instruction set level, by Dtype. Each does the rows, or units of UNIT outputs, `first` to `end` - 1
// and touches no other.
struct Routines {
  using Steer = void (*)(const RowArguments&, int64_t first, int64_t end);
  using Linear = void (*)(const LinearJob&, int64_t first, int64_t end);
  Steer steer[N_DTYPES], latch[N_DTYPES];
  Linear linear[N_DTYPES];
  int64_t unit;  // outputs that `linear` takes at a time
};

extern const Routines routines_baseline;
#if defined(__x86_64__)
extern const Routines routines_avx2;
extern const Routines routines_avx512;
#endif

}  // namespace faststeer
