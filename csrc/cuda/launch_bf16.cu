// All kernels for bf16 rows.
#include "launch.cuh"

namespace faststeer {
FASTSTEER_LAUNCHERS(template, __nv_bfloat16)
}  // namespace faststeer
