// The operators on CPU tensors, registered with torch through its stable ABI: choose the routine for the dtype and for
// this machine's instruction set, share the rows among the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "../common/operators.h"
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

// The operators' back end on CPU tensors.
class Cpu {
 public:
  explicit Cpu(int32_t) {}

  static RowShape check(const Tensor& x) { return check_rows(x, "x"); }

  void run(const char*, RowOp op, const RowShape& shape, const RowArguments& arguments) const {
    // In place, the probe is the caller's: zeroed, or (of a pair) zeroed row by row. latch_ has none.
    const bool makes_probe = op != RowOp::STEER_IN_PLACE && op != RowOp::STEER_PAIR;
    const int64_t probed = shape.rows * arguments.probe_columns;
    if (makes_probe && probed > 0) std::memset(arguments.probe, 0, probed * sizeof(float));
    const auto& by_dtype = routines().rows[static_cast<int32_t>(op)];
    over_units(of_dtype(by_dtype, shape.dtype), arguments, shape.rows, shape.hidden);
  }
};

// `[rows, columns]` (-1: any number of them) of this dtype, each row contiguous.
void check_matrix(const Tensor& matrix, const char* name, int64_t columns, Dtype dtype) {
  require(matrix.sizes().size() == 2 && matrix.size(1) >= 1 && (columns < 0 || matrix.size(1) == columns), name);
  require(check_float(matrix, name) == dtype && (matrix.size(1) <= 1 || matrix.stride(1) == 1), name);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Dtype dtype = check_float(x, "x");
  check_matrix(x, "x", -1, dtype);
  check_matrix(weight, "weight", x.size(1), dtype);
  LinearJob job{};
  job.rows = x.size(0);
  job.inputs = x.size(1);
  job.outputs = weight.size(0);
  job.weight = {weight.data_ptr(), weight.stride(0)};
  if (bias.has_value()) {
    const RowShape shape{job.rows, job.inputs, 0, dtype, device_type(x), x.get_device_index()};
    check_table(*bias, "bias", torch_dtype(x), {job.outputs}, shape);
    job.bias = bias->data_ptr();
  }
  const Tensor out = new_rows(x, job.rows, job.outputs, torch_dtype(x));
  if (job.rows == 0) return out;
  job.out = {out.data_ptr(), job.outputs};
  job.x = {x.data_ptr(), x.stride(0)};
  std::optional<Tensor> wide;
  if (dtype != Dtype::FP32) {
    wide = new_rows(x, job.rows, job.inputs, aoti_torch_dtype_float32());
    const WidenJob widen{job.rows, job.inputs, job.x, {wide->data_ptr(), job.inputs}};
    over_units(of_dtype(routines().widen, dtype), widen, job.rows, job.inputs);
    job.x = widen.to;
  }
  const int64_t units = (job.outputs + routines().unit - 1) / routines().unit;
  over_units(of_dtype(routines().linear, dtype), job, units, job.rows * job.inputs);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(faststeer, CPU, library) {
  FASTSTEER_REGISTER(library, Cpu)
  library.impl("linear.cpp", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace faststeer

FASTSTEER_EXPORT(faststeer::Cpu)
