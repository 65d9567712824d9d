// faststeer._native: what Python wants of the C++ side that is no operator on tensors. The operators are in libraries of
// their own, since those go through torch's stable ABI and pybind11 does not.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "common/tables.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace faststeer {
namespace {

py::dict build_info() {
  std::vector<std::string> compiled, usable;
  for (int i = 0; i < N_LEVELS; ++i) {
    compiled.emplace_back(levels()[i].name);
    if (levels()[i].runs_here) usable.emplace_back(levels()[i].name);
  }
  py::dict info;
  info["compiler"] = FASTSTEER_COMPILER;
  info["flags"] = FASTSTEER_FLAGS;
  info["torch"] = FASTSTEER_TORCH;
  info["cpu_isa_compiled"] = compiled;
  info["cpu_isa_usable"] = usable;
  info["cpu_isa"] = levels()[chosen_level()].name;
  return info;
}

std::pair<int64_t, int64_t> bytes_moved(const std::string& op, int64_t rows, int64_t hidden, int64_t itemsize,
                                        int64_t vectors, int64_t columns, int64_t weight_itemsize) {
  const int64_t tensor = rows * hidden * itemsize;
  const int64_t tables = vectors * hidden * int64_t{sizeof(float)} + rows * 3 * int64_t{sizeof(int32_t)};
  const int64_t probe = rows * columns * int64_t{sizeof(float)};
  if (op == "steer" || op == "steer_") return {tensor + tables, tensor + probe};
  if (op == "add_steer") return {2 * tensor + tables, tensor + probe};
  if (op == "add_steer_rmsnorm") {
    const int64_t weight = hidden * (weight_itemsize > 0 ? weight_itemsize : itemsize);
    return {2 * tensor + weight + tables, 2 * tensor + probe};
  }
  if (op == "latch_") return {tensor + tables, rows};
  throw py::value_error("op is '" + op + "': expected steer, steer_, add_steer, add_steer_rmsnorm or latch_");
}

py::dict launch_config(int64_t rows, int64_t hidden, int32_t itemsize, bool aligned, int32_t sm_count) {
  if (rows < 0 || hidden < 1 || hidden > MAX_HIDDEN || (itemsize != 2 && itemsize != 4) || sm_count < 1) {
    throw py::value_error("expected rows >= 0, hidden 1 to 16384, itemsize 2 or 4, sm_count >= 1");
  }
  const LaunchConfig config = choose_launch(rows, hidden, itemsize, aligned, sm_count);
  py::dict result;
  result["threads_per_row"] = config.threads_per_row;
  result["rows_per_block"] = config.rows_per_block;
  result["elements_per_vector"] = config.elements_per_vector;
  result["vectors_per_thread"] = config.vectors_per_thread;
  return result;
}

template <class T>
using Table = py::array_t<T, py::array::c_style>;

constexpr int PACKED_FIELDS = FIELD_PROBE + 1;
constexpr int PACKED_SCALARS = 3;

void check_shape(const py::array& array, const char* name, py::ssize_t rows, py::ssize_t columns) {
  if (array.ndim() == 2 && (rows < 0 || array.shape(0) == rows) && array.shape(1) == columns) return;
  throw py::value_error(std::string(name) + " must be of shape [" + (rows < 0 ? "any" : std::to_string(rows)) + ", " +
                        std::to_string(columns) + "]");
}

int32_t to_int32(int64_t value) {
  if (value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max()) return value;
  throw py::value_error("entries holds " + std::to_string(value) + ", which is no int32");
}

void pack(const Table<int64_t>& entries, const Table<double>& numbers, int64_t first, Table<int32_t> fields,
          Table<float> scalars, Table<int32_t> ranges) {
  check_shape(entries, "entries", -1, 1 + PACKED_FIELDS);
  const int64_t count = entries.shape(0);
  check_shape(numbers, "numbers", count, PACKED_SCALARS);
  check_shape(fields, "fields", -1, N_FIELDS);
  check_shape(scalars, "scalars", fields.shape(0), N_SCALARS);
  check_shape(ranges, "ranges", -1, 2);
  const int64_t n_sites = ranges.shape(0);
  if (first < 0 || first + count > fields.shape(0)) {
    throw py::value_error("entries " + std::to_string(first) + " to " + std::to_string(first + count) +
                          " do not fit into " + std::to_string(fields.shape(0)));
  }
  const int64_t* entry = entries.data();
  for (int64_t i = 0, last = -1; i < count; ++i) {  // everything is checked before anything is written
    const int64_t site = entry[i * (1 + PACKED_FIELDS)];
    if (site < last || site < 0 || site >= n_sites) {
      throw py::value_error("entries must be in the order of their sites, of which there are " +
                            std::to_string(n_sites));
    }
    last = site;
    for (int f = 0; f < PACKED_FIELDS; ++f) to_int32(entry[i * (1 + PACKED_FIELDS) + 1 + f]);
  }

  int32_t* range = ranges.mutable_data();
  for (int64_t site = 0; site < n_sites; ++site) {
    range[2 * site] = to_int32(first);
    range[2 * site + 1] = 0;
  }
  int32_t* field = fields.mutable_data() + first * N_FIELDS;
  float* scalar = scalars.mutable_data() + first * N_SCALARS;
  const double* number = numbers.data();
  for (int64_t i = 0; i < count; ++i) {
    int32_t* of_site = range + 2 * entry[0];
    if (of_site[1]++ == 0) of_site[0] = static_cast<int32_t>(first + i);
    for (int f = 0; f < N_FIELDS; ++f) field[f] = f < PACKED_FIELDS ? static_cast<int32_t>(entry[1 + f]) : 0;
    for (int s = 0; s < N_SCALARS; ++s) scalar[s] = s < PACKED_SCALARS ? static_cast<float>(number[s]) : 0.0f;
    entry += 1 + PACKED_FIELDS;
    number += PACKED_SCALARS;
    field += N_FIELDS;
    scalar += N_SCALARS;
  }
}

}  // namespace
}  // namespace faststeer

