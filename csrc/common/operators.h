// The operators of docs/kernels.md on torch's tensors: check the arguments, make the results, have a back end run them.
// Written once, for every device. The schemas are defined in Python (faststeer/ops/schema.py).
//
// A back end is a class made for one call, with
//   static RowShape check(const Tensor& x)      x's shape, or an error; nothing is made before all arguments are checked
//   explicit Backend(const Tensor& x)           whatever has to hold while results are made and kernels are started
//   void run(const char* name, RowOp op, const RowShape&, const RowArguments&)
//   void latch(const RowShape&, const LatchArguments&)
// A probe that an operator makes is given uninitialised: `run` has zeros in it where nothing is probed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "checks.h"

namespace faststeer {

#define FASTSTEER_TABLES                                                                                         \
  const Tensor &bank, const Tensor &fields, const Tensor &scalars, const Tensor &ranges, const Tensor &row_slot, \
      const Tensor &row_position, const Tensor &row_sequence
#define FASTSTEER_MAKE_TABLES(rows) \
  make_tables(shape, bank, fields, scalars, ranges, row_slot, row_position, row_sequence, gate_state, TableRows::rows)

template <class Backend>
class Operators {
 public:
  static std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES, const std::optional<Tensor>& gate_state,
                                          int64_t columns) {
    const RowShape shape = Backend::check(x);
    RowArguments arguments = arguments_of(x, shape, FASTSTEER_MAKE_TABLES(EXACTLY));
    Backend backend(x);
    Tensor probe = new_probe(x, shape, columns, arguments), hidden = new_hidden(x, shape, arguments);
    backend.run("steer", RowOp::STEER, shape, arguments);
    return {hidden, probe};
  }

  static void steer_(const Tensor& x, FASTSTEER_TABLES, const std::optional<Tensor>& gate_state,
                     const std::optional<Tensor>& probe) {
    const RowShape shape = Backend::check(x);
    RowArguments arguments = arguments_of(x, shape, FASTSTEER_MAKE_TABLES(EXACTLY));
    write_probe(probe, TableRows::EXACTLY, shape, arguments);
    arguments.hidden = x.data_ptr();
    arguments.hidden_stride = shape.stride;
    Backend(x).run("steer_", RowOp::STEER_IN_PLACE, shape, arguments);
  }

