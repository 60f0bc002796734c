// Runs a list of calls without Python in between. gpkernels/critic/program.py records the list, and runs it without the
// extension. PyTorch's stable ABI has no Scalar arguments (add's alpha, a leaky ReLU's slope), so this is built against
// one version of PyTorch.
#include "program.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checkpoint.h"
#include "gradient.h"
#include "settled.h"
#include "shelf.h"

namespace py = pybind11;

namespace {

bool is_slot(const py::handle& x, const py::handle& slot_type) { return py::isinstance(x, slot_type); }

bool has_slots(const py::handle& x, const py::handle& slot_type) {
  if (!py::isinstance<py::list>(x)) return false;
  for (const py::handle& item : x.cast<py::list>())
    if (is_slot(item, slot_type)) return true;
  return false;
}

// A number for a tensor argument, wrapped as in Python's bindings, so that it does not promote dtypes. single: whether
// all tensors of its call are of float32, which it would be converted to in each run.
at::Tensor number(const py::handle& x, bool single) {
  at::Tensor made = c10::scalar_to_tensor(torch::jit::toIValue(x, c10::NumberType::get()).toScalar());
  if (single && (made.scalar_type() == at::kDouble || made.scalar_type() == at::kLong)) made = made.to(at::kFloat);
  made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Argument argument_of(const py::handle& x, const c10::Argument& declared, const py::handle& slot_type, bool single) {
  using Kind = Argument::Kind;
  if (is_slot(x, slot_type)) return {Kind::kSlot, {x.cast<int>()}, {}};
  const c10::TypePtr& type = declared.type();
  const bool tensors = type->isSubtypeOf(*c10::ListType::ofTensors());
  if (tensors || has_slots(x, slot_type)) {
    Argument found{tensors ? Kind::kTensors : Kind::kMaybeTensors, {}, {}};
    for (const py::handle& item : x.cast<py::list>()) found.slots.push_back(item.is_none() ? -1 : item.cast<int>());
    return found;
  }
  if (type->kind() == c10::TypeKind::TensorType && !THPVariable_Check(x.ptr()) && !x.is_none())
    return {Kind::kConstant, {}, number(x, single)};
  return {Kind::kConstant, {}, torch::jit::toIValue(x, declared.real_type())};
}

void push(const Argument& argument, const std::vector<c10::IValue>& memory, torch::jit::Stack& stack) {
  switch (argument.kind) {
    case Argument::Kind::kSlot: stack.push_back(memory[argument.slots[0]]); return;
    case Argument::Kind::kConstant: stack.push_back(argument.constant); return;
    case Argument::Kind::kTensors: {
      c10::List<at::Tensor> list;
      list.reserve(argument.slots.size());
      for (const int slot : argument.slots) list.push_back(memory[slot].toTensor());
      stack.emplace_back(std::move(list));
      return;
    }
    case Argument::Kind::kMaybeTensors: {
      c10::List<std::optional<at::Tensor>> list;
      list.reserve(argument.slots.size());
      for (const int slot : argument.slots)
        list.push_back(slot < 0 ? std::nullopt : std::optional(memory[slot].toTensor()));
      stack.emplace_back(std::move(list));
      return;
    }
  }
}

// Creates a view without the dispatcher; undefined where the tensor's layout differs from the recorded one.
at::Tensor view_at(const Alias& alias, const at::Tensor& base) {
  if (base.sizes() != alias.base_sizes || base.strides() != alias.base_strides) return {};
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                             base.key_set(), base.dtype());
  c10::TensorImpl* impl = view.unsafeGetTensorImpl();
  impl->set_storage_offset(base.storage_offset() + alias.offset);
  impl->set_sizes_and_strides(alias.sizes, alias.strides);
  return view;
}

void make(const Call& call, std::vector<c10::IValue>& memory, torch::jit::Stack& stack) {
  if (call.alias) {
    at::Tensor view = view_at(*call.alias, memory[call.arguments[0].slots[0]].toTensor());
    if (view.defined()) {
      memory[call.results[0]] = std::move(view);
      for (const int slot : call.frees) memory[slot] = c10::IValue();
      return;
    }
  }
  stack.clear();
  for (const Argument& argument : call.arguments) push(argument, memory, stack);
  call.op.callBoxed(stack);
  if (stack.size() == 1 && stack[0].isTensorList()) {
    const c10::List<at::Tensor> several = std::move(stack[0]).toTensorList();
    stack.clear();
    for (const at::Tensor& x : several) stack.emplace_back(x);
  }
  for (size_t i = 0; i < call.results.size() && i < stack.size(); ++i)
    if (call.results[i] >= 0) memory[call.results[i]] = std::move(stack[i]);
  for (const int slot : call.frees) memory[slot] = c10::IValue();
}

}  // namespace

