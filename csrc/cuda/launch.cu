// From a dtype to the file that has its kernels.
#include "launch.cuh"

namespace faststeer {

extern template FASTSTEER_LAUNCHER(float);
extern template FASTSTEER_LAUNCHER(__half);
extern template FASTSTEER_LAUNCHER(__nv_bfloat16);

Launched launch_row(RowOp op, Dtype dtype, const LaunchConfig& config, const RowArguments& arguments,
                    cudaStream_t stream) {
  switch (dtype) {
    case Dtype::FP32:
      return launch_row_for<float>(op, config, arguments, stream);
    case Dtype::FP16:
      return launch_row_for<__half>(op, config, arguments, stream);
    case Dtype::BF16:
      return launch_row_for<__nv_bfloat16>(op, config, arguments, stream);
  }
  return {cudaErrorInvalidValue, {}, {}};
}

}  // namespace faststeer
