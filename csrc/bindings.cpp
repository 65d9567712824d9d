// faststeer._native: what Python wants of the C++ side that is no operator on tensors. The operators are in libraries of
// their own, since those go through torch's stable ABI and pybind11 does not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/launch.h"
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
  if (op == "steer_pair_") return {2 * tensor + tables, 2 * tensor + probe};
  if (op == "add_steer_rmsnorm") {
    const int64_t weight = hidden * (weight_itemsize > 0 ? weight_itemsize : itemsize);
    return {2 * tensor + weight + tables, 2 * tensor + probe};
  }
  if (op == "latch_") return {tensor + tables, rows};
  throw py::value_error("op is '" + op + "': expected steer, steer_, add_steer, steer_pair_, add_steer_rmsnorm or latch_");
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
}
