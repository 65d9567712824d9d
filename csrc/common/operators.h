// The operators of docs/kernels.md on torch's tensors: check the arguments, make the results, have a back end run them.
// Written once, for every device. The schemas are defined in Python (faststeer/ops/schema.py).
//
// A back end is a class made for one call, with
//   static RowShape check(const Tensor& x)      x's shape, or an error; nothing is made before all arguments are checked
//   explicit Backend(const Tensor& x)           whatever has to hold while results are made and kernels are started
//   void run(const char* name, RowOp op, const RowShape&, const RowArguments&)
// A probe that an operator makes is given uninitialised: `run` has zeros in it where nothing is probed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "checks.h"

namespace faststeer {

using Optional = std::optional<Tensor>;

#define FASTSTEER_TABLES \
  const Tensor &bank, const Tensor &entries, const Tensor &ranges, const Tensor &rows, const Optional &gate_state

// A program's tables, checked once, for the operators that are called at each of its sites: what an operator call costs
// the host grows with its arguments. They are the bytes of a CPU tensor. Whoever calls keeps the tables.
struct PreparedTables {
  static constexpr uint64_t MARK = 0x66617374'73746572;
  uint64_t mark;
  RowShape shape;  // of a row: its hidden size and device
  int64_t sites;
  Tables tables;  // of site 0, without rows; n_slots is that of one site

  // The tables at a site, for rows of this shape.
  static Tables at(const Tensor& bytes, int64_t site, const RowShape& shape) {
    require(device_type(bytes) == aoti_torch_device_type_cpu() && torch_dtype(bytes) == aoti_torch_dtype_uint8() &&
                bytes.numel() == sizeof(PreparedTables) && bytes.is_contiguous(),
            "prepared");
    const auto& prepared = *static_cast<const PreparedTables*>(bytes.data_ptr());
    require(prepared.mark == MARK, "prepared");
    require(shape.like(prepared.shape), "x");
    require(site >= 0 && site < prepared.sites, "site");
    Tables tables = prepared.tables;
    tables.ranges += 2 * tables.n_slots * site;
    return tables;
  }
};

template <class Backend>
class Operators {
 public:
  static Tensor prepare(const Tensor& bank, const Tensor& entries, const Tensor& ranges, const Optional& gate_state,
                        int64_t sites) {
    require(bank.dim() == 2 && bank.size(1) >= 1 && bank.size(1) <= MAX_HIDDEN, "bank");
    require(ranges.dim() == 2 && sites >= 1 && ranges.size(0) % sites == 0, "ranges");
    PreparedTables prepared{};
    prepared.mark = PreparedTables::MARK;
    prepared.shape.hidden = bank.size(1);
    prepared.shape.device_type = device_type(bank);
    prepared.shape.device_index = bank.get_device_index();
    prepared.sites = sites;
    prepared.tables = make_tables(prepared.shape, bank, entries, ranges, gate_state);
    prepared.tables.n_slots /= static_cast<int32_t>(sites);
    const int64_t size = sizeof(prepared), stride = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    const Tensor bytes(handle);
    std::memcpy(bytes.data_ptr(), &prepared, sizeof(prepared));
    return bytes;
  }

  static Tensor steer_at(const Tensor& x, const Tensor& rows, const Tensor& prepared, int64_t site) {
    return Call(x, rows, prepared, site).compute("steer_at", RowOp::STEER);
  }

  static std::tuple<Tensor, Tensor> add_steer_rmsnorm_at(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                         double eps, double weight_offset, bool fp32_weight,
                                                         const Tensor& rows, const Tensor& prepared, int64_t site) {
    Call call(x, rows, prepared, site);
    call.add(residual);
    call.norm(weight, eps, weight_offset, fp32_weight);
    Optional normed;
    Tensor hidden = call.compute("add_steer_rmsnorm_at", RowOp::ADD_STEER_RMSNORM, &normed);
    return {*normed, hidden};
  }

  static std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES, const Optional& scalars, int64_t columns) {
    return Call(x, bank, entries, ranges, rows, gate_state).probed("steer", RowOp::STEER, scalars, columns);
  }

