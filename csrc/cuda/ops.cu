// The operators on CUDA tensors, registered with torch through its stable ABI: check the arguments, choose the launch
// configuration, launch on the current stream. Nothing here waits for the device. The schemas are defined in Python
// (faststeer/ops/schema.py); the semantics are docs/kernels.md's.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "kernels.h"

namespace faststeer {
namespace {

// A device is made current for one call.
struct OnDevice {
  explicit OnDevice(const Tensor& x) : index(x.get_device_index()), guard(index) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

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

void check_launched(const char* op, const Launched& launched) {
  STD_TORCH_CHECK(launched.error == cudaSuccess, "faststeer::", op, ": the launch of ", launched.grid.x, " blocks of ",
                  launched.block.x, " x ", launched.block.y, " threads failed: ", cudaGetErrorString(launched.error));
}

// Rows on a CUDA device, few enough for the 32-bit numbers that the kernels count them with.
RowShape check_cuda_rows(const Tensor& x) {
  const RowShape shape = check_rows(x, "x");
  if (!x.is_cuda()) refuse("x", "on a CUDA device", device_name(device_type(x), x.get_device_index()));
  constexpr int64_t MOST = std::numeric_limits<int32_t>::max() - MAX_THREADS_PER_ROW;
  if (shape.rows > MOST) refuse("x", "of at most " + std::to_string(MOST) + " rows", shape.rows);
  return shape;
}

int64_t item_size(Dtype dtype) { return dtype == Dtype::FP32 ? 4 : 2; }

bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

bool rows_on_16_bytes(const void* first, int64_t stride, Dtype dtype) {
  return on_16_bytes(first) && stride * item_size(dtype) % 16 == 0;
}

#define FASTSTEER_TABLES_PARAMETERS                                                                                    \
  const Tensor &bank, const Tensor &fields, const Tensor &scalars, const Tensor &ranges, const Tensor &row_slot,       \
      const Tensor &row_position, const Tensor &row_sequence, const std::optional<Tensor>&gate_state
#define FASTSTEER_TABLES_OF(...) \
  make_tables(shape, bank, fields, scalars, ranges, row_slot, row_position, row_sequence, gate_state, __VA_ARGS__)
#define FASTSTEER_TABLES FASTSTEER_TABLES_OF(TableRows::EXACTLY)

RowArguments row_arguments(const Tensor& x, const RowShape& shape, const Tables& tables) {
  RowArguments arguments{};
  arguments.x = x.data_ptr();
  arguments.rows = shape.rows;
  arguments.x_stride = shape.stride;
  arguments.hidden_size = static_cast<int32_t>(shape.hidden);
  arguments.tables = tables;
  return arguments;
}

void add_residual(const Tensor& residual, const Tensor& x, const RowShape& shape, RowArguments& arguments) {
  arguments.residual_stride = check_rows_like(residual, "residual", x, shape);
  arguments.residual = residual.data_ptr();
}

void set_probe(const Tensor& probe, RowArguments& arguments) {
  if (probe.size(1) > std::numeric_limits<int32_t>::max()) refuse("probe", "of fewer than 2^31 columns", probe.size(1));
  arguments.probe = static_cast<float*>(probe.data_ptr());
  arguments.probe_columns = static_cast<int32_t>(probe.size(1));
}

void write_probe(const std::optional<Tensor>& probe, TableRows rows, const RowShape& shape, RowArguments& arguments) {
  if (!probe.has_value()) return;
  check_row_table(*probe, "probe", aoti_torch_dtype_float32(), rows, shape, true);
  set_probe(*probe, arguments);
}

// The kernel fills it, zeros where nothing is probed.
Tensor new_probe(const Tensor& x, const RowShape& shape, int64_t columns, RowArguments& arguments) {
  if (columns < 0) refuse("columns", "0 or more", columns);
  Tensor probe = new_rows(x, shape.rows, columns, aoti_torch_dtype_float32());
  set_probe(probe, arguments);
  return probe;
}

Tensor new_hidden(const Tensor& x, const RowShape& shape, RowArguments& arguments) {
  Tensor hidden = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
  arguments.hidden = hidden.data_ptr();
  arguments.hidden_stride = shape.hidden;
  return hidden;
}

// 16 bytes at a time only if everything that is read or written so allows it.
bool aligned(const RowShape& shape, const RowArguments& a) {
  const Tables& tables = a.tables;
  return rows_on_16_bytes(a.x, a.x_stride, shape.dtype) && rows_on_16_bytes(a.hidden, a.hidden_stride, shape.dtype) &&
         rows_on_16_bytes(a.residual, a.residual_stride, shape.dtype) && on_16_bytes(a.normed) &&
         (a.weight_dtype != shape.dtype || on_16_bytes(a.weight)) && on_16_bytes(tables.bank) &&
         on_16_bytes(tables.fields) && on_16_bytes(tables.scalars);
}

// Read once: an operator call has a few microseconds in all. A wrong value is refused again at every call.
int32_t asked_columns() {
  static const int32_t columns = [] {
    const char* const text = std::getenv(COLUMNS_VARIABLE);
    const int32_t number = columns_of(text);
    if (number < 0) refuse(COLUMNS_VARIABLE, "8, 16 or 32 (columns of a row per thread), or not set", text);
    return number;
  }();
  return columns;
}

void launch_rows(const char* name, RowOp op, const OnDevice& device, const RowShape& shape,
                 const RowArguments& arguments) {
  if (shape.rows == 0) return;
  const int32_t size = static_cast<int32_t>(item_size(shape.dtype));
  const LaunchConfig config =
      choose_launch(shape.rows, shape.hidden, size, aligned(shape, arguments), device.sm_count(), asked_columns());
  if (config.threads_per_row > MAX_THREADS_PER_ROW) {
    refuse(COLUMNS_VARIABLE, "at least " + std::to_string(ceil_div(shape.hidden, MAX_THREADS_PER_ROW)) +
           " for rows of " + std::to_string(shape.hidden) + " columns", asked_columns());
  }
  check_launched(name, launch_row(op, shape.dtype, config, arguments, device.stream));
}

std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES_PARAMETERS, int64_t columns) {
  const RowShape shape = check_cuda_rows(x);
  RowArguments arguments = row_arguments(x, shape, FASTSTEER_TABLES);
  const OnDevice device(x);
  Tensor probe = new_probe(x, shape, columns, arguments);
  Tensor hidden = new_hidden(x, shape, arguments);
  launch_rows("steer", RowOp::STEER, device, shape, arguments);
  return {hidden, probe};
}

void steer_(const Tensor& x, FASTSTEER_TABLES_PARAMETERS, const std::optional<Tensor>& probe) {
  const RowShape shape = check_cuda_rows(x);
  RowArguments arguments = row_arguments(x, shape, FASTSTEER_TABLES);
  write_probe(probe, TableRows::EXACTLY, shape, arguments);
  arguments.hidden = x.data_ptr();
  arguments.hidden_stride = shape.stride;
  launch_rows("steer_", RowOp::STEER_IN_PLACE, OnDevice(x), shape, arguments);
}

std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES_PARAMETERS,
                                     int64_t columns) {
  const RowShape shape = check_cuda_rows(x);
  RowArguments arguments = row_arguments(x, shape, FASTSTEER_TABLES);
  add_residual(residual, x, shape, arguments);
  const OnDevice device(x);
  Tensor probe = new_probe(x, shape, columns, arguments);
  Tensor hidden = new_hidden(x, shape, arguments);
  launch_rows("add_steer", RowOp::ADD_STEER, device, shape, arguments);
  return {hidden, probe};
}

void steer_pair_(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES_PARAMETERS,
                 const std::optional<Tensor>& probe) {
  const RowShape shape = check_cuda_rows(x);
  RowArguments arguments = row_arguments(x, shape, FASTSTEER_TABLES_OF(TableRows::AT_LEAST));
  add_residual(residual, x, shape, arguments);
  write_probe(probe, TableRows::AT_LEAST, shape, arguments);
  arguments.hidden = residual.data_ptr();
  arguments.hidden_stride = arguments.residual_stride;
  arguments.cleared = x.data_ptr();
  launch_rows("steer_pair_", RowOp::STEER_PAIR, OnDevice(x), shape, arguments);
}

std::tuple<Tensor, Tensor, Tensor> add_steer_rmsnorm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     double eps, double weight_offset, bool fp32_weight,
                                                     FASTSTEER_TABLES_PARAMETERS, int64_t columns) {
  const RowShape shape = check_cuda_rows(x);
  RowArguments arguments = row_arguments(x, shape, FASTSTEER_TABLES);
  add_residual(residual, x, shape, arguments);
  arguments.weight_dtype = check_float(weight, "weight");
  check_table(weight, "weight", torch_dtype(weight), {shape.hidden}, shape);
  arguments.weight = weight.data_ptr();
  arguments.eps = static_cast<float>(eps);
  arguments.weight_offset = static_cast<float>(weight_offset);
  arguments.fp32_weight = fp32_weight;
  const OnDevice device(x);
  Tensor probe = new_probe(x, shape, columns, arguments);
  Tensor hidden = new_hidden(x, shape, arguments);
  Tensor normed = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
  arguments.normed = normed.data_ptr();
  launch_rows("add_steer_rmsnorm", RowOp::ADD_STEER_RMSNORM, device, shape, arguments);
  return {normed, hidden, probe};
}

