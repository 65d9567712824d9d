// The dtypes of a row. Knows no framework.
#pragma once

#include <cstdint>

namespace faststeer {

enum class Dtype : int32_t { FP32, FP16, BF16 };
constexpr int N_DTYPES = 3;

}  // namespace faststeer
