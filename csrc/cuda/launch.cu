// From a dtype to the file that has its kernels.
#include "launch.cuh"

namespace faststeer {

FASTSTEER_LAUNCHERS(extern template, float)
FASTSTEER_LAUNCHERS(extern template, __half)
FASTSTEER_LAUNCHERS(extern template, __nv_bfloat16)

Launched launch_row(RowOp op, Dtype dtype, const LaunchConfig& config, const RowArguments& arguments,
                    cudaStream_t stream) {
  switch (dtype) {
    case Dtype::FP32: return launch_row_for<float>(op, config, arguments, stream);
    case Dtype::FP16: return launch_row_for<__half>(op, config, arguments, stream);
    case Dtype::BF16: return launch_row_for<__nv_bfloat16>(op, config, arguments, stream);
  }
  return {cudaErrorInvalidValue, {}, {}};
}

Launched launch_latch(Dtype dtype, const LatchArguments& arguments, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::FP32: return launch_latch_for<float>(arguments, stream);
    case Dtype::FP16: return launch_latch_for<__half>(arguments, stream);
    case Dtype::BF16: return launch_latch_for<__nv_bfloat16>(arguments, stream);
  }
  return {cudaErrorInvalidValue, {}, {}};
}

}  // namespace faststeer
