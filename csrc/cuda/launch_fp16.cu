// All kernels for fp16 rows.
#include "launch.cuh"

namespace faststeer {
template FASTSTEER_LAUNCHER(__half);
}  // namespace faststeer
