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

void sparse_add_(const Tensor& x, const Tensor& indices, const Tensor& values, const Tensor& offsets,
                 const Tensor& row_vector, const Tensor& row_coefficient) {
  const RowShape shape = check_rows(x, "x");
  const int32_t int32 = aoti_torch_dtype_int32(), fp32 = aoti_torch_dtype_float32();
  check_table(indices, "indices", int32, {-1}, shape);
  const int64_t n_values = indices.size(0);
  check_table(values, "values", fp32, {n_values}, shape);
  check_table(offsets, "offsets", int32, {-1}, shape);
  if (offsets.size(0) < 1) refuse("offsets", "of shape [vectors + 1]", "[0]");
  check_table(row_vector, "row_vector", int32, {shape.rows}, shape);
  check_table(row_coefficient, "row_coefficient", fp32, {shape.rows}, shape);
  SparseJob job;
  job.hidden = shape.hidden;
  job.n_vectors = offsets.size(0) - 1;
  job.n_values = n_values;
  job.x = rows_of(x, shape.stride);
  job.indices = static_cast<const int32_t*>(indices.data_ptr());
  job.values = static_cast<const float*>(values.data_ptr());
  job.offsets = static_cast<const int32_t*>(offsets.data_ptr());
  job.row_vector = static_cast<const int32_t*>(row_vector.data_ptr());
  job.row_coefficient = static_cast<const float*>(row_coefficient.data_ptr());
  over_rows(of_dtype(routines().sparse_add, shape.dtype), job, shape.rows);
}

// `[rows, heads, size]`, or `[rows, heads, columns, size]` where there are columns; each row of numbers contiguous.
Heads heads_of(const Tensor& tensor, const char* name, bool has_columns, Dtype dtype) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t last = has_columns ? 3 : 2;
  const std::string expected = has_columns ? "[rows, heads, columns, size]" : "[rows, heads, size]";
  if (sizes.size() != last + 1) refuse(name, expected, sizes.size(), " dimensions");
  if (sizes[last] < 1) refuse(name, expected + " of at least one number", shape_text(sizes));
  if (sizes[last] > 1 && strides[last] != 1) refuse(name, "contiguous in its last dimension", shape_text(strides));
  if (check_float(tensor, name) != dtype) refuse(name, "of the query's dtype", dtype_name(torch_dtype(tensor)));
  return {tensor.data_ptr(), strides[0], strides[1], has_columns ? strides[2] : 0};
}

// What both attentions are given, checked; `rows` of the keys' and values' rows are used (the first, of a cache).
AttentionJob attention_job(const Tensor& query, const Tensor& keys, const Tensor& values,
                           const std::optional<Tensor>& mask, double scaling, double softcap, Dtype dtype, bool whole_cache,
                           int64_t tokens = 1) {
  AttentionJob job;
  job.query = heads_of(query, "query", false, dtype);
  job.keys = heads_of(keys, "keys", true, dtype);
  job.values = heads_of(values, "values", true, dtype);
  const int64_t rows = query.size(0), key_heads = keys.size(1), columns = keys.size(2);
  job.heads = query.size(1);
  job.key_size = query.size(2);
  job.value_size = values.size(3);
  if (key_heads < 1 || job.heads % key_heads != 0) {
    refuse("keys", "of a number of heads that divides the query's " + std::to_string(job.heads), key_heads);
  }
  if (tokens < 1 || rows % tokens != 0) refuse("tokens", "a divisor of the " + std::to_string(rows) + " rows", tokens);
  job.tokens = tokens;
  if ((whole_cache ? keys.size(0) < rows / tokens : keys.size(0) != rows) || keys.size(3) != job.key_size) {
    const std::string rows_wanted = whole_cache ? "at least as many rows and as many numbers as" : "as many rows and numbers as";
    refuse("keys", "of " + rows_wanted + " the query, " + shape_text(query.sizes()), shape_text(keys.sizes()));
  }
  if (values.size(0) != keys.size(0) || values.size(1) != key_heads || values.size(2) != columns) {
    refuse("values", "of the keys' rows, heads and columns, " + shape_text(keys.sizes()), shape_text(values.sizes()));
  }
  job.columns = columns;
  if (mask.has_value()) {
    const int64_t expected[] = {rows, columns};
    if (check_float(*mask, "mask") != dtype) refuse("mask", "of the query's dtype", dtype_name(torch_dtype(*mask)));
    const auto sizes = mask->sizes();
    if (sizes.size() != 2 || sizes[0] != rows || (whole_cache ? sizes[1] > columns : sizes[1] != columns)) {
      refuse("mask", (whole_cache ? "of at most shape " : "of shape ") + shape_text(expected), shape_text(sizes));
    }
    job.columns = sizes[1];
    if (job.columns > 1 && mask->stride(1) != 1) refuse("mask", "contiguous in its last dimension", mask->stride(1));
    job.mask = mask->data_ptr();
    job.mask_stride = mask->stride(0);
  }
  job.group = job.heads / key_heads;
  job.scaling = static_cast<float>(scaling);
  job.softcap = static_cast<float>(softcap);
  return job;
}

