// The row kernels for one dtype, and from a configuration to the one instantiated for it. Compiled once per dtype of
// kernels.h, with FASTSTEER_ROW_TYPE and FASTSTEER_LAUNCH naming it and its launcher, so that they compile side by side.
#include "latch.cuh"
#include "row.cuh"

namespace faststeer {

static cudaError_t launch(void (*kernel)(RowArguments), int64_t blocks, dim3 block, size_t shared_bytes,
                          const RowArguments& arguments, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  // More than a kernel gets unasked. Only the widest rows need it.
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments);
  const cudaError_t pending = cudaGetLastError();  // also clears it, so that it is not reported again elsewhere
  return error != cudaSuccess ? error : pending;
}

template <typename T, int ELEMENTS, int VECTORS, int HIDDEN = 0>
static cudaError_t launch_row_as(RowOp op, const LaunchConfig& config, const RowArguments& arguments,
                                 cudaStream_t stream) {
  const dim3 block(config.threads_per_row, config.rows_per_block);
  const size_t stash = sizeof(float) * block.x * block.y * Row<T, ELEMENTS, VECTORS, HIDDEN>::STASH;
  static void (*const kernels[])(RowArguments) = {// by RowOp; launch_row_for has LATCH
                                                  row_kernel<T, ELEMENTS, VECTORS, HIDDEN, RowOp::STEER>,
                                                  row_kernel<T, ELEMENTS, VECTORS, HIDDEN, RowOp::ADD_STEER>,
                                                  row_kernel<T, ELEMENTS, VECTORS, HIDDEN, RowOp::STEER_PAIR>,
                                                  row_kernel<T, ELEMENTS, VECTORS, HIDDEN, RowOp::ADD_STEER_RMSNORM>};
  const int64_t blocks = ceil_div(arguments.rows, block.y);
  return launch(kernels[static_cast<int32_t>(op)], blocks, block, sizeof(Partials) + stash, arguments, stream);
}

// The configurations that choose_launch gives, and no others.
template <typename T>
static cudaError_t launch_row_for(RowOp op, const LaunchConfig& config, const RowArguments& arguments,
                                  cudaStream_t stream) {
  if (op == RowOp::LATCH) {
    const int64_t blocks = ceil_div(arguments.rows, LATCH_ROWS);
    return launch(latch_kernel<T>, blocks, dim3(LATCH_THREADS), sizeof(Partials), arguments, stream);
  }
  constexpr int WIDE = 16 / sizeof(T);
  const int columns = config.columns_per_thread();
  if (config.elements_per_vector == WIDE) {
    if constexpr (sizeof(T) == 2) {  // many rows of the most common sizes: bound by the instructions that they issue
      if (columns == MOST_COLUMNS && config.threads_per_row * columns == arguments.hidden_size) {
        constexpr int V = MOST_COLUMNS / WIDE;
        if (arguments.hidden_size == 2048) return launch_row_as<T, WIDE, V, 2048>(op, config, arguments, stream);
        if (arguments.hidden_size == 4096) return launch_row_as<T, WIDE, V, 4096>(op, config, arguments, stream);
        if (arguments.hidden_size == 8192) return launch_row_as<T, WIDE, V, 8192>(op, config, arguments, stream);
      }
    }
    if (columns == FEWEST_COLUMNS) return launch_row_as<T, WIDE, FEWEST_COLUMNS / WIDE>(op, config, arguments, stream);
    if (columns == MIDDLE_COLUMNS) return launch_row_as<T, WIDE, MIDDLE_COLUMNS / WIDE>(op, config, arguments, stream);
    if (columns == MOST_COLUMNS) return launch_row_as<T, WIDE, MOST_COLUMNS / WIDE>(op, config, arguments, stream);
  } else if (config.elements_per_vector == 1) {
    if (columns == FEWEST_COLUMNS) return launch_row_as<T, 1, FEWEST_COLUMNS>(op, config, arguments, stream);
    if (columns == MOST_COLUMNS) return launch_row_as<T, 1, MOST_COLUMNS>(op, config, arguments, stream);
  }
  return cudaErrorInvalidConfiguration;
}

cudaError_t FASTSTEER_LAUNCH(RowOp op, const LaunchConfig& config, const RowArguments& arguments, cudaStream_t stream) {
  return launch_row_for<FASTSTEER_ROW_TYPE>(op, config, arguments, stream);
}

}  // namespace faststeer
