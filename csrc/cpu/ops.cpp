// The operators on CPU tensors, registered with torch through its stable ABI: check the arguments, choose the routine
// for the dtype and for this machine's instruction set, share the rows among the threads. The schemas are defined in
// Python (faststeer/ops/schema.py); the semantics are docs/kernels.md's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../common/checks.h"
#include "isa.h"
#include "rows.h"

namespace faststeer {
namespace {

// A thread is worth waking for this many elements: waking takes some microseconds, which is what steering them takes.
constexpr int64_t ELEMENTS_PER_THREAD = 32768;

const Routines& routines() {
  static const Routines* const by_level[N_LEVELS] = {
      &routines_baseline,
#if defined(__x86_64__)
      &routines_avx2,
      &routines_avx512,
#endif
  };
  static const Routines& chosen = *by_level[chosen_level()];
  return chosen;
}

template <class Routine>
Routine of_dtype(Routine const (&by_dtype)[N_DTYPES], Dtype dtype) {
  return by_dtype[static_cast<int32_t>(dtype)];
}

// A routine over units of about `work` elements each, shared among the threads where that pays.
template <class Job>
void over_units(void (*routine)(const Job&, int64_t, int64_t), const Job& job, int64_t units, int64_t work) {
  const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD / std::max<int64_t>(1, work));
  if (units <= grain) {
    if (units > 0) routine(job, 0, units);
    return;
  }
  torch::stable::parallel_for(0, units, grain, [&](int64_t first, int64_t end) { routine(job, first, end); });
}

template <class Job>
void over_rows(void (*routine)(const Job&, int64_t, int64_t), const Job& job, int64_t rows) {
  over_units(routine, job, rows, job.hidden);
}

Rows rows_of(const Tensor& tensor, int64_t stride) { return {tensor.data_ptr(), stride}; }

Tensor new_hidden(const Tensor& x, const RowShape& shape) {
  return new_rows(x, shape.rows, shape.hidden, torch_dtype(x));
}

Tensor new_probe(const Tensor& x, const RowShape& shape, int64_t columns, Job& job) {
  if (columns < 0) refuse("columns", "0 or more", columns);
  Tensor probe = new_rows(x, shape.rows, columns, aoti_torch_dtype_float32());
  job.probe = static_cast<float*>(probe.data_ptr());
  job.columns = columns;
  if (shape.rows * columns > 0) std::memset(job.probe, 0, shape.rows * columns * sizeof(float));
  return probe;
}

void write_probe(const std::optional<Tensor>& probe, TableRows rows, const RowShape& shape, Job& job) {
  if (!probe.has_value()) return;
  check_row_table(*probe, "probe", aoti_torch_dtype_float32(), rows, shape, true);
  job.probe = static_cast<float*>(probe->data_ptr());
  job.columns = probe->size(1);
}

void add_residual(const Tensor& residual, const Tensor& x, const RowShape& shape, Job& job) {
  job.residual = rows_of(residual, check_rows_like(residual, "residual", x, shape));
}

#define FASTSTEER_TABLES_PARAMETERS                                                                      \
  const Tensor &bank, const Tensor &fields, const Tensor &scalars, const Tensor &ranges,                 \
      const Tensor &row_slot, const Tensor &row_position, const Tensor &row_sequence,                    \
      const std::optional<Tensor>&gate_state
#define FASTSTEER_TABLES_OF(...) \
  make_tables(shape, bank, fields, scalars, ranges, row_slot, row_position, row_sequence, gate_state, __VA_ARGS__)
#define FASTSTEER_TABLES FASTSTEER_TABLES_OF(TableRows::EXACTLY)

Job make_job(const Tensor& x, const RowShape& shape, const Tables& tables) {
  Job job;
  job.tables = tables;
  job.hidden = shape.hidden;
  job.x = rows_of(x, shape.stride);
  return job;
}

std::tuple<Tensor, Tensor> steer(const Tensor& x, FASTSTEER_TABLES_PARAMETERS, int64_t columns) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES);
  Tensor probe = new_probe(x, shape, columns, job);
  Tensor hidden = new_hidden(x, shape);
  job.out = rows_of(hidden, shape.hidden);
  over_rows(of_dtype(routines().steer, shape.dtype), job, shape.rows);
  return {hidden, probe};
}

void steer_(const Tensor& x, FASTSTEER_TABLES_PARAMETERS, const std::optional<Tensor>& probe) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES);
  write_probe(probe, TableRows::EXACTLY, shape, job);
  job.out = job.x;
  over_rows(of_dtype(routines().steer, shape.dtype), job, shape.rows);
}

std::tuple<Tensor, Tensor> add_steer(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES_PARAMETERS,
                                     int64_t columns) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES);
  add_residual(residual, x, shape, job);
  Tensor probe = new_probe(x, shape, columns, job);
  Tensor hidden = new_hidden(x, shape);
  job.out = rows_of(hidden, shape.hidden);
  over_rows(of_dtype(routines().add_steer, shape.dtype), job, shape.rows);
  return {hidden, probe};
}