void latch_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& bank, const Tensor& fields,
            const Tensor& scalars, const Tensor& ranges, const Tensor& row_slot, const Tensor& row_position,
            const Tensor& row_sequence, const Tensor& gate_state) {
  const RowShape shape = check_cuda_rows(x);
  LatchArguments arguments{};
  arguments.tables = FASTSTEER_TABLES;
  arguments.x = x.data_ptr();
  arguments.x_stride = shape.stride;
  if (residual.has_value()) {
    arguments.residual_stride = check_rows_like(*residual, "residual", x, shape);
    arguments.residual = residual->data_ptr();
  }
  arguments.gate_state = static_cast<uint8_t*>(gate_state.data_ptr());
  arguments.rows = shape.rows;
  arguments.hidden_size = static_cast<int32_t>(shape.hidden);
  if (shape.rows == 0) return;
  const OnDevice device(x);
  check_launched("latch_", launch_latch(shape.dtype, arguments, device.stream));
}

STABLE_TORCH_LIBRARY_IMPL(faststeer, CUDA, library) {
  library.impl("steer.cpp", TORCH_BOX(&steer));
  library.impl("steer_.cpp", TORCH_BOX(&steer_));
  library.impl("add_steer.cpp", TORCH_BOX(&add_steer));
  library.impl("steer_pair_.cpp", TORCH_BOX(&steer_pair_));
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&add_steer_rmsnorm));
  library.impl("latch_.cpp", TORCH_BOX(&latch_));
}

}  // namespace
}  // namespace faststeer
