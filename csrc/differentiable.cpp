// The first derivative of an op as a node of the graph: C++ twin of gpkernels/ops/differentiable.py. A derivative that
// is to have a graph itself, and one under a mode or a transform, is the Python Function's.
#include "differentiable.h"

#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <tuple>
#include <utility>

#include "direct.h"
#include "node.h"

namespace py = pybind11;

namespace {

using torch::autograd::variable_list;

// Derivatives by number, for compiled autograd, which hands on plain values.
std::vector<const Derivative*>& derivatives() {
  static std::vector<const Derivative*> all;
  return all;
}

// Tensors of an argument: one, none, or those of a list.
std::vector<at::Tensor> tensors_of(const c10::IValue& argument) {
  if (argument.isTensor()) return {argument.toTensor()};
  if (argument.isTensorList()) return argument.toTensorVector();
  return {};
}

// Arguments and results of an op as far as its derivative reads them; others are None.
struct Kept {
  torch::jit::Stack arguments, results;
};

// Which tensors are kept, in order; a list is one entry.
template <typename Visit>
void each_kept(const Derivative& derivative, torch::jit::Stack& arguments, torch::jit::Stack& results, Visit visit) {
  for (size_t i = 0; i < arguments.size(); ++i)
    if (derivative.keeps(Source::kArgument, i) && derivative.tensors[i]) visit(arguments[i]);
  for (size_t i = 0; i < results.size(); ++i)
    if (derivative.keeps(Source::kResult, i)) visit(results[i]);
}

Kept kept(const Derivative& derivative, torch::jit::Stack constants, variable_list tensors) {
  Kept found{std::move(constants), torch::jit::Stack(derivative.results)};
  size_t next = 0;
  each_kept(derivative, found.arguments, found.results, [&](c10::IValue& place) {
    if (derivative.takes_list)
      place = std::move(tensors);
    else
      place = std::move(tensors[next++]);
  });
  return found;
}

py::object to_python(const c10::IValue& value) {
  if (value.isTensor()) return py::reinterpret_steal<py::object>(THPVariable_Wrap(value.toTensor()));
  if (value.isDouble()) return py::float_(value.toDouble());
  if (value.isBool()) return py::bool_(value.toBool());
  if (value.isInt()) return py::int_(value.toInt());
  if (value.isIntList()) return py::cast(value.toIntVector());
  if (value.isDoubleList()) return py::cast(value.toDoubleVector());
  if (!value.isTensorList()) return py::none();
  py::list list;
  for (const at::Tensor& x : value.toTensorVector())
    list.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(x)));
  return list;
}

py::tuple to_python(const torch::jit::Stack& values) {
  py::tuple tuple(values.size());
  for (size_t i = 0; i < values.size(); ++i) tuple[i] = to_python(values[i]);
  return tuple;
}

// Gradients by the Function, with a graph where grad mode is enabled.
variable_list by_function(const Derivative& derivative, const std::vector<bool>& needed, const Kept& given,
                          const at::Tensor& cotangent) {
  const py::gil_scoped_acquire held;
  const py::tuple found =
      derivative.function.attr("gradients")(needed, to_python(given.arguments), to_python(given.results), cotangent);
  variable_list gradients(needed.size());
  for (size_t i = 0; i < needed.size(); ++i)
    if (needed[i] && !found[i].is_none()) gradients[i] = THPVariable_Unpack(py::object(found[i]).ptr());
  return gradients;
}

// Gradients by the kernel.
variable_list by_kernel(const Derivative& derivative, const std::vector<bool>& needed, const Kept& given,
                        const at::Tensor& cotangent) {
  torch::jit::Stack stack;
  stack.reserve(derivative.sources.size());
  for (const Source& source : derivative.sources) switch (source.kind) {
      case Source::kCotangent: stack.emplace_back(cotangent); break;
      case Source::kArgument: stack.push_back(given.arguments[source.first]); break;
      case Source::kResult: stack.push_back(given.results[source.first]); break;
      case Source::kNeeded: {
        bool any = false;
        for (size_t i = source.first; i <= source.last; ++i) any = any || needed[i];
        stack.emplace_back(any);
      }
    }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    derivative.op->callBoxed(stack);
  }
  variable_list gradients;
  for (const c10::IValue& value : stack)
    for (at::Tensor& gradient : tensors_of(value)) gradients.push_back(std::move(gradient));
  gradients.resize(needed.size());
  for (size_t i = 0; i < needed.size(); ++i)
    if (!needed[i]) gradients[i] = at::Tensor();
  return gradients;
}

