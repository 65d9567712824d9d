// All kernels for fp32 rows.
#include "launch.cuh"

namespace faststeer {
FASTSTEER_LAUNCHERS(template, float)
}  // namespace faststeer
