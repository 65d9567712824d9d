// All kernels for fp32 rows.
#include "launch.cuh"

namespace faststeer {
template FASTSTEER_LAUNCHER(float);
}  // namespace faststeer
