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
      const int64_t place = both[1].is_none() ? kUnknown : both[1].cast<int64_t>();
      Call made{call[0], {}, !call[2].is_none(), {}, call[3].cast<bool>(), place};
      for (const py::handle& value : call[1].cast<py::tuple>())
        made.values.push_back(py::reinterpret_borrow<py::object>(value));
      if (made.has_sizes)
        for (const py::handle& size : call[2].cast<py::tuple>()) made.sizes.push_back(size.cast<int64_t>());
      calls_.push_back(std::move(made));
    }
  }

  static constexpr int64_t kUnknown = -1;

  struct Call {
    py::object function;
    std::vector<py::object> values;
    bool has_sizes;
    std::vector<int64_t> sizes;
    bool filled;    // whether only integers within a sequence are sizes
    int64_t place;  // index of the batch size among the sizes; kUnknown, or another negative number if none scales
  };

  const std::vector<Call>& calls() const { return calls_; }
  bool is_difference(const py::error_already_set& error) const { return error.matches(differs_); }
  [[noreturn]] void differ() const {
    PyErr_SetNone(differs_.ptr());
    throw py::error_already_set();
  }

 private:
  std::vector<Call> calls_;
  py::object differs_;
};

// Compares calls with those of a log. then, now: rows of the batch.
class Check {
 public:
  Check(std::shared_ptr<const Log> log, int64_t then, int64_t now) : log_(std::move(log)), then_(then), now_(now) {}

  // Raises unless the next call is this one.
  void next(PyObject* func, PyObject* args, PyObject* kwargs) {
    if (at_ >= log_->calls().size() || !same(log_->calls()[at_], func, args, kwargs)) log_->differ();
    ++at_;
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

  // Reads the arguments of a call as Python does: class Call of together.py.
  struct Described {
    const Log::Call& known;
    size_t next = 0;  // of the values
    std::vector<int64_t> sizes = {};

    bool is_next(PyObject* x) { return next < known.values.size() && equal(known.values[next++].ptr(), x); }

    // are_sizes: whether integers are sizes; within: the same for those within a sequence.
    bool same(PyObject* x, bool are_sizes, bool within) {
      if (are_sizes && PyLong_Check(x) && !PyBool_Check(x)) {
        sizes.push_back(int64_t(PyLong_AsUnsignedLongLongMask(x)));
        return true;
      }
      if (PyLong_Check(x) || PyFloat_Check(x) || PyComplex_Check(x) || PyUnicode_Check(x) || x == Py_None)
        return is_next(x);
      if (PyTuple_Check(x) || PyList_Check(x)) {
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(x); ++i)
          if (!same(PySequence_Fast_GET_ITEM(x, i), within, within)) return false;
      } else if (PySlice_Check(x)) {
        const auto* slice = reinterpret_cast<PySliceObject*>(x);
        for (PyObject* end : {slice->start, slice->stop, slice->step})
          if (!same(end, false, false)) return false;
      }
      return true;
    }
  };

  static bool is_size(PyObject* name) {
    for (const char* known : {"size", "shape", "repeats", "dims"})
      if (PyUnicode_CompareWithASCIIString(name, known) == 0) return true;
    return false;
  }

  bool same(const Log::Call& known, PyObject* func, PyObject* args, PyObject* kwargs) const {
    if (!equal(known.function.ptr(), func)) return false;
    Described found{known};
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i)
      if (!found.same(PyTuple_GET_ITEM(args, i), known.has_sizes && !known.filled, known.has_sizes)) return false;
    PyObject *name, *value;
    for (Py_ssize_t at = 0; kwargs && PyDict_Next(kwargs, &at, &name, &value);) {
      const bool sizes = known.has_sizes && is_size(name);
      if (!found.is_next(name) || !found.same(value, sizes, sizes)) return false;
    }
    return found.next == known.values.size() && (!known.has_sizes || fits(known, found.sizes));
  }

  // Whether sizes scale with the batch exactly where they have to.
  bool fits(const Log::Call& known, const std::vector<int64_t>& sizes) const {
    if (sizes.size() != known.sizes.size()) return false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int64_t a = sizes[i], b = known.sizes[i];
      const bool scaled = b > 0 && a * then_ == b * now_;
      if (known.place == Log::kUnknown && !(b == then_ ? scaled : a == b || scaled)) return false;
      if (known.place != Log::kUnknown && !(int64_t(i) == known.place ? scaled || (a == b && a == -1) : a == b))
        return false;
    }
    return true;
  }

  std::shared_ptr<const Log> log_;
  size_t at_ = 0;
  const int64_t then_, now_;
};

// A torch function mode with a ``Check``; of Python's own API, as it is entered in every call that a critic makes.
struct Mode {
  PyObject_HEAD Check* check;

  static PyObject* of(std::unique_ptr<Check> check) {
    static PyTypeObject* type = made();
    auto* self = PyObject_New(Mode, type);
    if (!self) throw py::error_already_set();
    self->check = check.release();
    return reinterpret_cast<PyObject*>(self);
  }

 private:
  static PyTypeObject* made() {
    static PyMethodDef methods[] = {
        {"__torch_function__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called)), METH_FASTCALL,
         "Compare a call with the recorded one, then make it."},
        {}};
    static PyType_Slot slots[] = {{Py_tp_methods, methods}, {Py_tp_dealloc, reinterpret_cast<void*>(&freed)}, {}};
    static PyType_Spec spec = {"gpkernels._program.Check", sizeof(Mode), 0, Py_TPFLAGS_DEFAULT, slots};
    PyObject* type = PyType_FromSpec(&spec);
    if (!type) throw py::error_already_set();
    return reinterpret_cast<PyTypeObject*>(type);
  }

  static void freed(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete reinterpret_cast<Mode*>(self)->check;
    PyObject_Free(self);
    Py_DECREF(type);
  }

  // given: function, types, args, kwargs.
  static PyObject* called(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    if (count < 3 || count > 4) return PyErr_Format(PyExc_TypeError, "__torch_function__ takes 4 arguments");
    PyObject* kwargs = count == 4 && given[3] != Py_None && PyDict_GET_SIZE(given[3]) ? given[3] : nullptr;
    try {
      reinterpret_cast<Mode*>(self)->check->next(given[0], given[2], kwargs);
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    }
    return PyObject_Call(given[0], given[2], kwargs);
  }
};

// Compares calls with those of a log while this object lives.
class Looking {
 public:
  Looking(std::shared_ptr<const Log> log, int64_t then, int64_t now) {
    auto check = std::make_unique<Check>(std::move(log), then, now);
    check_ = check.get();
    mode_ = std::make_shared<c10::SafePyObject>(Mode::of(std::move(check)), getPyInterpreter());
    at::impl::PythonTorchFunctionTLS::push_onto_stack(mode_);
  }
  ~Looking() { at::impl::PythonTorchFunctionTLS::pop_stack(); }
  Looking(const Looking&) = delete;
  Looking& operator=(const Looking&) = delete;

  void finish() const { check_->finish(); }

 private:
  const Check* check_;
  std::shared_ptr<c10::SafePyObject> mode_;
};