void steer_pair_(const Tensor& x, const Tensor& residual, FASTSTEER_TABLES_PARAMETERS,
                 const std::optional<Tensor>& probe) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES_OF(TableRows::AT_LEAST));
  add_residual(residual, x, shape, job);
  write_probe(probe, TableRows::AT_LEAST, shape, job);
  over_rows(of_dtype(routines().steer_pair, shape.dtype), job, shape.rows);
}

std::tuple<Tensor, Tensor, Tensor> add_steer_rmsnorm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                     double eps, double weight_offset, bool fp32_weight,
                                                     FASTSTEER_TABLES_PARAMETERS, int64_t columns) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES);
  add_residual(residual, x, shape, job);
  job.norm.weight_dtype = check_float(weight, "weight");
  check_table(weight, "weight", torch_dtype(weight), {shape.hidden}, shape);
  job.norm.weight = weight.data_ptr();
  job.norm.eps = static_cast<float>(eps);
  job.norm.weight_offset = static_cast<float>(weight_offset);
  job.norm.fp32_weight = fp32_weight;
  Tensor probe = new_probe(x, shape, columns, job);
  Tensor hidden = new_hidden(x, shape), normed = new_hidden(x, shape);
  job.out = rows_of(hidden, shape.hidden);
  job.norm.normed = rows_of(normed, shape.hidden);
  over_rows(of_dtype(routines().add_steer_rmsnorm, shape.dtype), job, shape.rows);
  return {normed, hidden, probe};
}

void latch_(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& bank, const Tensor& fields,
            const Tensor& scalars, const Tensor& ranges, const Tensor& row_slot, const Tensor& row_position,
            const Tensor& row_sequence, const Tensor& gate_state) {
  const RowShape shape = check_rows(x, "x");
  Job job = make_job(x, shape, FASTSTEER_TABLES);
  if (residual.has_value()) add_residual(*residual, x, shape, job);
  job.latched = static_cast<uint8_t*>(gate_state.data_ptr());
  over_rows(of_dtype(routines().latch, shape.dtype), job, shape.rows);
}

// `[rows, columns]` (-1: any number of them) of this dtype, each row contiguous.
void check_matrix(const Tensor& matrix, const char* name, int64_t columns, Dtype dtype) {
  if (matrix.sizes().size() != 2 || (columns >= 0 && matrix.size(1) != columns)) {
    const int64_t expected[] = {-1, columns};
    refuse(name, "of shape " + shape_text(expected), shape_text(matrix.sizes()));
  }
  if (check_float(matrix, name) != dtype) refuse(name, "of x's dtype", dtype_name(torch_dtype(matrix)));
  if (matrix.size(1) > 1 && matrix.stride(1) != 1) refuse(name, "contiguous in its last dimension", matrix.stride(1));
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Dtype dtype = check_float(x, "x");
  check_matrix(x, "x", -1, dtype);
  check_matrix(weight, "weight", x.size(1), dtype);
  LinearJob job;
  job.rows = x.size(0);
  job.inputs = x.size(1);
  job.outputs = weight.size(0);
  job.weight = rows_of(weight, weight.stride(0));
  if (bias.has_value()) {
    const RowShape shape{job.rows, job.inputs, 0, dtype, device_type(x), x.get_device_index()};
    check_table(*bias, "bias", torch_dtype(x), {job.outputs}, shape);
    job.bias = bias->data_ptr();
  }
  const Tensor out = new_rows(x, job.rows, job.outputs, torch_dtype(x));
  if (job.rows == 0) return out;
  job.out = rows_of(out, job.outputs);
  job.x = rows_of(x, x.stride(0));
  std::optional<Tensor> wide;
  if (dtype != Dtype::FP32) {
    wide = new_rows(x, job.rows, job.inputs, aoti_torch_dtype_float32());
    const WidenJob widen{x.data_ptr(), x.stride(0), job.rows, job.inputs, static_cast<float*>(wide->data_ptr())};
    over_units(of_dtype(routines().widen, dtype), widen, job.rows, job.inputs);
    job.x = rows_of(*wide, job.inputs);
  }
  const int64_t panels = (job.outputs + routines().panel - 1) / routines().panel;
  over_units(of_dtype(routines().linear, dtype), job, panels, job.rows * job.inputs);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(faststeer, CPU, library) {
  library.impl("steer.cpp", TORCH_BOX(&steer));
  library.impl("steer_.cpp", TORCH_BOX(&steer_));
  library.impl("add_steer.cpp", TORCH_BOX(&add_steer));
  library.impl("steer_pair_.cpp", TORCH_BOX(&steer_pair_));
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&add_steer_rmsnorm));
  library.impl("latch_.cpp", TORCH_BOX(&latch_));
  library.impl("linear.cpp", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace faststeer
