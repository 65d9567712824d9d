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

  static void check(const Layout&) {}

  void run(const char*, RowOp op, const RowArguments& arguments) const {
    // A pair's probe is the caller's, and zeroed row by row.
    const int64_t probed = arguments.rows * arguments.probe_columns;
    if (op != RowOp::STEER_PAIR && probed > 0) std::memset(arguments.probe, 0, probed * sizeof(float));
    const auto& by_dtype = op == RowOp::LATCH ? routines().latch : routines().steer;
    over_units(of_dtype(by_dtype, arguments.dtype), arguments, arguments.rows, arguments.hidden_size);
  }
};

// `[rows, inputs]`, each row contiguous.
Rows check_matrix(const Layout& matrix, const char* name, int64_t inputs) {
  require(matrix.dimensions == 2 && inputs >= 1 && matrix.sizes[1] == inputs, name);
  require(inputs == 1 || matrix.strides[1] == 1, name);
  return {matrix.data, matrix.strides[0]};
}

// x is in fp32, whatever the weight's dtype, which is the result's.
Tensor linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_) {
  const Layout x = layout_of(x_), weight = layout_of(weight_);
  require(x.dtype == Dtype::FP32 && x.dimensions == 2, "x");
  LinearJob job{};
  job.inputs = x.sizes[1];
  job.x = check_matrix(x, "x", job.inputs);
  job.weight = check_matrix(weight, "weight", job.inputs);
  job.rows = x.sizes[0];
  job.outputs = weight.sizes[0];
  const Dtype dtype = check_float(weight, "weight");
  if (bias_.has_value()) {
    const Layout bias = layout_of(*bias_);
    check_table(bias, "bias", dtype, {job.outputs}, x);
    job.bias = bias.data;
  }
  const Tensor out = new_rows(x, job.rows, job.outputs, torch_dtype(weight_));
  job.out = {out.data_ptr(), job.outputs};
  const int64_t units = job.rows == 0 ? 0 : (job.outputs + routines().unit - 1) / routines().unit;
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
