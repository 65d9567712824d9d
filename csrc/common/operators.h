// The operators of docs/kernels.md on torch's tensors: check the arguments, make the results, have a back end run them.
// Written once, for every device. The schemas are defined in Python (faststeer/ops/schema.py).
//
// A back end is a class made for one call, with
//   static RowShape check(const Tensor& x)      x's shape, or an error; nothing is made before all arguments are checked
//   explicit Backend(int32_t device)            whatever has to hold while results are made and kernels are started
//   void run(const char* name, RowOp op, const RowShape&, const RowArguments&)
// A probe that an operator makes is given uninitialised: `run` has zeros in it where nothing is probed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "checks.h"

namespace faststeer {

using Optional = std::optional<Tensor>;

#define FASTSTEER_TABLES \
  const Tensor &bank, const Tensor &entries, const Tensor &ranges, const Tensor &rows, const Optional &gate_state

template <class Backend>
class Operators {
 public:
  static std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES, const Optional& scalars, int64_t columns) {
    return Call(x, bank, entries, ranges, rows, gate_state).compute("steer", RowOp::STEER, scalars, columns);
  }

  static void steer_(const Tensor& x, FASTSTEER_TABLES, const Optional& probe) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.write("steer_", RowOp::STEER_IN_PLACE, call.arguments.x, probe);
  }

  static std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES,
                                              const Optional& scalars, int64_t columns) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    return call.compute("add_steer", RowOp::ADD_STEER, scalars, columns);
  }

  static void steer_pair_(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES, const Optional& probe) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    call.write("steer_pair_", RowOp::STEER_PAIR, call.arguments.residual, probe);
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
    call.backend.run("latch_", RowOp::LATCH, call.shape, call.arguments);
  }

 private:
  // One call on rows: its arguments, checked, then its results.
  struct Call {
    const Tensor& x;
    const RowShape shape;
    const Backend backend;
    RowArguments arguments{};

    Call(const Tensor& x, FASTSTEER_TABLES) : x(x), shape(Backend::check(x)), backend(shape.device_index) {
      arguments.x = {x.data_ptr(), shape.stride};
      arguments.rows = shape.rows;
      arguments.hidden_size = static_cast<int32_t>(shape.hidden);
      arguments.tables = make_tables(shape, bank, entries, ranges, rows, gate_state);
    }

    void norm(const Tensor& weight, double eps, double weight_offset, bool fp32_weight) {
      arguments.weight_dtype = check_float(weight, "weight");
      check_table(weight, "weight", torch_dtype(weight), {shape.hidden}, shape);
      arguments.weight = weight.data_ptr();
      arguments.eps = static_cast<float>(eps);
      arguments.weight_offset = static_cast<float>(weight_offset);
      arguments.fp32_weight = fp32_weight;
    }

    void add(const Tensor& residual) { arguments.residual = check_rows_like(residual, "residual", shape); }

    // Into new tensors. `scalars` are for gradients, which Python computes: their numbers are those of the entries.
    std::tuple<Tensor, Tensor> compute(const char* name, RowOp op, const Optional& scalars, int64_t columns,
                                       Optional* normed = nullptr) {
      if (scalars.has_value()) {
        check_table(*scalars, "scalars", aoti_torch_dtype_float32(), {arguments.tables.n_entries, N_SCALARS}, shape);
      }
      require(columns >= 0, "columns");
      const Tensor probe = new_rows(x, shape.rows, columns, aoti_torch_dtype_float32());
      set_probe(probe);
      const Tensor hidden = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
      arguments.hidden = {hidden.data_ptr(), shape.hidden};
      if (normed != nullptr) {
        *normed = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
        arguments.normed = (*normed)->data_ptr();
      }
      backend.run(name, op, shape, arguments);
      return {hidden, probe};
    }

    // In place: into `hidden`, which is x or residual. The probe of a pair may have room for more rows.
    void write(const char* name, RowOp op, const Rows& hidden, const Optional& probe) {
      if (probe.has_value()) {
        check_table(*probe, "probe", aoti_torch_dtype_float32(), {-1, -1}, shape);
        require(op == RowOp::STEER_PAIR ? probe->size(0) >= shape.rows : probe->size(0) == shape.rows, "probe");
        set_probe(*probe);
      }
      arguments.hidden = hidden;
      backend.run(name, op, shape, arguments);
    }

    void set_probe(const Tensor& probe) {
      require(probe.size(1) <= std::numeric_limits<int32_t>::max(), "probe");
      arguments.probe = static_cast<float*>(probe.data_ptr());
      arguments.probe_columns = static_cast<int32_t>(probe.size(1));
    }
  };
};

template <class Backend>
const char* run_prepared(int64_t size, RowOp op, const RowShape& shape, const RowArguments& arguments) noexcept {
  if (size != sizeof(RowArguments)) return "faststeer's libraries were built of different sources: build them again";
  thread_local std::string wrong;
  try {
    Backend(shape.device_index).run("prepared", op, shape, arguments);
    return nullptr;
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}

// Inside STABLE_TORCH_LIBRARY_IMPL(faststeer, ..., library).
#define FASTSTEER_REGISTER(library, Backend)                                                \
  library.impl("steer.cpp", TORCH_BOX(&Operators<Backend>::steer));                         \
  library.impl("steer_.cpp", TORCH_BOX(&Operators<Backend>::steer_));                       \
  library.impl("add_steer.cpp", TORCH_BOX(&Operators<Backend>::add_steer));                 \
  library.impl("steer_pair_.cpp", TORCH_BOX(&Operators<Backend>::steer_pair_));             \
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&Operators<Backend>::add_steer_rmsnorm)); \
  library.impl("latch_.cpp", TORCH_BOX(&Operators<Backend>::latch_));

// See `Run`.
#define FASTSTEER_EXPORT(Backend)                                                                                      \
  extern "C" __attribute__((visibility("default"))) const char* faststeer_run(                                         \
      int64_t size, faststeer::RowOp op, const faststeer::RowShape& shape, const faststeer::RowArguments& arguments) { \
    return faststeer::run_prepared<Backend>(size, op, shape, arguments);                                               \
  }

}  // namespace faststeer
