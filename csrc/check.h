// Compares each function that a critic calls with the recorded ones, before it runs: C++ twin of the class Check of
// gpkernels/critic/together.py.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

namespace py = pybind11;

// Recorded calls, each with its values and, where these may scale with the batch, its sizes.
class Log {
 public:
  Log(const py::list& expected, py::object differs) : differs_(std::move(differs)) {
    for (const py::handle& item : expected) {
      const py::tuple both = item.cast<py::tuple>();
      const py::tuple call = both[0];
      Call made{call[0], {}, !call[2].is_none(), {}, both[1].is_none() ? -1 : both[1].cast<int64_t>()};
      for (const py::handle& value : call[1].cast<py::tuple>())
        made.values.push_back(py::reinterpret_borrow<py::object>(value));
      if (made.has_sizes)
        for (const py::handle& size : call[2].cast<py::tuple>()) made.sizes.push_back(size.cast<int64_t>());
      calls_.push_back(std::move(made));
    }
  }

  struct Call {
    py::object function;
    std::vector<py::object> values;
    bool has_sizes;
    std::vector<int64_t> sizes;
    int64_t place;  // index of the batch size among the sizes; -1: unknown
  };

  const std::vector<Call>& calls() const { return calls_; }
  [[noreturn]] void differ() const {
    PyErr_SetNone(differs_.ptr());
    throw py::error_already_set();
  }

 private:
  std::vector<Call> calls_;
  py::object differs_;
};

// A torch function mode. then, now: rows of the batch.
class Check {
 public:
  Check(std::shared_ptr<const Log> log, int64_t then, int64_t now) : log_(std::move(log)), then_(then), now_(now) {}

  py::object torch_function(const py::object& func, const py::object&, const py::tuple& args,
                            const py::object& kwargs) {
    const bool named = !kwargs.is_none() && PyDict_GET_SIZE(kwargs.ptr());
    if (at_ >= log_->calls().size() || !same(log_->calls()[at_], func, args, named ? kwargs.ptr() : nullptr))
      log_->differ();
    ++at_;
    PyObject* out = PyObject_Call(func.ptr(), args.ptr(), named ? kwargs.ptr() : nullptr);
    if (!out) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(out);
  }

  // Raises unless every recorded call was made.
  void finish() const {
    if (at_ != log_->calls().size()) log_->differ();
  }

 private:
  static bool equal(PyObject* a, PyObject* b) {
    const int found = PyObject_RichCompareBool(a, b, Py_EQ);
    if (found < 0) throw py::error_already_set();
    return found;
  }
  static bool is_value(PyObject* x) { return PyFloat_CheckExact(x) || PyBool_Check(x) || PyUnicode_CheckExact(x); }

  bool same(const Log::Call& known, const py::object& func, const py::tuple& args, PyObject* kwargs) const {
    if (!equal(known.function.ptr(), func.ptr())) return false;
    size_t next = 0;
    const auto is_next = [&](PyObject* x) {
      return next < known.values.size() && equal(known.values[next++].ptr(), x);
    };
    const Py_ssize_t count = PyTuple_GET_SIZE(args.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* x = PyTuple_GET_ITEM(args.ptr(), i);
      if (is_value(x) && !is_next(x)) return false;
    }
    PyObject *name, *value;
    for (Py_ssize_t at = 0; kwargs && PyDict_Next(kwargs, &at, &name, &value);)
      if ((is_value(value) || PyLong_CheckExact(value)) &&
          !is_next(py::make_tuple(py::handle(name), py::handle(value)).ptr()))
        return false;
    std::vector<int64_t> sizes;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* x = PyTuple_GET_ITEM(args.ptr(), i);
      if (!PyLong_CheckExact(x)) continue;
      if (known.has_sizes)
        sizes.push_back(int64_t(PyLong_AsUnsignedLongLongMask(x)));
      else if (!is_next(x))
        return false;
    }
    if (next != known.values.size()) return false;
    if (!known.has_sizes) return true;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* x = PyTuple_GET_ITEM(args.ptr(), i);
      if (PyTuple_Check(x) || PyList_Check(x))
        for (const py::handle& n : py::reinterpret_borrow<py::sequence>(x))
          if (PyLong_CheckExact(n.ptr())) sizes.push_back(int64_t(PyLong_AsUnsignedLongLongMask(n.ptr())));
    }
    return fits(known, sizes);
  }

  // Whether sizes scale with the batch exactly where they have to.
  bool fits(const Log::Call& known, const std::vector<int64_t>& sizes) const {
    if (sizes.size() != known.sizes.size()) return false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int64_t a = sizes[i], b = known.sizes[i];
      const bool scaled = b > 0 && a * then_ == b * now_;
      if (known.place < 0 && !(b == then_ ? scaled : a == b || scaled)) return false;
      if (known.place >= 0 && !(int64_t(i) == known.place ? scaled || (a == b && a == -1) : a == b)) return false;
    }
    return true;
  }

  std::shared_ptr<const Log> log_;
  size_t at_ = 0;
  const int64_t then_, now_;
};

// Pushes a mode onto PyTorch's stack for the lifetime of this object.
class Looking {
 public:
  explicit Looking(const py::object& mode) : is_on_(!mode.is_none()) {
    if (is_on_)
      at::impl::PythonTorchFunctionTLS::push_onto_stack(
          std::make_shared<c10::SafePyObject>(py::object(mode).release().ptr(), getPyInterpreter()));
  }
  ~Looking() {
    if (is_on_) at::impl::PythonTorchFunctionTLS::pop_stack();
  }
  Looking(const Looking&) = delete;
  Looking& operator=(const Looking&) = delete;

 private:
  const bool is_on_;
};