  static void steer_(const Tensor& x, FASTSTEER_TABLES, const Optional& probe) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.write("steer_", RowOp::STEER_IN_PLACE, call.arguments.x, probe);
  }

  static std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES,
                                              const Optional& scalars, int64_t columns) {
    Call call(x, bank, entries, ranges, rows, gate_state);
    call.add(residual);
    return call.probed("add_steer", RowOp::ADD_STEER, scalars, columns);
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
    auto [hidden, probe] = call.probed("add_steer_rmsnorm", RowOp::ADD_STEER_RMSNORM, scalars, columns, &normed);
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

    Call(const Tensor& x, FASTSTEER_TABLES) : Call(x) {
      require(shape.dimensions == 2, "x");
      arguments.tables = make_tables(shape, bank, entries, ranges, gate_state);
      set_rows(rows);
    }

    // For exactly as many rows as x has.
    Call(const Tensor& x, const Tensor& rows, const Tensor& prepared, int64_t site) : Call(x) {
      arguments.tables = PreparedTables::at(prepared, site, shape);
      set_rows(rows);
      require(rows.size(1) == shape.rows, "rows");
    }

    explicit Call(const Tensor& x) : x(x), shape(Backend::check(x)), backend(x) {
      arguments.x = {x.data_ptr(), shape.stride};
      arguments.rows = shape.rows;
      arguments.hidden_size = static_cast<int32_t>(shape.hidden);
    }

    void set_rows(const Tensor& rows) {
      check_table(rows, "rows", aoti_torch_dtype_int32(), {N_PLACES, -1}, shape, false);
      require(rows.size(1) >= shape.rows && (rows.size(1) <= 1 || rows.stride(1) == 1), "rows");
      arguments.tables.slots = static_cast<const int32_t*>(rows.data_ptr());
      arguments.tables.positions = arguments.tables.slots + rows.stride(0);
      arguments.tables.sequences = arguments.tables.positions + rows.stride(0);
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

    // Into new tensors of x's shape: `hidden`, and `normed` where there is a norm.
    Tensor compute(const char* name, RowOp op, Optional* normed = nullptr) {
      const Tensor hidden = new_like(x, shape);
      arguments.hidden = {hidden.data_ptr(), shape.hidden};
      if (normed != nullptr) {
        *normed = new_like(x, shape);
        arguments.normed = (*normed)->data_ptr();
      }
      backend.run(name, op, shape, arguments);
      return hidden;
    }

    // The same, and a new probe. `scalars` are for gradients, which Python computes: their numbers are the entries'.
    std::tuple<Tensor, Tensor> probed(const char* name, RowOp op, const Optional& scalars, int64_t columns,
                                      Optional* normed = nullptr) {
      if (scalars.has_value()) {
        check_table(*scalars, "scalars", aoti_torch_dtype_float32(), {arguments.tables.n_entries, N_SCALARS}, shape);
      }
      require(columns >= 0, "columns");
      const Tensor probe = new_rows(x, shape.rows, columns, aoti_torch_dtype_float32());
      set_probe(probe);
      return {compute(name, op, normed), probe};
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

// Inside STABLE_TORCH_LIBRARY_IMPL(faststeer, ..., library).
#define FASTSTEER_REGISTER(library, Backend)                                                \
  library.impl("steer.cpp", TORCH_BOX(&Operators<Backend>::steer));                         \
  library.impl("steer_.cpp", TORCH_BOX(&Operators<Backend>::steer_));                       \
  library.impl("add_steer.cpp", TORCH_BOX(&Operators<Backend>::add_steer));                 \
  library.impl("steer_pair_.cpp", TORCH_BOX(&Operators<Backend>::steer_pair_));             \
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&Operators<Backend>::add_steer_rmsnorm)); \
  library.impl("latch_.cpp", TORCH_BOX(&Operators<Backend>::latch_));                       \
  library.impl("prepare", TORCH_BOX(&Operators<Backend>::prepare));                         \
  library.impl("steer_at", TORCH_BOX(&Operators<Backend>::steer_at));                       \
  library.impl("add_steer_rmsnorm_at", TORCH_BOX(&Operators<Backend>::add_steer_rmsnorm_at));

}  // namespace faststeer
