// Fast path from Python to an op, without the argument binding of torch.ops, which costs as much as a small op. It
// accepts dense tensors where no mode, transform or tracer is active, and skips autograd's keys: there is no graph, or
// the op has a derivative here. It is built against one version of PyTorch, on its C++ interface for Python.
#include "direct.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/TransformationHelper.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "differentiable.h"

// The keys of a dense tensor: not quantised, batched, fake, conjugate, lazy or made in inference mode.
constexpr c10::DispatchKeySet kOnCpu({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
constexpr c10::DispatchKeySet kOnGpu({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA});

bool plain(const at::Tensor& x) {
  return (x.key_set() == kOnCpu || x.key_set() == kOnGpu) &&
         !(torch::autograd::impl::get_autograd_meta(x) && x._fw_grad(0).defined());
}

bool selects_native(PyObject* choice, bool on_gpu) {
  const auto is = [&](const char* text) { return PyUnicode_CompareWithASCIIString(choice, text) == 0; };
  return choice == Py_None || (PyUnicode_Check(choice) && (is("auto") || is(on_gpu ? "cuda" : "cpu")));
}

namespace {

enum class Kind { kTensor, kMaybeTensor, kTensors, kFloat, kMaybeFloat, kFloats, kInt, kInts, kBool };

std::optional<Kind> kind_of(const c10::Type& type) {
  using c10::TypeKind;
  const bool list = type.kind() == TypeKind::ListType, maybe = type.kind() == TypeKind::OptionalType;
  const c10::Type& inner = list || maybe ? *type.containedType(0) : type;
  switch (inner.kind()) {
    case TypeKind::TensorType: return list ? Kind::kTensors : maybe ? Kind::kMaybeTensor : Kind::kTensor;
    case TypeKind::FloatType: return list ? Kind::kFloats : maybe ? Kind::kMaybeFloat : Kind::kFloat;
    case TypeKind::IntType: return list ? std::optional(Kind::kInts) : maybe ? std::nullopt : std::optional(Kind::kInt);
    case TypeKind::BoolType: return list || maybe ? std::nullopt : std::optional(Kind::kBool);
    default: return std::nullopt;
  }
}

std::optional<int64_t> integer(PyObject* x) {
  if (!PyLong_Check(x) || PyBool_Check(x)) return std::nullopt;  // accepts an IntEnum
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(x, &overflow);
  return overflow ? std::nullopt : std::optional(value);
}

std::optional<double> number(PyObject* x) {
  return PyFloat_CheckExact(x) ? std::optional(PyFloat_AS_DOUBLE(x)) : std::nullopt;
}

// Arguments for the dispatcher; each `add` returns whether the fast path supports the argument.
class Arguments {
 public:
  // differentiable: how many of the first tensors may have a graph, where there is one.
  Arguments(size_t count, bool has_graph, size_t differentiable)
      : has_graph_(has_graph), differentiable_(differentiable), rest_(differentiable) {
    stack_.reserve(count);
  }
  torch::jit::Stack& stack() { return stack_; }
  bool on_gpu() const { return keys_ == kOnGpu; }
  bool needs_graph() const { return needs_graph_; }

  bool add(Kind kind, PyObject* x) {
    switch (kind) {
      case Kind::kTensor: return add_tensor(x);
      case Kind::kMaybeTensor: return x == Py_None ? put(c10::IValue()) : add_tensor(x);
      case Kind::kTensors: return add_list<at::Tensor>(x, [this](PyObject* item) { return tensor(item); });
      case Kind::kFloat: {
        const std::optional<double> value = number(x);
        return value && put(*value);
      }
      case Kind::kFloats: return add_list<double>(x, &number);
      case Kind::kMaybeFloat: return x == Py_None ? put(c10::IValue()) : add(Kind::kFloat, x);
      case Kind::kInt: {
        const std::optional<int64_t> value = integer(x);
        return value && put(*value);
      }
      case Kind::kInts: return add_list<int64_t>(x, &integer);
      case Kind::kBool: return PyBool_Check(x) && put(x == Py_True);
    }
    return false;
  }

 private:
  bool put(c10::IValue value) {
    stack_.push_back(std::move(value));
    return true;
  }

  bool add_tensor(PyObject* x) {
    const at::Tensor* found = tensor(x);
    return found && put(*found);
  }

  template <typename T, typename Read>
  bool add_list(PyObject* x, const Read& read) {
    if (!PyList_CheckExact(x) && !PyTuple_CheckExact(x)) return false;
    PyObject** items = PySequence_Fast_ITEMS(x);
    c10::List<T> values;
    values.reserve(PySequence_Fast_GET_SIZE(x));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(x); ++i) {
      const auto value = read(items[i]);
      if (!value) return false;
      values.push_back(*value);
    }
    return put(std::move(values));
  }

  // Null unless it is plain, may have the graph that it has, and has the floating-point dtype and device of those
  // before it.
  const at::Tensor* tensor(PyObject* x) {
    if (!THPVariable_CheckExact(x)) return nullptr;
    const at::Tensor& found = THPVariable_Unpack(x);
    if (!found.defined() || !plain(found)) return nullptr;
    const c10::DispatchKeySet keys = found.key_set();
    if (keys_.value_or(keys) != keys) return nullptr;
    keys_ = keys;
    if (has_graph_ && found.requires_grad()) {
      if (!rest_) return nullptr;
      needs_graph_ = true;
    }
    const bool constant = differentiable_ && !rest_;  // one that a Function takes in any dtype
    if (rest_) --rest_;
    if (at::isFloatingType(found.scalar_type()) && !constant) {
      if (type_.value_or(found.scalar_type()) != found.scalar_type()) return nullptr;
      type_ = found.scalar_type();
    }
    return &found;
  }

  torch::jit::Stack stack_;
  std::optional<at::ScalarType> type_;
  std::optional<c10::DispatchKeySet> keys_;
  const bool has_graph_;
  const size_t differentiable_;
  bool needs_graph_ = false;
  size_t rest_;
};

// New references; null with Python's error set if allocation fails.
PyObject* wrapped(c10::IValue& value) {
  if (value.isTensor()) return THPVariable_Wrap(std::move(value).toTensor());
  const c10::List<at::Tensor> tensors = value.toTensorList();
  THPObjectPtr list(PyList_New(Py_ssize_t(tensors.size())));
  for (size_t i = 0; list && i < tensors.size(); ++i) {
    PyObject* item = THPVariable_Wrap(at::Tensor(tensors[i]));
    if (!item) return nullptr;
    PyList_SET_ITEM(list.get(), Py_ssize_t(i), item);
  }
  return list.release();
}

PyObject* tuple_of(torch::jit::Stack& values) {
  THPObjectPtr tuple(PyTuple_New(Py_ssize_t(values.size())));
  for (size_t i = 0; tuple && i < values.size(); ++i) {
    PyObject* item = wrapped(values[i]);
    if (!item) return nullptr;
    PyTuple_SET_ITEM(tuple.get(), Py_ssize_t(i), item);
  }
  return tuple.release();
}

PyObject* results(torch::jit::Stack& stack) {
  if (stack.empty()) Py_RETURN_NONE;
  return stack.size() == 1 ? wrapped(stack[0]) : tuple_of(stack);
}

// An op with a fast path, and its arguments.
struct Target {
  c10::OperatorHandle op;
  std::vector<Kind> kinds;
  bool writes;                   // mutates its arguments, outside any graph
  bool on_gpus;                  // whether it has a CUDA kernel
  PyObject* choice;              // a ContextVar: backend chosen by the thread, if any
  const Derivative* derivative;  // null: an argument with a graph is declined
};

const char* const kTarget = "gpkernels.target";

// Whether the thread's choice of backend, if any, selects the native kernels; empty if Python raised.
std::optional<bool> chosen(PyObject* choice, bool on_gpu) {
  PyObject* found = nullptr;
  if (PyContextVar_Get(choice, Py_None, &found) < 0) return std::nullopt;
  THPObjectPtr name(found);
  return selects_native(name.get(), on_gpu);
}

// Arguments that an op mutates. A kernel may move them out of their lists.
std::vector<at::Tensor> written(const c10::FunctionSchema& schema, const torch::jit::Stack& arguments) {
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    if (arguments[i].isTensor()) found.push_back(arguments[i].toTensor());
    if (arguments[i].isTensorList())
      for (const at::Tensor& x : arguments[i].toTensorVector()) found.push_back(x);
  }
  return found;
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* target = static_cast<const Target*>(PyCapsule_GetPointer(self, kTarget));
  if (!target) return nullptr;
  if (size_t(count) != target->kinds.size() || watched()) Py_RETURN_NOTIMPLEMENTED;
  try {
    const size_t differentiable = target->derivative ? target->derivative->differentiable : 0;
    Arguments arguments(target->kinds.size(), !target->writes && at::GradMode::is_enabled(), differentiable);
    for (size_t i = 0; i < target->kinds.size(); ++i)
      if (!arguments.add(target->kinds[i], args[i])) Py_RETURN_NOTIMPLEMENTED;
    if (arguments.on_gpu() && !target->on_gpus) Py_RETURN_NOTIMPLEMENTED;
    const std::optional<bool> open = chosen(target->choice, arguments.on_gpu());
    if (!open) return nullptr;
    if (!*open) Py_RETURN_NOTIMPLEMENTED;
    std::vector<at::Tensor> changed;
    if (target->writes) changed = written(target->op.schema(), arguments.stack());
    {
      const pybind11::gil_scoped_release released;
      if (arguments.needs_graph()) {
        record(*target->derivative, target->op, arguments.stack());
      } else {
        const at::AutoDispatchBelowADInplaceOrView below;
        target->op.callBoxed(arguments.stack());
      }
    }
    for (const at::Tensor& x : changed) x.unsafeGetTensorImpl()->bump_version();
    return results(arguments.stack());
  } catch (python_error& error) {  // such as Ctrl-C: not retried
    error.restore();
    return nullptr;
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception&) {  // kernels check before they write, so the slow path can raise the error
    Py_RETURN_NOTIMPLEMENTED;
  }
}

void forget(PyObject* capsule) {
  auto* target = static_cast<Target*>(PyCapsule_GetPointer(capsule, kTarget));
  Py_DECREF(target->choice);
  delete target;
}

PyObject* direct(PyObject*, PyObject* args) {
  static PyMethodDef method = {"direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)), METH_FASTCALL,
                               nullptr};
  const char* text = nullptr;
  PyObject *choice = nullptr, *derivative = nullptr;
  int on_gpus = 0;
  if (!PyArg_ParseTuple(args, "sO!|pO!", &text, &PyContextVar_Type, &choice, &on_gpus, &PyTuple_Type, &derivative))
    return nullptr;
  const std::optional<c10::OperatorHandle> op = c10::Dispatcher::singleton().findSchema({text, ""});
  if (!op) return PyErr_Format(PyExc_ValueError, "name: expected an op that is defined, got %s", text);
  std::vector<Kind> kinds;
  for (const c10::Argument& argument : op->schema().arguments()) {
    const std::optional<Kind> kind = kind_of(*argument.real_type());
    if (!kind) return PyErr_Format(PyExc_ValueError, "name: %s takes what cannot be given directly", text);
    kinds.push_back(*kind);
  }
  HANDLE_TH_ERRORS
  const Derivative* how =
      derivative ? derivative_of(*op, choice, pybind11::reinterpret_borrow<pybind11::tuple>(derivative)) : nullptr;
  Py_INCREF(choice);
  auto* made = new Target{*op, std::move(kinds), op->schema().is_mutable(), on_gpus != 0, choice, how};
  PyObject* target = PyCapsule_New(made, kTarget, &forget);
  PyObject* bound = target ? PyCFunction_New(&method, target) : nullptr;
  Py_XDECREF(target);
  return bound;
  END_HANDLE_TH_ERRORS
}

// The number that torch.randint draws from the whole range but its end, which costs more than all else in a small op.
PyObject* draw_key(PyObject*, PyObject*) {
  if (watched()) Py_RETURN_NOTIMPLEMENTED;
  HANDLE_TH_ERRORS
  using Range = std::numeric_limits<int64_t>;
  constexpr uint64_t kCount = uint64_t(Range::max()) - uint64_t(Range::min());
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  at::TensorBase key = at::detail::empty_cpu({1}, at::kLong);
  {
    const std::lock_guard lock(generator.mutex());
    *key.mutable_data_ptr<int64_t>() = at::transformation::uniform_int_from_to<int64_t>(
        at::check_generator<at::CPUGeneratorImpl>(generator)->random64(), kCount, Range::min());
  }
  return THPVariable_Wrap(at::Tensor(std::move(key)));
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"direct", &direct, METH_VARARGS,
     "direct(name, choice, on_gpus=False[, derivative]) -> a callable that gives what the op gives, or NotImplemented "
     "where the op has to be called through torch.ops: a mode is active, the arguments are not all plain, the op "
     "raises, or the ContextVar holds a backend other than 'auto' and that of the kernels. With a derivative, "
     "(function, differentiable, name, sources, everywhere), arguments may have a graph."},
    {"deliver", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&deliver)), METH_FASTCALL,
     "deliver(value, gradients, tensors) -> the value, with a known gradient for each tensor, or NotImplemented where "
     "a mode is active or the tensors are not all plain."},
    {"draw_key", &draw_key, METH_NOARGS,
     "draw_key() -> the Philox key that PyTorch's default generator of the CPU gives next, or NotImplemented where a "
     "mode is active."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__direct() {
  PyObject* module = PyModule_Create(&kModule);
  if (module && PyModule_AddStringConstant(module, "TORCH", GPK_TORCH_VERSION) < 0) Py_CLEAR(module);
  return module;
}
