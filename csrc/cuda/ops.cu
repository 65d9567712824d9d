// The operators on CUDA tensors, registered with torch through its stable ABI: choose the launch configuration, launch
// on the current stream. Nothing here waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <string>

#include "../common/operators.h"
#include "kernels.h"

namespace faststeer {
namespace {

void check_launched(const char* op, const Launched& launched) {
  STD_TORCH_CHECK(launched.error == cudaSuccess, "faststeer::", op, ": the launch of ", launched.grid.x, " blocks of ",
                  launched.block.x, " x ", launched.block.y, " threads failed: ", cudaGetErrorString(launched.error));
}

int64_t item_size(Dtype dtype) { return dtype == Dtype::FP32 ? 4 : 2; }

bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

bool on_16_bytes(const Rows& rows, Dtype dtype) {
  return on_16_bytes(rows.data) && rows.stride * item_size(dtype) % 16 == 0;
}

// 16 bytes at a time only if everything that is read or written so allows it.
bool aligned(const RowShape& shape, const RowArguments& a) {
  return on_16_bytes(a.x, shape.dtype) && on_16_bytes(a.hidden, shape.dtype) && on_16_bytes(a.residual, shape.dtype) &&
         on_16_bytes(a.normed) && (a.weight_dtype != shape.dtype || on_16_bytes(a.weight)) &&
         on_16_bytes(a.tables.bank);
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

// Makes x's device current for one call.
class Cuda {
 public:
  explicit Cuda(int32_t device) : index(device), guard(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // Rows on a CUDA device, few enough for the 32-bit numbers that the kernels count them with.
  static RowShape check(const Tensor& x) {
    const RowShape shape = check_rows(x, "x");
    require(x.is_cuda() && shape.rows <= std::numeric_limits<int32_t>::max() - MAX_THREADS_PER_ROW, "x");
    return shape;
  }

  void run(const char* name, RowOp op, const RowShape& shape, const RowArguments& arguments) const {
    if (shape.rows == 0) return;
    const int32_t size = static_cast<int32_t>(item_size(shape.dtype));
    const LaunchConfig config =
        choose_launch(shape.rows, shape.hidden, size, aligned(shape, arguments), sm_count(), asked_columns());
    STD_TORCH_CHECK(config.threads_per_row <= MAX_THREADS_PER_ROW, COLUMNS_VARIABLE, " must be at least ",
                    ceil_div(shape.hidden, MAX_THREADS_PER_ROW), " for rows of ", shape.hidden, " columns; got ",
                    asked_columns());
    check_launched(name, launch_row(op, shape.dtype, config, arguments, stream));
  }

 private:
  // Asked for once per device: an operator call has a few microseconds in all.
  int32_t sm_count() const {
    static std::array<std::atomic<int32_t>, 64> known{};
    std::atomic<int32_t>* const kept = static_cast<size_t>(index) < known.size() ? &known[index] : nullptr;
    int32_t count = kept != nullptr ? kept->load(std::memory_order_relaxed) : 0;
    if (count == 0) {
      const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
      STD_TORCH_CHECK(error == cudaSuccess, "cannot count the multiprocessors of cuda:", index, ": ",
                      cudaGetErrorString(error));
      if (kept != nullptr) kept->store(count, std::memory_order_relaxed);
    }
    return count;
  }

  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

STABLE_TORCH_LIBRARY_IMPL(faststeer, CUDA, library) { FASTSTEER_REGISTER(library, Cuda) }

}  // namespace
}  // namespace faststeer

FASTSTEER_EXPORT(faststeer::Cuda)
