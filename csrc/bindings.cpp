// faststeer._native: what Python wants of the C++ side besides torch's operators, which are in libraries of their own, since
// those go through torch's stable ABI and pybind11 does not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

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

}  // namespace
}  // namespace faststeer

PYBIND11_MODULE(_native, module) {
  module.doc() = "What Python wants of faststeer's C++ side besides torch's operators.";
  module.def("build_info", &faststeer::build_info,
             "Compiler, flags, the torch whose headers were used, and the CPU instruction set levels: compiled, usable "
             "here, chosen.");
  faststeer::bind_prepared(module);
}