PYBIND11_MODULE(_native, module) {
  using namespace py::literals;
  module.doc() = "What Python wants of faststeer's C++ side that is no operator on tensors.";
  module.def("build_info", &faststeer::build_info,
             "Compiler, flags, the torch whose headers were used, and the CPU instruction set levels: compiled, usable "
             "here, chosen.");
  module.def("bytes_moved", &faststeer::bytes_moved, "op"_a, "rows"_a, "hidden"_a, "itemsize"_a, "vectors"_a = 0,
             "columns"_a = 0, "weight_itemsize"_a = 0,
             "Bytes (read, written) that an op cannot do without, if each byte of memory is touched once: the rows, "
             "`vectors` different bank rows, three row numbers per row, `columns` probe columns, and the norm weight "
             "(of the rows' itemsize if 0). All rows are taken to be steered.");
  module.def("launch_config", &faststeer::launch_config, "rows"_a, "hidden"_a, "itemsize"_a, "aligned"_a = true,
             "sm_count"_a = 132, "The launch configuration that the CUDA row kernels take for this shape.");
  module.def("pack", &faststeer::pack, "entries"_a, "numbers"_a, "first"_a, "fields"_a.noconvert(),
             "scalars"_a.noconvert(), "ranges"_a.noconvert(),
             "Write one slot's entries into its tables, in place.\n\n"
             "entries: int64 [n, 11], in the order of their sites: site, then the ten fields in the order of "
             "faststeer.ops.tables.Field.\nnumbers: float64 [n, 3]: the two scalars and the gate's threshold.\n"
             "first: the slot's first entry.\nfields, scalars: int32 [n_entries, 12] and float32 [n_entries, 4].\n"
             "ranges: int32 [n_sites, 2], the slot's.\n\nRaises ValueError, with nothing written, if they do not fit.");
}