// Whether the backend that runs in this thread is the kernels'.
bool by_native(const Derivative& derivative, bool on_gpu) {
  const py::gil_scoped_acquire held;
  PyObject* found = nullptr;
  if (PyContextVar_Get(derivative.choice.ptr(), nullptr, &found) < 0) throw python_error();
  const auto own = py::reinterpret_steal<py::object>(found);
  if (own) return selects_native(own.ptr(), on_gpu);
  if (on_gpu && at::impl::ThreadLocalPythonObjects::contains("gpkernels.backend"))
    return false;  // a thread's it works for
  return selects_native(derivative.everywhere().ptr(), on_gpu);
}

// number: the derivative's; constants: the op's arguments, None in place of tensors.
variable_list derived(gpk::Saved own, const variable_list& cotangents) {
  const at::Tensor& cotangent = cotangents[0];
  if (!cotangent.defined()) return variable_list(own.needed.size());
  const Derivative& derivative = *derivatives()[size_t(own.number)];
  const Kept given = kept(derivative, std::move(own.constants), std::move(own.saved));
  const bool directly = !at::GradMode::is_enabled() && plain(cotangent) && !watched() &&
                        by_native(derivative, cotangent.device().is_cuda());
  return directly ? by_kernel(derivative, own.needed, given, cotangent)
                  : by_function(derivative, own.needed, given, cotangent);
}

// The node of the first result.
struct Recorded : gpk::SavingNode {
  Recorded(const Derivative& derivative, const std::vector<at::Tensor>& to, torch::jit::Stack constants,
           const std::vector<at::Tensor>& saved)
      : SavingNode(&derived, to, std::move(constants), saved, derivative.number), derivative_(derivative) {}

  std::string name() const override { return derivative_.node; }

 private:
  const Derivative& derivative_;
};

c10::intrusive_ptr<torch::autograd::Node> recorded(const Derivative& derivative, torch::jit::Stack arguments,
                                                   torch::jit::Stack& results, const std::vector<at::Tensor>& to) {
  std::vector<at::Tensor> saved;
  each_kept(derivative, arguments, results, [&saved](const c10::IValue& value) {
    for (at::Tensor& x : tensors_of(value)) saved.push_back(std::move(x));
  });
  for (size_t i = 0; i < arguments.size(); ++i)
    if (derivative.tensors[i]) arguments[i] = c10::IValue();
  return c10::make_intrusive<Recorded>(derivative, to, std::move(arguments), saved);
}

// The node of a sum with a constant.
c10::intrusive_ptr<torch::autograd::Node> shifted(const at::Tensor& x) {
  auto node = c10::make_intrusive<torch::autograd::generated::AddBackward0>();
  node->set_next_edges({torch::autograd::impl::gradient_edge(x), torch::autograd::Edge()});
  node->alpha = 1;
  node->self_scalar_type = node->other_scalar_type = x.scalar_type();
  return node;
}

}  // namespace

bool Derivative::keeps(Source::Kind kind, size_t i) const {
  for (const Source& source : sources)
    if (source.kind == kind && source.first == i) return true;
  return false;
}

const Derivative* derivative_of(const c10::OperatorHandle& op, PyObject* choice, const py::tuple& given) {
  auto* made = new Derivative;  // for the life of the process, as the op
  made->choice = py::reinterpret_borrow<py::object>(choice), made->everywhere = given[4];
  for (const c10::Argument& argument : op.schema().arguments()) {
    const c10::Type& type = *argument.type();
    made->tensors.push_back(type.isSubtypeOf(*c10::TensorType::get()) || type.isSubtypeOf(*c10::ListType::ofTensors()));
  }
  made->results = op.schema().returns().size();
  made->takes_list = op.schema().arguments()[0].type()->kind() == c10::TypeKind::ListType;
  made->function = given[0], made->differentiable = given[1].cast<size_t>();
  made->node = made->function.attr("__name__").cast<std::string>() + "Backward";
  if (!given[2].is_none())
    made->op = c10::Dispatcher::singleton().findSchemaOrThrow(given[2].cast<std::string>().c_str(), "");
  for (const py::handle source : given[3]) {
    const auto [kind, first, last] = source.cast<std::tuple<int, size_t, size_t>>();
    made->sources.push_back({Source::Kind(kind), first, last});
  }
  made->number = int64_t(derivatives().size());
  derivatives().push_back(made);
  return made;
}

void record(const Derivative& derivative, const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& argument : stack) {
    for (at::Tensor& x : tensors_of(argument)) inputs.push_back(std::move(x));
    if (!derivative.takes_list && inputs.size() == derivative.differentiable) break;
  }
  torch::jit::Stack arguments = stack;
  if (derivative.takes_list) arguments[0] = inputs;  // copies share the list, and a kernel may empty it
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  torch::autograd::set_history(stack[0].toTensor(), derivative.op
                                                        ? recorded(derivative, std::move(arguments), stack, inputs)
                                                        : shifted(inputs[0]));
}
