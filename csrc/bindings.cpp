// faststeer._native: what Python wants of the C++ side besides torch's operators, which are in libraries of their own, since
// those go through torch's stable ABI and pybind11 does not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/launch.h"
#include "cpu/isa.h"
#include "prepared.h"

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
  module.doc() = "What Python wants of faststeer's C++ side besides torch's operators.";
  module.def("build_info", &faststeer::build_info,
             "Compiler, flags, the torch whose headers were used, and the CPU instruction set levels: compiled, usable "
             "here, chosen.");
  module.def("launch_config", &faststeer::launch_config, "rows"_a, "hidden"_a, "itemsize"_a, "aligned"_a = true,
             "sm_count"_a = 132, "The launch configuration that the CUDA row kernels take for this shape.");
  faststeer::bind_prepared(module);
}
