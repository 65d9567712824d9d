// A program's tables and where the rows of a pass stand, checked once, for calls at each site of the pass that do not go
// through torch's dispatcher: what such a call costs the host grows with its arguments and with the code it touches.
// Tensors are read through the C functions that torch publishes for DLPack, so that one build serves every later torch.
// For inference: there is no gradient, and no mode of torch sees the call.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/arguments.h"
#include "common/launch.h"

namespace py = pybind11;

namespace faststeer {

// What does not fit: the full operator takes it, or says what is wrong.
struct Unfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Prepared {
 public:
  // `run` is the address of a library's `Run`. gate_state may be None; the other tables are those of docs/kernels.md, and
  // `ranges`, `[sites, slots, 2]`, has those of all sites. `plain` is a bool per site: nothing is probed or latched there.
  Prepared(uintptr_t run, py::object bank, py::object entries, py::object ranges, py::object rows,
           py::object gate_state, py::handle plain)
      : run_(reinterpret_cast<Run>(run)),
        tensors_(py::make_tuple(bank, entries, ranges, rows, gate_state)),
        torch_(torch()) {
    const DLTensor vectors = view(bank, "bank");
    device_ = vectors.device;
    hidden_ = vectors.ndim == 2 ? vectors.shape[1] : 0;
    require(hidden_ >= 1 && hidden_ <= MAX_HIDDEN, "bank");
    Tables& tables = arguments_.tables;
    int32_t count[2];
    tables.bank = table<float>(bank, "bank", {kDLFloat, 32, 1}, {-1, hidden_}, count);
    tables.n_vectors = count[0];
    tables.entries = table<Entry>(entries, "entries", INT32, {-1, N_FIELDS}, count);
    tables.n_entries = count[0];
    require(reinterpret_cast<uintptr_t>(tables.entries) % alignof(Entry) == 0, "entries");
    tables.ranges = table<int32_t>(ranges, "ranges", INT32, {-1, -1, 2}, count);
    sites_ = count[0];
    tables.n_slots = count[1];
    for (const py::handle each : plain) plain_.push_back(PyObject_IsTrue(each.ptr()) == 1);
    require(static_cast<int64_t>(plain_.size()) == sites_, "plain");
    if (!gate_state.is_none()) {
      tables.gate_state = table<uint8_t>(gate_state, "gate_state", {kDLBool, 8, 1}, {-1, -1}, count);
      tables.n_gates = count[0];
      tables.n_sequences = count[1];
    }
    const DLTensor places = view(rows, "rows");
    fits(places, "rows", INT32, {N_PLACES, -1});
    rows_ = places.shape[1];
    require(rows_ <= INT32_MAX - MAX_HIDDEN && (rows_ <= 1 || places.strides[1] == 1), "rows");
    tables.slots = data<int32_t>(places);
    tables.positions = tables.slots + places.strides[0];
    tables.sequences = tables.positions + places.strides[0];
    arguments_.rows = rows_;
    arguments_.hidden_size = static_cast<int32_t>(hidden_);
  }

