// What decides how a call is made besides its arguments: state of Python modules, read where it lives.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>

namespace py = pybind11;

// Whether a mode or a transform is active, which has to see every call. Autocast is ignored: programs run without it.
inline bool is_seen() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet autocast = c10::autocast_dispatch_keyset;
  return keys.included_ != c10::default_included_set ||
         (keys.excluded_ | autocast) != (c10::default_excluded_set | autocast);
}

// A key of dictionaries, hashed once.
class Name {
 public:
  explicit Name(const std::string& text)
      : text_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text.c_str()))) {
    if (!text_) throw py::error_already_set();
  }

  // Null where the dictionary lacks it.
  PyObject* in(PyObject* dictionary) const {
    PyObject* found = PyDict_GetItemWithError(dictionary, text_.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  void set(PyObject* dictionary, PyObject* value) const {
    if (PyDict_SetItem(dictionary, text_.ptr(), value) < 0) throw py::error_already_set();
  }

  // Null, with Python's error set, where an object has no such attribute.
  py::object of_or_null(const py::handle& object) const {
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), text_.ptr()));
  }

  py::object of(const py::handle& object) const {
    py::object found = of_or_null(object);
    if (!found) throw py::error_already_set();
    return found;
  }

  void set_on(const py::handle& object, const py::handle& value) const {
    if (PyObject_SetAttr(object.ptr(), text_.ptr(), value.ptr()) < 0) throw py::error_already_set();
  }

 private:
  py::object text_;
};

// A variable of a module that is not imported here.
class Variable {
 public:
  Variable(const std::string& module, const std::string& name) : module_(module), name_(name) {}

  // Null where the module is not imported, or lacks it.
  PyObject* find() const {
    PyObject* module = module_.in(PyImport_GetModuleDict());
    return module && PyModule_Check(module) ? name_.in(PyModule_GetDict(module)) : nullptr;
  }

  // Only where it was found.
  void set(PyObject* value) const { name_.set(PyModule_GetDict(module_.in(PyImport_GetModuleDict())), value); }

 private:
  Name module_, name_;
};

// Makes contexts in which compiled parts of a model run eagerly: C++ twin of gpkernels/critic/uncompiled.py.
class Compiler {
 public:
  // python: that context; stance: its state; names: of the compiler's module, and in it of the function that sets the
  // callback of frame evaluation, the type of stances, and the current stance.
  Compiler(py::object python, py::object stance, const std::string& module, const std::string& set_eval_frame,
           const std::string& stance_type, const std::string& current)
      : python_(std::move(python)),
        stance_(std::move(stance)),
        set_eval_frame_(module, set_eval_frame),
        type_(module, stance_type),
        current_(module, current),
        module_(module) {}

  // A context while it lives.
  class Eagerly {
   public:
    explicit Eagerly(const Compiler& compiler) : compiler_(compiler) {
      if (!compiler.module_.in(PyImport_GetModuleDict())) return;
      PyObject* set_eval_frame = compiler.set_eval_frame_.find();
      if (!set_eval_frame || !compiler.type_.find() || !compiler.current_.find()) {
        context_ = compiler.python_();
        context_.attr("__enter__")();
        return;
      }
      callback_ = call(set_eval_frame, Py_None);  // within frame evaluation no stance can be set
      compiler.enter();
    }
    ~Eagerly() noexcept(false) {
      if (context_) context_.attr("__exit__")(py::none(), py::none(), py::none());
      if (!callback_) return;
      const py::error_scope pending;  // of the model's call
      compiler_.leave();
      if (!callback_.is_none()) call(compiler_.set_eval_frame_.find(), callback_.ptr());
    }
    Eagerly(const Eagerly&) = delete;
    Eagerly& operator=(const Eagerly&) = delete;

   private:
    const Compiler& compiler_;
    py::object context_, callback_;
  };

 private:
  static py::object call(PyObject* function, PyObject* argument) {
    PyObject* found = PyObject_CallOneArg(function, argument);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

  // The stance is global, and other threads may be inside the twin.
  class Locked {
   public:
    explicit Locked(const Compiler& all) : lock_(all.lock_.of(all.stance_)) { lock_.attr("acquire")(); }
    ~Locked() noexcept(false) { lock_.attr("release")(); }

   private:
    const py::object lock_;
  };

  void enter() const {
    const Locked locked(*this);
    const int64_t inside = inside_.of(stance_).cast<int64_t>();
    if (!inside) {
      py::object nothing = nothing_.of(stance_);
      if (nothing.is_none()) {
        nothing = py::reinterpret_borrow<py::object>(type_.find())("force_eager");
        nothing_.set_on(stance_, nothing);
      }
      before_.set_on(stance_, current_.find());
      current_.set(nothing.ptr());
    }
    inside_.set_on(stance_, py::int_(inside + 1));
  }

  void leave() const {
    const Locked locked(*this);
    const int64_t inside = inside_.of(stance_).cast<int64_t>() - 1;
    inside_.set_on(stance_, py::int_(inside));
    if (inside) return;
    const py::object before = before_.of(stance_);
    before_.set_on(stance_, py::none());
    current_.set(before.ptr());
  }

  const py::object python_, stance_;
  const Variable set_eval_frame_, type_, current_;
  const Name module_, lock_{"lock"}, inside_{"inside"}, before_{"before"}, nothing_{"nothing"};
};

// A choice of the process, a name in a module, and of threads and tasks, a ContextVar.
class Choice {
 public:
  explicit Choice(const py::tuple& both) : own_(both[0]), module_(both[1]) {}