Tensor attend(const Tensor& query, AttentionJob& job, Dtype dtype) {
  const int64_t rows = query.size(0);
  const int64_t sizes[] = {rows, job.heads, job.value_size}, strides[] = {job.heads * job.value_size, job.value_size, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(3, sizes, strides, torch_dtype(query), aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor out(handle);
  job.out = out.data_ptr();
  const int64_t units = rows * (job.heads / job.group);
  if (job.tokens > 1) over_units(of_dtype(routines().keep_new, dtype), job, units, job.key_size + job.value_size);
  over_units(of_dtype(routines().decode_attention, dtype), job, units, job.columns * (job.key_size + job.value_size));
  return out;
}

Tensor decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& mask,
                        double scaling, double softcap) {
  const Dtype dtype = check_float(query, "query");
  AttentionJob job = attention_job(query, keys, values, mask, scaling, softcap, dtype, false);
  return attend(query, job, dtype);
}

// A row's own key or value: `[rows, key heads, size]`.
Heads new_heads(const Tensor& tensor, const char* name, int64_t rows, const Tensor& cache, Dtype dtype) {
  const Heads heads = heads_of(tensor, name, false, dtype);
  const int64_t expected[] = {rows, cache.size(1), cache.size(3)};
  if (!std::equal(expected, expected + 3, tensor.sizes().begin())) {
    refuse(name, "of shape " + shape_text(expected), shape_text(tensor.sizes()));
  }
  return heads;
}

Rows angles(const Tensor& tensor, const char* name, int64_t rows, int64_t rotary, Dtype dtype) {
  const auto sizes = tensor.sizes();
  const int64_t expected[] = {rows, rotary};
  if (sizes.size() != 2 || sizes[0] != rows || sizes[1] != rotary) {
    refuse(name, "of shape " + shape_text(expected), shape_text(sizes));
  }
  if (check_float(tensor, name) != dtype) refuse(name, "of the query's dtype", dtype_name(torch_dtype(tensor)));
  if (rotary > 1 && tensor.stride(1) != 1) refuse(name, "contiguous in its last dimension", tensor.stride(1));
  return rows_of(tensor, tensor.stride(0));
}

Tensor rotary_attention_(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
                         const Tensor& values, const Tensor& cosine, const Tensor& sine, const Tensor& column,
                         const std::optional<Tensor>& mask, int64_t tokens, int64_t window, double scaling,
                         double softcap) {
  const Dtype dtype = check_float(query, "query");
  AttentionJob job = attention_job(query, keys, values, mask, scaling, softcap, dtype, true, tokens);
  if (window < 0) refuse("window", "0 (none) or more", window);
  job.window = window;
  const int64_t rows = query.size(0);
  job.key = new_heads(key, "key", rows, keys, dtype);
  job.value = new_heads(value, "value", rows, values, dtype);
  job.rotary = cosine.sizes().size() == 2 ? cosine.size(1) : 0;
  if (job.rotary % 2 != 0 || job.rotary > job.key_size) {
    refuse("cosine", "of an even number of columns, at most " + std::to_string(job.key_size), job.rotary);
  }
  job.cosine = angles(cosine, "cosine", rows, job.rotary, dtype);
  job.sine = angles(sine, "sine", rows, job.rotary, dtype);
  const RowShape shape{rows, job.key_size, 0, dtype, device_type(query), query.get_device_index()};
  check_table(column, "column", aoti_torch_dtype_int64(), {rows}, shape);
  job.column = static_cast<const int64_t*>(column.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    if (job.column[row] < 0 || job.column[row] >= keys.size(2)) {
      refuse("column", "of columns of the keys, 0 to " + std::to_string(keys.size(2) - 1), job.column[row]);
    }
  }
  return attend(query, job, dtype);
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

// x in fp32 for any number of products: x itself, or a copy that this keeps.
class Multiplied {
 public:
  explicit Multiplied(const Tensor& x) : x_(x), dtype_(check_float(x, "x")) {
    check_matrix(x, "x", -1, dtype_);
    rows_ = rows_of(x, x.stride(0));
    if (dtype_ == Dtype::FP32 || n_rows() == 0) return;
    wide_ = new_rows(x, n_rows(), inputs(), aoti_torch_dtype_float32());
    const WidenJob job{x.data_ptr(), x.stride(0), n_rows(), inputs(), static_cast<float*>(wide_->data_ptr())};
    over_units(of_dtype(routines().widen, dtype_), job, n_rows(), inputs());
    rows_ = rows_of(*wide_, inputs());
  }

  int64_t n_rows() const { return x_.size(0); }
  int64_t inputs() const { return x_.size(1); }

  // `[rows, columns]` of x's dtype
  Tensor new_output(int64_t columns) const { return new_rows(x_, n_rows(), columns, torch_dtype(x_)); }

  // x weight^T + bias into the columns of `out` from `first` on; with `up`, act(x weight^T) * (x up^T).
  void by(const Tensor& weight, const char* name, const std::optional<Tensor>& bias, const Tensor& out, int64_t first,
          const Tensor* up = nullptr, int32_t activation = SILU) const {
    check_matrix(weight, name, inputs(), dtype_);
    LinearJob job;
    job.rows = n_rows();
    job.inputs = inputs();
    job.outputs = weight.size(0);
    job.x = rows_;
    job.weight = rows_of(weight, weight.stride(0));
    if (up != nullptr) {
      check_matrix(*up, "up", inputs(), dtype_);
      if (up->size(0) != job.outputs) refuse("up", "of the weight's shape", shape_text(up->sizes()));
      job.up = rows_of(*up, up->stride(0));
    }
    if (bias.has_value()) {
      const RowShape shape{n_rows(), inputs(), 0, dtype_, device_type(x_), x_.get_device_index()};
      check_table(*bias, "bias", torch_dtype(x_), {job.outputs}, shape);
      job.bias = bias->data_ptr();
    }
    job.activation = activation;
    if (job.rows == 0) return;
    const int64_t size = dtype_ == Dtype::FP32 ? 4 : 2;
    job.out = {static_cast<char*>(out.data_ptr()) + first * size, out.stride(0)};
    const int64_t of_panel = up == nullptr ? routines().panel : routines().panel / 2;
    const int64_t panels = (job.outputs + of_panel - 1) / of_panel;
    over_units(of_dtype(routines().linear, dtype_), job, panels, job.rows * job.inputs);
  }

 private:
  const Tensor& x_;
  Dtype dtype_;
  std::optional<Tensor> wide_;
  Rows rows_;
};

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Multiplied multiplied(x);
  check_matrix(weight, "weight", x.size(1), check_float(x, "x"));
  const Tensor out = multiplied.new_output(weight.size(0));
  multiplied.by(weight, "weight", bias, out, 0);
  return out;
}

Tensor gated_linear(const Tensor& x, const Tensor& weight, const Tensor& up, int64_t activation) {
  if (activation < SILU || activation > GELU_TANH) refuse("activation", "0 (SiLU) or 1 (GELU by tanh)", activation);
  const Multiplied multiplied(x);
  check_matrix(weight, "weight", x.size(1), check_float(x, "x"));
  const Tensor out = multiplied.new_output(weight.size(0));
  multiplied.by(weight, "weight", std::nullopt, out, 0, &up, static_cast<int32_t>(activation));
  return out;
}

Tensor gated_mlp(const Tensor& x, const Tensor& weight, const Tensor& up, const Tensor& down,
                 const std::optional<Tensor>& bias, int64_t activation) {
  return linear(gated_linear(x, weight, up, activation), down, bias);
}

Tensor attention_branch_(const Tensor& x, const Tensor& query, const Tensor& key, const Tensor& value,
                         const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias,
                         const std::optional<Tensor>& value_bias, const Tensor& output,
                         const std::optional<Tensor>& output_bias, const Tensor& keys, const Tensor& values,
                         const Tensor& cosine, const Tensor& sine, const Tensor& column, int64_t tokens,
                         int64_t window, double scaling, double softcap) {
  const Multiplied multiplied(x);
  const Dtype dtype = check_float(x, "x");
  check_matrix(query, "query", x.size(1), dtype);
  check_matrix(key, "key", x.size(1), dtype);
  check_matrix(value, "value", x.size(1), dtype);
  const int64_t queries = query.size(0), n_keys = key.size(0), n_values = value.size(0);
  const Tensor read = multiplied.new_output(queries + n_keys + n_values);
  multiplied.by(query, "query", query_bias, read, 0);
  multiplied.by(key, "key", key_bias, read, queries);
  multiplied.by(value, "value", value_bias, read, queries + n_keys);
  const int64_t rows = x.size(0);
  if (keys.sizes().size() != 4 || values.sizes().size() != 4 || keys.size(3) < 1 || queries % keys.size(3) != 0) {
    refuse("keys", "[rows, heads, columns, size], of a size that divides the queries'", shape_text(keys.sizes()));
  }
  const int64_t stride = read.stride(0), size = keys.size(3);
  const auto heads = [&](int64_t first, int64_t count, int64_t of) {
    const int64_t sizes[] = {rows, count, of}, strides[] = {stride, of, 1};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(read.get(), 3, sizes, strides, first, &handle));
    return Tensor(handle);
  };
  if (n_keys != keys.size(1) * size || n_values != values.size(1) * values.size(3)) {
    refuse("keys", "of the key's and value's heads and sizes", shape_text(keys.sizes()));
  }
  const Tensor attended = rotary_attention_(heads(0, queries / size, size), heads(queries, keys.size(1), size),
                                            heads(queries + n_keys, values.size(1), values.size(3)), keys, values,
                                            cosine, sine, column, std::nullopt, tokens, window, scaling, softcap);
  const int64_t sizes[] = {rows, attended.size(1) * attended.size(2)}, strides[] = {sizes[1], 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(attended.get(), 2, sizes, strides, 0, &handle));
  return linear(Tensor(handle), output, output_bias);
}

STABLE_TORCH_LIBRARY_IMPL(faststeer, CPU, library) {
  library.impl("steer.cpp", TORCH_BOX(&steer));
  library.impl("steer_.cpp", TORCH_BOX(&steer_));
  library.impl("add_steer.cpp", TORCH_BOX(&add_steer));
  library.impl("steer_pair_.cpp", TORCH_BOX(&steer_pair_));
  library.impl("add_steer_rmsnorm.cpp", TORCH_BOX(&add_steer_rmsnorm));
  library.impl("latch_.cpp", TORCH_BOX(&latch_));
  library.impl("sparse_add_.cpp", TORCH_BOX(&sparse_add_));
  library.impl("decode_attention.cpp", TORCH_BOX(&decode_attention));
  library.impl("rotary_attention_.cpp", TORCH_BOX(&rotary_attention_));
  library.impl("linear.cpp", TORCH_BOX(&linear));
  library.impl("gated_linear.cpp", TORCH_BOX(&gated_linear));
  library.impl("gated_mlp.cpp", TORCH_BOX(&gated_mlp));
  library.impl("attention_branch_.cpp", TORCH_BOX(&attention_branch_));
}

}  // namespace
}  // namespace faststeer