  static std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES,
                                              const std::optional<Tensor>& gate_state, int64_t columns) {
    const RowShape shape = Backend::check(x);
    RowArguments arguments = arguments_of(x, shape, FASTSTEER_MAKE_TABLES(EXACTLY));
    add_residual(residual, shape, arguments);
    Backend backend(x);
    Tensor probe = new_probe(x, shape, columns, arguments), hidden = new_hidden(x, shape, arguments);
    backend.run("add_steer", RowOp::ADD_STEER, shape, arguments);
    return {hidden, probe};
  }

  static void steer_pair_(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES,
                          const std::optional<Tensor>& gate_state, const std::optional<Tensor>& probe) {
    const RowShape shape = Backend::check(x);
    RowArguments arguments = arguments_of(x, shape, FASTSTEER_MAKE_TABLES(AT_LEAST));
    add_residual(residual, shape, arguments);
    write_probe(probe, TableRows::AT_LEAST, shape, arguments);
    arguments.hidden = residual.data_ptr();
    arguments.hidden_stride = arguments.residual_stride;
    arguments.cleared = x.data_ptr();
    Backend(x).run("steer_pair_", RowOp::STEER_PAIR, shape, arguments);
  }

  static std::tuple<Tensor, Tensor, Tensor> add_steer_rmsnorm(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, double eps, double weight_offset,
                                                              bool fp32_weight, FASTSTEER_TABLES,
                                                              const std::optional<Tensor>& gate_state,
                                                              int64_t columns) {
    const RowShape shape = Backend::check(x);
    RowArguments arguments = arguments_of(x, shape, FASTSTEER_MAKE_TABLES(EXACTLY));
    add_residual(residual, shape, arguments);
    arguments.weight_dtype = check_float(weight, "weight");
    check_table(weight, "weight", torch_dtype(weight), {shape.hidden}, shape);
    arguments.weight = weight.data_ptr();
    arguments.eps = static_cast<float>(eps);
    arguments.weight_offset = static_cast<float>(weight_offset);
    arguments.fp32_weight = fp32_weight;
    Backend backend(x);
    Tensor probe = new_probe(x, shape, columns, arguments), hidden = new_hidden(x, shape, arguments);
    Tensor normed = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
    arguments.normed = normed.data_ptr();
    backend.run("add_steer_rmsnorm", RowOp::ADD_STEER_RMSNORM, shape, arguments);
    return {normed, hidden, probe};
  }

  static void latch_(const Tensor& x, const std::optional<Tensor>& residual, FASTSTEER_TABLES,
                     const Tensor& gate_state) {
    const RowShape shape = Backend::check(x);
    LatchArguments arguments{};
    arguments.tables = FASTSTEER_MAKE_TABLES(EXACTLY);
    arguments.x = x.data_ptr();
    arguments.x_stride = shape.stride;
    if (residual.has_value()) {
      arguments.residual_stride = check_rows_like(*residual, "residual", shape);
      arguments.residual = residual->data_ptr();
    }
    arguments.gate_state = static_cast<uint8_t*>(gate_state.data_ptr());
    arguments.rows = shape.rows;
    arguments.hidden_size = static_cast<int32_t>(shape.hidden);
    Backend(x).latch(shape, arguments);
  }

 private:
  static RowArguments arguments_of(const Tensor& x, const RowShape& shape, const Tables& tables) {
    RowArguments arguments{};
    arguments.x = x.data_ptr();
    arguments.rows = shape.rows;
    arguments.x_stride = shape.stride;
    arguments.hidden_size = static_cast<int32_t>(shape.hidden);
    arguments.tables = tables;
    return arguments;
  }

  static void add_residual(const Tensor& residual, const RowShape& shape, RowArguments& arguments) {
    arguments.residual_stride = check_rows_like(residual, "residual", shape);
    arguments.residual = residual.data_ptr();
  }

  static void set_probe(const Tensor& probe, RowArguments& arguments) {
    require(probe.size(1) <= std::numeric_limits<int32_t>::max(), "probe");
    arguments.probe = static_cast<float*>(probe.data_ptr());
    arguments.probe_columns = static_cast<int32_t>(probe.size(1));
  }

  static void write_probe(const std::optional<Tensor>& probe, TableRows rows, const RowShape& shape,
                          RowArguments& arguments) {
    if (!probe.has_value()) return;
    check_row_table(*probe, "probe", aoti_torch_dtype_float32(), rows, shape, true);
    set_probe(*probe, arguments);
  }

  static Tensor new_probe(const Tensor& x, const RowShape& shape, int64_t columns, RowArguments& arguments) {
    require(columns >= 0, "columns");
    Tensor probe = new_rows(x, shape.rows, columns, aoti_torch_dtype_float32());
    set_probe(probe, arguments);
    return probe;
  }

  static Tensor new_hidden(const Tensor& x, const RowShape& shape, RowArguments& arguments) {
    Tensor hidden = new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
    arguments.hidden = hidden.data_ptr();
    arguments.hidden_stride = shape.hidden;
    return hidden;
  }
};

// Inside STABLE_TORCH_LIBRARY_IMPL(faststeer, ..., library).
#define FASTSTEER_REGISTER(library, Backend)                                                  \
  library.impl("steer.cpp", TORCH_BOX(&Operators<Backend>::steer));                           \
  library.impl("steer_.cpp", TORCH_BOX(&Operators<Backend>::steer_));                         \
  library.impl("add_steer.cpp", TORCH_BOX(&Operators<Backend>::add_steer));                   \
  library.impl("steer_pair_.cpp", TORCH_BOX(&Operators<Backend>::steer_pair_));               \
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&Operators<Backend>::add_steer_rmsnorm));   \
  library.impl("latch_.cpp", TORCH_BOX(&Operators<Backend>::latch_));

}  // namespace faststeer
