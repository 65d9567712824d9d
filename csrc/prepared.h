// A program's tables and where the rows of a pass stand, checked once, for calls at each site of the pass that do not go
// through torch's dispatcher: what such a call costs the host grows with its arguments and with the code it touches.
// Tensors are read through the C functions that torch publishes for DLPack, so that one build serves every later torch.
// For inference: there is no gradient, and no mode of torch sees the call.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/arguments.h"
#include "common/checks.h"

namespace py = pybind11;

namespace faststeer {

class Prepared {
 public:
  // Addresses: `run` of a library's `Run`, `derives` of torch's function that says whether gradients are on. gate_state
  // may be None; the other tables are those of docs/kernels.md, and `ranges`, `[sites, slots, 2]`, has those of all
  // sites. `plain` is a bool per site: nothing is probed or latched there.
  Prepared(uintptr_t run, uintptr_t derives, py::object bank, py::object entries, py::object ranges, py::object rows,
           py::object gate_state, py::handle plain)
      : run_(reinterpret_cast<Run>(run)),
        derives_(reinterpret_cast<bool (*)()>(derives)),
        tensors_(py::make_tuple(bank, entries, ranges, rows, gate_state)),
        torch_(torch()) {
    bank_ = view(bank, "bank");
    require(bank_.dimensions == 2 && bank_.sizes[1] >= 1 && bank_.sizes[1] <= MAX_HIDDEN, "bank");
    hidden_ = bank_.sizes[1];
    Layout site = view(ranges, "ranges");
    check_table(site, "ranges", Dtype::INT32, {-1, -1, 2}, bank_);
    sites_ = *site.sizes++;
    ++site.strides;
    --site.dimensions;
    const Layout places = view(rows, "rows"), gates = gate_state.is_none() ? Layout{} : view(gate_state, "gate_state");
    rows_ = places.dimensions == 2 ? places.sizes[1] : 0;
    require(rows_ <= INT32_MAX - MAX_HIDDEN, "rows");
    arguments_.tables = make_tables(bank_, rows_, hidden_, bank_, view(entries, "entries"), site, places,
                                    gate_state.is_none() ? nullptr : &gates);
    for (const py::handle each : plain) plain_.push_back(PyObject_IsTrue(each.ptr()) == 1);
    require(static_cast<int64_t>(plain_.size()) == sites_, "plain");
    arguments_.rows = rows_;
    arguments_.hidden_size = static_cast<int32_t>(hidden_);
    arguments_.hidden.stride = hidden_;
  }

  // Whether the calls below do what is to be done at a site, which must be one: in the thread that made this.
  bool serves(int64_t site) const {
    require(site >= 0 && site < sites_, "site");
    return plain_[site] && std::this_thread::get_id() == thread_ && !derives_();
  }

  // `steer` at a site, of x: contiguous, `[..., hidden]`, of exactly as many rows.
  py::object steer(py::handle x, int64_t site) const {
    RowArguments arguments = at(site, x);
    py::object hidden = like(x, arguments.hidden.data);
    run(RowOp::STEER, arguments);
    return hidden;
  }

  // `add_steer_rmsnorm` at a site: (normed, hidden).
  py::tuple add_steer_rmsnorm(py::handle x, py::handle residual, py::handle weight, float eps, float weight_offset,
                              bool fp32_weight, int64_t site) const {
    RowArguments arguments = at(site, x);
    require(check_shape(residual, arguments.residual, "residual") == arguments.dtype, "residual");
    const Layout scale = view(weight, "weight", true);
    require(scale.data != nullptr, "weight");
    set_norm(arguments, scale, hidden_, bank_, eps, weight_offset, fp32_weight);
    py::object normed = like(x, arguments.normed), hidden = like(x, arguments.hidden.data);
    run(RowOp::ADD_STEER_RMSNORM, arguments);
    return py::make_tuple(normed, hidden);
  }

 private:
  // What is wanted of torch, looked up once.
  struct Torch {
    py::object tensor, parameter, empty_like;
    const DLPackExchangeAPI* api;
  };
  // Rows of fewer elements are steered in less time than it takes to let other threads of Python run.
  static constexpr int64_t MANY_ELEMENTS = 32768;

  static const Torch& torch() {
    static const Torch* const names = [] {  // never destroyed: Python may have ended before
      const py::module_ module = py::module_::import("torch");
      py::object tensor = module.attr("Tensor");
      const auto api = tensor.attr("__dlpack_c_exchange_api__").cast<py::capsule>();
      const auto* const table = api.get_pointer<const DLPackExchangeAPI>();
      require(table->header.version.major == DLPACK_MAJOR_VERSION, "torch's DLPack");
      return new Torch{tensor, module.attr("nn").attr("Parameter"), module.attr("empty_like"), table};
    }();
    return *names;
  }

