// All kernels for bf16 rows.
#include "launch.cuh"

namespace faststeer {
template FASTSTEER_LAUNCHER(__nv_bfloat16);
}  // namespace faststeer
