// The operators of docs/kernels.md on torch's tensors: check the arguments, make the results, have a back end run them.
// Written once, for every device. The schemas are defined in Python (faststeer/ops/schema.py).
//
// A back end is a class made for one call, with
//   static void check(const Layout& x)   what x must be besides; nothing is made before all arguments are checked
//   explicit Backend(int32_t device)     whatever has to hold while results are made and kernels are started
//   void run(const char* name, RowOp op, const RowArguments&)
// A probe that an operator makes is given uninitialised: `run` has zeros in it where nothing is probed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "checks.h"

namespace faststeer {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline Layout layout_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int32_t number = torch_dtype(tensor);
  const Dtype dtype = number == aoti_torch_dtype_float32()    ? Dtype::FP32
                      : number == aoti_torch_dtype_float16()  ? Dtype::FP16
                      : number == aoti_torch_dtype_bfloat16() ? Dtype::BF16
                      : number == aoti_torch_dtype_int32()    ? Dtype::INT32
                      : number == aoti_torch_dtype_bool()     ? Dtype::BOOL
                                                              : Dtype::OTHER;
  const auto n = static_cast<int32_t>(sizes.size());
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  return {tensor.data_ptr(), n, sizes.data(), strides.data(), dtype, device, tensor.get_device_index()};
}

// An uninitialised contiguous `[rows, columns]` tensor beside x.
inline Tensor new_rows(const Layout& x, int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype, x.device_type, x.device_index, &handle));
  return Tensor(handle);
}

#define FASTSTEER_TABLES \
  const Tensor &bank, const Tensor &entries, const Tensor &ranges, const Tensor &rows, const Optional &gate_state

template <class Backend>
class Operators {
 public:
  static std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES, const Optional& scalars, int64_t columns) {
    return Call(x, bank, entries, ranges, rows, gate_state).compute("steer", RowOp::STEER, scalars, columns);
  }

  static std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES,
                                              const Optional& scalars, int64_t columns) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    return call.compute("add_steer", RowOp::ADD_STEER, scalars, columns);
  }

  // In place. The probe may have room for more rows.
  static void steer_pair_(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES, const Optional& probe) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    if (probe.has_value()) {
      const Layout layout = layout_of(*probe);
      check_table(layout, "probe", Dtype::FP32, {-1, -1}, call.x);
      require(layout.sizes[0] >= call.x.sizes[0], "probe");
      call.set_probe(layout);
    }
    call.arguments.hidden = call.arguments.residual;
    call.backend.run("steer_pair_", RowOp::STEER_PAIR, call.arguments);
  }

  static std::tuple<Tensor, Tensor, Tensor> add_steer_rmsnorm(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, double eps, double weight_offset,
                                                              bool fp32_weight, FASTSTEER_TABLES,
                                                              const Optional& scalars, int64_t columns) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    call.norm(weight, eps, weight_offset, fp32_weight);
    Optional normed;
    auto [hidden, probe] = call.compute("add_steer_rmsnorm", RowOp::ADD_STEER_RMSNORM, scalars, columns, &normed);
    return {*normed, hidden, probe};
  }

  static void latch_(const Tensor& x, const Optional& residual, const Tensor& bank, const Tensor& entries,
                     const Tensor& ranges, const Tensor& rows, const Tensor& gate_state) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    if (residual.has_value()) call.add(*residual);
    call.backend.run("latch_", RowOp::LATCH, call.arguments);
  }

 private:
  // One call on rows: its arguments, checked, then its results.
  struct Call {
    const Layout x;
    const int32_t dtype;
    const Backend backend;
    RowArguments arguments{};

    Call(const Tensor& tensor, FASTSTEER_TABLES)
        : x(checked(layout_of(tensor))), dtype(torch_dtype(tensor)), backend(x.device_index) {
      arguments.x = check_rows(x, "x");
      arguments.rows = x.sizes[0];
      arguments.hidden_size = static_cast<int32_t>(x.sizes[1]);
      arguments.dtype = x.dtype;
      const Layout gates = gate_state.has_value() ? layout_of(*gate_state) : Layout{};
      arguments.tables = make_tables(x, x.sizes[0], x.sizes[1], layout_of(bank), layout_of(entries), layout_of(ranges),
                                     layout_of(rows), gate_state.has_value() ? &gates : nullptr);
    }

    static Layout checked(const Layout& x) {
      check_rows(x, "x");
      Backend::check(x);
      return x;
    }

    void norm(const Tensor& weight, double eps, double weight_offset, bool fp32_weight) {
      set_norm(arguments, layout_of(weight), x.sizes[1], x, static_cast<float>(eps), static_cast<float>(weight_offset),
               fp32_weight);
    }

    // Rows just like x's; only their stride may differ.
    void add(const Tensor& residual) {
      const Layout layout = layout_of(residual);
      arguments.residual = check_rows(layout, "residual");
      require(layout.sizes[0] == x.sizes[0] && layout.sizes[1] == x.sizes[1], "residual");
      require(layout.dtype == x.dtype && layout.is_with(x), "residual");
    }

    // Into new tensors. `scalars` are for gradients, which Python computes: their numbers are those of the entries.
    std::tuple<Tensor, Tensor> compute(const char* name, RowOp op, const Optional& scalars, int64_t columns,
                                       Optional* normed = nullptr) {
      if (scalars.has_value()) {
        check_table(layout_of(*scalars), "scalars", Dtype::FP32, {arguments.tables.n_entries, N_SCALARS}, x);
      }
      require(columns >= 0, "columns");
      const int64_t rows = x.sizes[0], hidden_size = x.sizes[1];
      const Tensor probe = new_rows(x, rows, columns, aoti_torch_dtype_float32());
      set_probe(layout_of(probe));
      const Tensor hidden = new_rows(x, rows, hidden_size, dtype);
      arguments.hidden = {hidden.data_ptr(), hidden_size};
      if (normed != nullptr) {
        *normed = new_rows(x, rows, hidden_size, dtype);
        arguments.normed = (*normed)->data_ptr();
      }
      backend.run(name, op, arguments);
      return {hidden, probe};
    }

    void set_probe(const Layout& probe) {
      arguments.probe = static_cast<float*>(probe.data);
      arguments.probe_columns = count_of(probe, 1, "probe");
    }
  };
};

template <class Backend>
const char* run_prepared(int64_t size, RowOp op, int32_t device, const RowArguments& arguments) noexcept {
  if (size != sizeof(RowArguments)) return "faststeer's libraries were built of different sources: build them again";
  thread_local std::string wrong;
  try {
    Backend(device).run("prepared", op, arguments);
    return nullptr;
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}

// Inside STABLE_TORCH_LIBRARY_IMPL(faststeer, ..., library).
#define FASTSTEER_REGISTER(library, Backend)                                                \
  library.impl("steer.cpp", TORCH_BOX(&Operators<Backend>::steer));                         \
  library.impl("add_steer.cpp", TORCH_BOX(&Operators<Backend>::add_steer));                 \
  library.impl("steer_pair_.cpp", TORCH_BOX(&Operators<Backend>::steer_pair_));             \
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&Operators<Backend>::add_steer_rmsnorm)); \
  library.impl("latch_.cpp", TORCH_BOX(&Operators<Backend>::latch_));

// See `Run`.
#define FASTSTEER_EXPORT(Backend)                                                                    \
  extern "C" __attribute__((visibility("default"))) const char* faststeer_run(                       \
      int64_t size, faststeer::RowOp op, int32_t device, const faststeer::RowArguments& arguments) { \
    return faststeer::run_prepared<Backend>(size, op, device, arguments);                            \
  }

}  // namespace faststeer