  py::object operator()() const {
    PyObject *everywhere = name_.in(module_.ptr()), *found = nullptr;
    if (PyContextVar_Get(own_.ptr(), everywhere, &found) < 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

 private:
  const py::object own_;
  const py::dict module_;
  const Name name_{"_everywhere"};
};

class Surroundings {
 public:
  // backend, compiled: choices, (ContextVar, dictionary of the module); carried: key of a thread's choice of backend in
  // PyTorch's state; level: (module, name) of the level of forward-mode differentiation; own_mode: type of function
  // modes in which nothing is recorded; may_be_sharded: whether parameters may be distributed, if fsdp is imported;
  // partial, module: types of partial functions and of modules.
  Surroundings(const py::tuple& backend, std::string carried, const py::tuple& compiled, const py::tuple& level,
               py::object own_mode, py::object may_be_sharded, const std::string& fsdp, py::object partial,
               py::object module)
      : backend_(backend),
        carried_(std::move(carried)),
        compiled_(compiled),
        level_(level[0].cast<std::string>(), level[1].cast<std::string>()),
        own_mode_(std::move(own_mode)),
        may_be_sharded_(std::move(may_be_sharded)),
        fsdp_(fsdp),
        partial_(std::move(partial)),
        module_(std::move(module)) {}

  // What critics that are made anew for each call have in common: C++ twin of ``owner_of`` in critic/by_autograd.py.
  py::object owner_of(py::object critic) const {
    while (reinterpret_cast<PyObject*>(Py_TYPE(critic.ptr())) == partial_.ptr()) critic = func_.of(critic);
    if (PyMethod_Check(critic.ptr())) return py::reinterpret_borrow<py::object>(PyMethod_GET_SELF(critic.ptr()));
    if (!PyFunction_Check(critic.ptr())) return critic;
    PyObject* cells = PyFunction_GET_CLOSURE(critic.ptr());
    for (Py_ssize_t i = 0; cells && i < PyTuple_GET_SIZE(cells); ++i) {
      PyObject* content = PyCell_GET(PyTuple_GET_ITEM(cells, i));
      if (content && py::isinstance(content, module_)) return py::reinterpret_borrow<py::object>(content);
    }
    return py::reinterpret_borrow<py::object>(PyFunction_GET_CODE(critic.ptr()));
  }

  // Whether the native path may be taken: no backend is forced, and nothing has to see or change the calls.
  bool are_usual() const {
    if (is_seen() || !takes_any_backend() || in_own_mode()) return false;
    PyObject* level = level_.find();
    if (level && PyLong_AsLong(level) >= 0) return false;
    return !fsdp_.in(PyImport_GetModuleDict()) || !may_be_sharded_().cast<bool>();
  }

  // Whether no backend is forced in this thread.
  bool takes_any_backend() const {
    if (!is_auto(backend_().ptr())) return false;
    if (!at::impl::ThreadLocalPythonObjects::contains(carried_)) return true;
    PyObject* both = at::impl::ThreadLocalPythonObjects::get(carried_)->ptr(getPyInterpreter());  // (thread, name)
    const bool own = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(both, 0)) == PyThread_get_thread_ident();
    PyObject* name = PyTuple_GET_ITEM(both, 1);
    return own || name == Py_None || is_auto(name);
  }

  // The options with which programs are compiled, or None.
  py::object compiled() const { return compiled_(); }

  // x: on a CPU or a CUDA device.
  static bool autocasts(const at::Tensor& x) { return at::autocast::is_autocast_enabled(x.device().type()); }

 private:
  static bool is_auto(PyObject* name) {
    return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "auto") == 0;
  }

  bool in_own_mode() const {
    if (!at::impl::torch_function_mode_enabled()) return false;
    for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
      PyObject* mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
      if (py::isinstance(mode, own_mode_)) return true;
    }
    return false;
  }

  const Choice backend_;
  const std::string carried_;
  const Choice compiled_;
  const Variable level_;
  const py::object own_mode_, may_be_sharded_;
  const Name fsdp_, func_{"func"};
  const py::object partial_, module_;
};