  // Whether the calls below do what is to be done at a site, which must be one: in the thread that made this.
  bool serves(int64_t site) const {
    require(site >= 0 && site < sites_, "site");
    return plain_[site] && std::this_thread::get_id() == thread_ &&
           py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch_.grad.ptr())).is(py::bool_(false));
  }

  // `steer` at a site, of x: contiguous, `[..., hidden]`, of exactly as many rows.
  py::object steer(py::handle x, int64_t site) const {
    RowArguments arguments = at(site);
    const RowShape shape = shape_of(x, arguments.x, "x");
    py::object hidden = like(x, arguments.hidden.data);
    run(RowOp::STEER, shape, arguments);
    return hidden;
  }

  // `add_steer_rmsnorm` at a site: (normed, hidden).
  py::tuple add_steer_rmsnorm(py::handle x, py::handle residual, py::handle weight, float eps, float weight_offset,
                              bool fp32_weight, int64_t site) const {
    RowArguments arguments = at(site);
    const RowShape shape = shape_of(x, arguments.x, "x");
    require(shape_of(residual, arguments.residual, "residual").dtype == shape.dtype, "residual");
    const DLTensor scale = view(weight, "weight", true);
    require(scale.ndim == 1 && scale.shape[0] == hidden_ && scale.data != nullptr, "weight");
    require(contiguous(scale) && on_device(scale), "weight");
    arguments.weight = data<void>(scale);
    arguments.weight_dtype = dtype_of(scale, "weight");
    arguments.eps = eps;
    arguments.weight_offset = weight_offset;
    arguments.fp32_weight = fp32_weight;
    py::object normed = like(x, arguments.normed), hidden = like(x, arguments.hidden.data);
    run(RowOp::ADD_STEER_RMSNORM, shape, arguments);
    return py::make_tuple(normed, hidden);
  }

 private:
  // What is wanted of torch, looked up once.
  struct Torch {
    py::object tensor, parameter, empty_like, grad;
    const DLPackExchangeAPI* api;
  };
  static constexpr DLDataType INT32{kDLInt, 32, 1};
  // Rows of fewer elements are steered in less time than it takes to let other threads of Python run.
  static constexpr int64_t MANY_ELEMENTS = 32768;

  static void require(bool holds, const char* name) {
    if (!holds) throw Unfit(std::string(name) + " does not fit these operators");
  }

  static const Torch& torch() {
    static const Torch* const names = [] {  // never destroyed: Python may have ended before
      const py::module_ module = py::module_::import("torch");
      py::object tensor = module.attr("Tensor");
      const auto api = tensor.attr("__dlpack_c_exchange_api__").cast<py::capsule>();
      const auto* const table = api.get_pointer<const DLPackExchangeAPI>();
      require(table->header.version.major == DLPACK_MAJOR_VERSION, "torch's DLPack");
      return new Torch{tensor, module.attr("nn").attr("Parameter"), module.attr("empty_like"),
                       module.attr("is_grad_enabled"), table};
    }();
    return *names;
  }

  // A tensor as DLPack has it. A subclass may be none: nothing says what its memory means.
  DLTensor view(py::handle tensor, const char* name, bool or_parameter = false) const {
    const py::handle type = py::type::handle_of(tensor);
    require(type.is(torch_.tensor) || (or_parameter && type.is(torch_.parameter)), name);
    DLTensor layout;
    if (torch_.api->dltensor_from_py_object_no_sync(tensor.ptr(), &layout) != 0) {
      PyErr_Clear();
      require(false, name);
    }
    return layout;
  }

  template <class T>
  static T* data(const DLTensor& tensor) {
    return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset);
  }

  static bool contiguous(const DLTensor& tensor) {
    int64_t stride = 1;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
      stride *= tensor.shape[i];
    }
    return true;
  }

  bool on_device(const DLTensor& tensor) const {
    return tensor.device.device_type == device_.device_type && tensor.device.device_id == device_.device_id;
  }

  void fits(const DLTensor& tensor, const char* name, DLDataType dtype, std::initializer_list<int64_t> sizes) const {
    require(tensor.dtype.code == dtype.code && tensor.dtype.bits == dtype.bits && on_device(tensor), name);
    require(tensor.ndim == static_cast<int32_t>(sizes.size()), name);
    for (int32_t i = 0; i < tensor.ndim; ++i) {
      require(tensor.shape[i] <= INT32_MAX && (sizes.begin()[i] < 0 || tensor.shape[i] == sizes.begin()[i]), name);
    }
  }

  // A contiguous table's memory; `count` becomes its first two sizes.
  template <class T>
  T* table(py::handle tensor, const char* name, DLDataType dtype, std::initializer_list<int64_t> sizes,
           int32_t (&count)[2]) const {
    const DLTensor layout = view(tensor, name);
    fits(layout, name, dtype, sizes);
    require(contiguous(layout), name);
    for (int i = 0; i < 2; ++i) count[i] = static_cast<int32_t>(layout.shape[i]);
    return data<T>(layout);
  }

  static Dtype dtype_of(const DLTensor& tensor, const char* name) {
    const DLDataType dtype = tensor.dtype;
    if (dtype.code == kDLFloat && dtype.bits == 32) return Dtype::FP32;
    if (dtype.code == kDLFloat && dtype.bits == 16) return Dtype::FP16;
    require(dtype.code == kDLBfloat, name);
    return Dtype::BF16;
  }

  RowArguments at(int64_t site) const {
    RowArguments arguments = arguments_;
    arguments.hidden.stride = hidden_;
    arguments.tables.ranges += 2 * arguments.tables.n_slots * site;
    return arguments;
  }

  RowShape shape_of(py::handle x, Rows& rows, const char* name) const {
    const DLTensor layout = view(x, name);
    int64_t elements = 1;
    for (int32_t i = 0; i < layout.ndim; ++i) elements *= layout.shape[i];
    require(layout.ndim >= 1 && layout.shape[layout.ndim - 1] == hidden_ && elements == rows_ * hidden_, name);
    require(contiguous(layout) && on_device(layout), name);
    require(layout.data != nullptr || elements == 0, name);  // a tensor that stands for others has no memory
    rows = {data<void>(layout), hidden_};
    const int32_t type = layout.device.device_type == kDLCPU ? 0 : 1;
    return {rows_, hidden_, hidden_, dtype_of(layout, name), type, layout.device.device_id};
  }

  py::object like(py::handle x, void*& memory) const {
    py::object result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_.empty_like.ptr(), x.ptr()));
    if (!result) throw py::error_already_set();
    memory = data<void>(view(result, "x"));
    return result;
  }

  void run(RowOp op, const RowShape& shape, const RowArguments& arguments) const {
    const char* wrong;
    if (device_.device_type == kDLCPU && shape.rows * shape.hidden < MANY_ELEMENTS) {
      wrong = run_(sizeof(arguments), op, shape, arguments);
    } else {
      const py::gil_scoped_release released;
      wrong = run_(sizeof(arguments), op, shape, arguments);
    }
    if (wrong != nullptr) throw std::runtime_error(wrong);
  }

  Run run_;
  std::vector<bool> plain_;
  std::thread::id thread_ = std::this_thread::get_id();
  int64_t sites_ = 0, rows_ = 0, hidden_ = 0;
  py::tuple tensors_;  // while their memory is pointed to
  const Torch& torch_;
  DLDevice device_{};
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
  type.def(py::init<uintptr_t, py::object, py::object, py::object, py::object, py::object, py::handle>());
  static PyMethodDef methods[] = {
      {"steer", reinterpret_cast<PyCFunction>(&steer), METH_FASTCALL, nullptr},
      {"add_steer_rmsnorm", reinterpret_cast<PyCFunction>(&add_steer_rmsnorm), METH_FASTCALL, nullptr}};
  for (PyMethodDef& method : methods) {
    PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method);
    type.attr(method.ml_name) = py::reinterpret_steal<py::object>(descriptor);
  }
}

}  // namespace faststeer