  // A tensor as DLPack has it. A subclass may be none: nothing says what its memory means.
  Layout view(py::handle tensor, const char* name, bool or_parameter = false) const {
    const py::handle type = py::type::handle_of(tensor);
    require(type.is(torch_.tensor) || (or_parameter && type.is(torch_.parameter)), name);
    DLTensor layout;
    if (torch_.api->dltensor_from_py_object_no_sync(tensor.ptr(), &layout) != 0) {
      PyErr_Clear();
      require(false, name);
    }
    void* const data = static_cast<char*>(layout.data) + layout.byte_offset;
    const DLDevice device = layout.device;
    return {
        data, layout.ndim, layout.shape, layout.strides, dtype_of(layout.dtype), device.device_type, device.device_id};
  }

  static Dtype dtype_of(DLDataType dtype) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return Dtype::FP32;
    if (dtype.code == kDLFloat && dtype.bits == 16) return Dtype::FP16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return Dtype::BF16;
    if (dtype.code == kDLInt && dtype.bits == 32) return Dtype::INT32;
    return dtype.code == kDLBool ? Dtype::BOOL : Dtype::OTHER;
  }

  // The arguments of a call on x at a site.
  RowArguments at(int64_t site, py::handle x) const {
    RowArguments arguments = arguments_;
    arguments.tables.ranges += 2 * arguments.tables.n_slots * site;
    arguments.dtype = check_shape(x, arguments.x, "x");
    return arguments;
  }

  Dtype check_shape(py::handle x, Rows& rows, const char* name) const {
    const Layout layout = view(x, name);
    int64_t elements = 1;
    for (int32_t i = 0; i < layout.dimensions; ++i) elements *= layout.sizes[i];
    require(layout.dimensions >= 1 && layout.sizes[layout.dimensions - 1] == hidden_, name);
    require(elements == rows_ * hidden_ && layout.is_contiguous() && layout.is_with(bank_), name);
    require(layout.data != nullptr || elements == 0, name);  // a tensor that stands for others has no memory
    rows = {layout.data, hidden_};
    return check_float(layout, name);
  }

  py::object like(py::handle x, void*& memory) const {
    py::object result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_.empty_like.ptr(), x.ptr()));
    if (!result) throw py::error_already_set();
    memory = view(result, "x").data;
    return result;
  }

  void run(RowOp op, const RowArguments& arguments) const {
    const char* wrong;
    if (bank_.device_type == kDLCPU && rows_ * hidden_ < MANY_ELEMENTS) {
      wrong = run_(sizeof(arguments), op, bank_.device_index, arguments);
    } else {
      const py::gil_scoped_release released;
      wrong = run_(sizeof(arguments), op, bank_.device_index, arguments);
    }
    if (wrong != nullptr) throw std::runtime_error(wrong);
  }

  Run run_;
  bool (*derives_)();
  std::vector<bool> plain_;
  std::thread::id thread_ = std::this_thread::get_id();
  int64_t sites_ = 0, rows_ = 0, hidden_ = 0;
  py::tuple tensors_;  // while their memory is pointed to
  const Torch& torch_;
  Layout bank_{};             // what a call's tensors must be beside
  RowArguments arguments_{};  // of site 0, without x
};

// Its methods by CPython's own way of calling: pybind11's looks types up, which would cost as much as the rest. A method
// gives None where it does not serve the site that its last argument names.
template <class Function>
PyObject* at_site(PyObject* self, PyObject* const* args, Py_ssize_t count, Py_ssize_t expected,
                  const Function& function) {
  try {
    if (count != expected) throw py::type_error("expected " + std::to_string(expected) + " arguments");
    const int64_t site = PyLong_AsLongLong(args[count - 1]);
    if (PyErr_Occurred()) throw py::error_already_set();
    const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    const auto& prepared = *static_cast<const Prepared*>(holder.value_ptr());
    return (prepared.serves(site) ? function(prepared, site) : py::none()).release().ptr();
  } catch (const Unfit&) {
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline PyObject* steer(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return at_site(self, args, count, 2,
                 [&](const Prepared& prepared, int64_t site) { return prepared.steer(args[0], site); });
}

inline PyObject* add_steer_rmsnorm(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return at_site(self, args, count, 7, [&](const Prepared& prepared, int64_t site) -> py::object {
    const float eps = PyFloat_AsDouble(args[3]), weight_offset = PyFloat_AsDouble(args[4]);
    const bool fp32_weight = PyObject_IsTrue(args[5]) == 1;
    if (PyErr_Occurred()) throw py::error_already_set();
    return prepared.add_steer_rmsnorm(args[0], args[1], args[2], eps, weight_offset, fp32_weight, site);
  });
}

inline void bind_prepared(py::module_& module) {
  py::class_<Prepared> type(module, "Prepared", "See faststeer.ops.prepare.");
  type.def(py::init<uintptr_t, uintptr_t, py::object, py::object, py::object, py::object, py::object, py::handle>());
  static PyMethodDef methods[] = {
      {"steer", reinterpret_cast<PyCFunction>(&steer), METH_FASTCALL, nullptr},
      {"add_steer_rmsnorm", reinterpret_cast<PyCFunction>(&add_steer_rmsnorm), METH_FASTCALL, nullptr}};
  for (PyMethodDef& method : methods) {
    PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method);
    type.attr(method.ml_name) = py::reinterpret_steal<py::object>(descriptor);
  }
}

}  // namespace faststeer