py::object wrapped(const at::Tensor& x) {
  if (!x.defined()) return py::none();
  PyObject* found = THPVariable_Wrap(x);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

py::list listed(const std::vector<at::Tensor>& tensors) {
  py::list found;
  for (const at::Tensor& x : tensors) found.append(wrapped(x));
  return found;
}

Program::Program(const py::list& calls, std::vector<int> inputs, std::vector<int> outputs,
                 std::vector<std::vector<int>> frees, const py::object& slot_type)
    : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
  for (size_t i = 0; i < calls.size(); ++i) add(calls[i].cast<py::tuple>(), std::move(frees[i]), slot_type);
  for (const int slot : inputs_) count_ = std::max(count_, slot + 1);
  for (const Call& call : calls_)
    for (const int slot : call.results) count_ = std::max(count_, slot + 1);
}

Program::Program(py::function function) : has_backends_(true), function_(std::move(function)) {}

py::list Program::run(const py::list& given) const {
  std::vector<at::Tensor> tensors(given.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* item = PyList_GET_ITEM(given.ptr(), Py_ssize_t(i));
    if (item != Py_None) tensors[i] = THPVariable_Unpack(item);
  }
  PyList_SetSlice(given.ptr(), 0, PyList_GET_SIZE(given.ptr()), nullptr);
  return listed(run(std::move(tensors)));
}

std::vector<at::Tensor> Program::run(std::vector<at::Tensor> given) const {
  if (function_) return call(std::move(given));
  TORCH_CHECK(given.size() == inputs_.size(), "given: expected ", inputs_.size(), " tensors, got ", given.size());
  std::vector<c10::IValue> memory(count_);
  for (size_t i = 0; i < inputs_.size(); ++i)
    if (inputs_[i] >= 0) memory[inputs_[i]] = std::move(given[i]);
  given.clear();
  const py::gil_scoped_release released;
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard plain(c10::autocast_dispatch_keyset);
  torch::jit::Stack stack;
  for (const Call& call : calls_) make(call, memory, stack);
  std::vector<at::Tensor> results;
  for (const int slot : outputs_) results.push_back(slot < 0 ? at::Tensor() : memory[slot].toTensor());
  return results;
}

std::vector<at::Tensor> Program::call(std::vector<at::Tensor> given) const {
  const py::list tensors = listed(given);
  given.clear();
  const c10::impl::ExcludeDispatchKeyGuard plain(c10::autocast_dispatch_keyset);
  std::vector<at::Tensor> results;
  for (const py::handle& x : (*function_)(tensors).cast<py::list>())
    results.push_back(x.is_none() ? at::Tensor() : THPVariable_Unpack(x.ptr()));
  return results;
}

void Program::add(const py::tuple& call, std::vector<int> frees, const py::object& slot_type) {
  const auto name = call[0].cast<std::pair<std::string, std::string>>();
  const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.first.c_str(), name.second.c_str());
  Call made{op, {}, {}, std::move(frees), {}};
  has_backends_ |= name.first.starts_with("gpkernels::");
  if (!call[4].is_none()) {
    const auto at = call[4]
                        .cast<std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                                         std::vector<int64_t>, int64_t>>();
    made.alias = Alias{std::get<0>(at), std::get<1>(at), std::get<2>(at), std::get<3>(at), std::get<4>(at)};
  }
  const bool single = call[5].cast<bool>();
  const py::list args = call[1];
  const py::dict kwargs = call[2];
  const std::vector<c10::Argument>& declared = op.schema().arguments();
  for (size_t i = 0; i < declared.size(); ++i) {
    if (i < args.size()) {
      made.arguments.push_back(argument_of(args[i], declared[i], slot_type, single));
    } else if (kwargs.contains(declared[i].name())) {
      made.arguments.push_back(argument_of(kwargs[declared[i].name().c_str()], declared[i], slot_type, single));
    } else {
      made.arguments.push_back({Argument::Kind::kConstant, {}, *declared[i].default_value()});
    }
  }
  for (const py::handle& slot : call[3].cast<py::list>())
    made.results.push_back(slot.is_none() ? -1 : slot.cast<int>());
  calls_.push_back(std::move(made));
}

PYBIND11_MODULE(_program, m) {
  m.attr("TORCH") = GPK_TORCH_VERSION;
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<py::list, std::vector<int>, std::vector<int>, std::vector<std::vector<int>>, py::object>())
      .def(py::init<py::function>())
      .def("__call__", py::overload_cast<const py::list&>(&Program::run, py::const_));
  add_shelf(m);
  add_settled(m);
  add_gradients(m);
  add_checkpoint(m);
}
