// Checks of an operator's arguments, for the CPU and the CUDA operators alike, through torch's stable ABI: what must hold
// lest memory be read that is not there. A wrong argument raises RuntimeError with its name; faststeer.ops then says what
// was expected and what came (schema.py). What the tables hold is not checked: it may change between two replays of a
// graph, and tables.h keeps it from doing harm.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "launch.h"

namespace faststeer {

using torch::stable::Tensor;

// Raise RuntimeError unless it holds.
inline void require(bool holds, const char* name) {
  if (!holds) throw std::runtime_error(std::string(name) + " does not fit this operator: faststeer.ops says why not");
}

inline int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline Dtype check_float(const Tensor& tensor, const char* name) {
  const int32_t dtype = torch_dtype(tensor);
  if (dtype == aoti_torch_dtype_float32()) return Dtype::FP32;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::FP16;
  require(dtype == aoti_torch_dtype_bfloat16(), name);
  return Dtype::BF16;
}

// x: `[rows, hidden]`, of one of the three dtypes, each row contiguous and apart from the others.
inline RowShape check_rows(const Tensor& x, const char* name) {
  const auto sizes = x.sizes(), strides = x.strides();
  require(sizes.size() == 2, name);
  const int64_t rows = sizes[0], hidden = sizes[1];
  require(hidden >= 1 && hidden <= MAX_HIDDEN, name);
  require((hidden == 1 || strides[1] == 1) && (rows <= 1 || strides[0] >= hidden), name);
  return {rows, hidden, rows > 1 ? strides[0] : hidden, check_float(x, name), device_type(x), x.get_device_index()};
}

// Rows just like x's; only their stride may differ. Returns them.
inline Rows check_rows_like(const Tensor& tensor, const char* name, const RowShape& shape) {
  const RowShape own = check_rows(tensor, name);
  require(own.rows == shape.rows && own.hidden == shape.hidden && own.dtype == shape.dtype, name);
  require(own.device_type == shape.device_type && own.device_index == shape.device_index, name);
  return {tensor.data_ptr(), own.stride};
}

// A tensor of exactly this dtype and these sizes (-1: any) on x's device, contiguous unless said otherwise.
inline void check_table(const Tensor& tensor, const char* name, int32_t dtype, std::initializer_list<int64_t> expected,
                        const RowShape& shape, bool contiguous = true) {
  const auto sizes = tensor.sizes();
  bool fits = torch_dtype(tensor) == dtype && sizes.size() == expected.size();
  fits = fits && (!contiguous || tensor.is_contiguous());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = expected.begin()[i] < 0 || sizes[i] == expected.begin()[i];
  }
  fits = fits && device_type(tensor) == shape.device_type && tensor.get_device_index() == shape.device_index;
  require(fits, name);
}

// The tables of a call, once all of them fit x and each other.
inline Tables make_tables(const RowShape& shape, const Tensor& bank, const Tensor& entries, const Tensor& ranges,
                          const Tensor& rows, const std::optional<Tensor>& gate_state) {
  const int32_t int32 = aoti_torch_dtype_int32();
  check_table(bank, "bank", aoti_torch_dtype_float32(), {-1, shape.hidden}, shape);
  check_table(entries, "entries", int32, {-1, N_FIELDS}, shape);
  require(reinterpret_cast<uintptr_t>(entries.data_ptr()) % alignof(Entry) == 0, "entries");
  check_table(ranges, "ranges", int32, {-1, 2}, shape);
  check_table(rows, "rows", int32, {N_PLACES, -1}, shape, false);
  require(rows.size(1) >= shape.rows && (rows.size(1) <= 1 || rows.stride(1) == 1), "rows");
  if (gate_state.has_value()) check_table(*gate_state, "gate_state", aoti_torch_dtype_bool(), {-1, -1}, shape);

  const auto count = [](const char* name, int64_t number) {
    require(number <= std::numeric_limits<int32_t>::max(), name);
    return static_cast<int32_t>(number);
  };
  Tables tables{};
  tables.bank = static_cast<const float*>(bank.data_ptr());
  tables.entries = static_cast<const Entry*>(entries.data_ptr());
  tables.ranges = static_cast<const int32_t*>(ranges.data_ptr());
  tables.slots = static_cast<const int32_t*>(rows.data_ptr());
  tables.positions = tables.slots + rows.stride(0);
  tables.sequences = tables.positions + rows.stride(0);
  tables.gate_state = gate_state.has_value() ? static_cast<uint8_t*>(gate_state->data_ptr()) : nullptr;
  tables.n_vectors = count("bank", bank.size(0));
  tables.n_entries = count("entries", entries.size(0));
  tables.n_slots = count("ranges", ranges.size(0));
  tables.n_gates = gate_state.has_value() ? count("gate_state", gate_state->size(0)) : 0;
  tables.n_sequences = gate_state.has_value() ? count("gate_state", gate_state->size(1)) : 0;
  return tables;
}

// An uninitialised contiguous `[rows, columns]` tensor on x's device.
inline Tensor new_rows(const Tensor& x, int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, device_type(x), x.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace faststeer
