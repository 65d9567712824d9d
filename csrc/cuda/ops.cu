// The operators on CUDA tensors, registered with torch through its stable ABI: choose the launch configuration, launch
// on the current stream. Nothing here waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <limits>
#include <vector>

#include "../common/operators.h"
#include "kernels.h"

namespace faststeer {
namespace {

int32_t item_size(Dtype dtype) { return dtype == Dtype::FP32 ? 4 : 2; }

bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

bool on_16_bytes(const Rows& rows, Dtype dtype) {
  return on_16_bytes(rows.data) && rows.stride * item_size(dtype) % 16 == 0;
}

// 16 bytes at a time only if everything that is read or written so allows it.
bool aligned(const RowArguments& a) {
  return on_16_bytes(a.x, a.dtype) && on_16_bytes(a.hidden, a.dtype) && on_16_bytes(a.residual, a.dtype) &&
         on_16_bytes(a.normed) && (a.weight_dtype != a.dtype || on_16_bytes(a.weight)) && on_16_bytes(a.tables.bank);
}

// Read once: an operator call has a few microseconds in all. A wrong value is refused again at every call.
int32_t asked_columns() {
  static const int32_t columns = [] {
    const char* const text = std::getenv(COLUMNS_VARIABLE);
    const int32_t number = columns_of(text);
    STD_TORCH_CHECK(number >= 0, COLUMNS_VARIABLE,
                    " must be 8, 16 or 32 (columns of a row per thread), or not set; got ", text);
    return number;
  }();
  return columns;
}

// Read once, of every device.
int32_t sm_count(int32_t device) {
  static const std::vector<int32_t> counts = [] {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    std::vector<int32_t> each(devices);
    for (int i = 0; i < devices && error == cudaSuccess; ++i) {
      error = cudaDeviceGetAttribute(&each[i], cudaDevAttrMultiProcessorCount, i);
    }
    STD_TORCH_CHECK(error == cudaSuccess, "cannot count multiprocessors: ", cudaGetErrorString(error));
    return each;
  }();
  return counts.at(device);
}

// Makes x's device current for one call.
class Cuda {
 public:
  explicit Cuda(int32_t device) : index(device), guard(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // Rows on a CUDA device, few enough for the 32-bit numbers that the kernels count them with.
  static void check(const Layout& x) {
    require(x.device_type == aoti_torch_device_type_cuda(), "x");
    require(x.sizes[0] <= std::numeric_limits<int32_t>::max() - MAX_THREADS_PER_ROW, "x");
  }

  void run(const char* name, RowOp op, const RowArguments& a) const {
    if (a.rows == 0) return;
    const LaunchConfig config =
        choose_launch(a.rows, a.hidden_size, item_size(a.dtype), aligned(a), sm_count(index), asked_columns());
    STD_TORCH_CHECK(config.threads_per_row <= MAX_THREADS_PER_ROW, COLUMNS_VARIABLE, " must be at least ",
                    ceil_div(a.hidden_size, MAX_THREADS_PER_ROW), " for rows of ", a.hidden_size, " columns; got ",
                    asked_columns());
    const cudaError_t error = launch_row(op, config, a, stream);
    STD_TORCH_CHECK(error == cudaSuccess, "faststeer::", name, ": the launch for ", a.rows, " rows of ", a.hidden_size,
                    " columns failed: ", cudaGetErrorString(error));
  }

 private:
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

STABLE_TORCH_LIBRARY_IMPL(faststeer, CUDA, library) { FASTSTEER_REGISTER(library, Cuda) }

}  // namespace
}  // namespace faststeer

FASTSTEER_EXPORT(faststeer::Cuda)
