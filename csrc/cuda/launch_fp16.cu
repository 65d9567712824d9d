// All kernels for fp16 rows.
#include "launch.cuh"

namespace faststeer {
FASTSTEER_LAUNCHERS(template, __half)
}  // namespace faststeer
