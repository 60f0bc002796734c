// A value with precomputed gradients as a node of the graph: C++ twin of gpkernels/critic/deliver.py, which runs where
// this returns NotImplemented.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "direct.h"
#include "node.h"

bool watched() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ != c10::default_included_set || keys.excluded_ != c10::default_excluded_set ||
         at::impl::torch_function_mode_enabled();
}

namespace {

using torch::autograd::variable_list;

constexpr c10::DispatchKeySet kBatched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});

// Whether the cotangent is 1, if reading it does not synchronise and no mode records calls.
bool is_one(const at::Tensor& cotangent) {
  return cotangent.device().is_cpu() && !cotangent.key_set().has(c10::DispatchKey::Python) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && cotangent.item<double>() == 1.0;
}

// Whether the tensor has no other owner: autograd's condition for taking a gradient without a copy.
bool owned(const at::Tensor& x) { return torch::autograd::impl::is_tensor_stealable(x); }

// The gradients times the cotangent.
variable_list scaled(gpk::Saved own, const variable_list& cotangents) {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "this penalty has precomputed weight gradients and cannot be differentiated twice; call it inside "
              "gpkernels.fast_double_backward(), where it is composed of PyTorch's own operations");
  TORCH_CHECK(!own.constants.empty(),
              "backward through this penalty a second time: expected retain_graph=True in the first");
  const at::Tensor& cotangent = cotangents[0];
  if (!cotangent.defined()) return variable_list(own.constants.size());
  variable_list gradients;
  for (c10::IValue& gradient : own.constants) gradients.push_back(std::move(gradient).toTensor());
  if (cotangent.key_set().has_any(kBatched)) {  // foreach has no batching rule
    for (at::Tensor& gradient : gradients) gradient = at::mul(gradient, cotangent);
  } else if (!std::all_of(gradients.begin(), gradients.end(), &owned)) {
    gradients = at::_foreach_mul(gradients, cotangent);  // retained, or held by compiled autograd
  } else if (!is_one(cotangent)) {
    at::_foreach_mul_(gradients, cotangent);
  }
  return gradients;
}

// Gradients are constants, not saved variables, so that hooks on saved tensors do not see them.
struct Deliver : gpk::SavingNode {
  Deliver(const std::vector<at::Tensor>& to, torch::jit::Stack gradients)
      : SavingNode(&scaled, to, std::move(gradients), {}) {}

  std::string name() const override { return "gpkernels::Deliver"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    constants_.clear();
  }
};

// Null unless it is a plain tensor without transforms or a tangent.
const at::Tensor* tensor(PyObject* x) {
  if (!THPVariable_CheckExact(x)) return nullptr;
  const at::Tensor& found = THPVariable_Unpack(x);
  if (!found.defined() || found.is_inference() || at::isTensorSubclassLike(found)) return nullptr;
  if (torch::autograd::impl::get_autograd_meta(found) && found._fw_grad(0).defined()) return nullptr;
  return &found;
}

// Tensors of a list; empty unless all of them are plain.
std::optional<std::vector<at::Tensor>> plain_tensors(PyObject* list) {
  if (!PyList_CheckExact(list)) return std::nullopt;
  std::vector<at::Tensor> found;
  found.reserve(size_t(PyList_GET_SIZE(list)));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const at::Tensor* item = tensor(PyList_GET_ITEM(list, i));
    if (!item) return std::nullopt;
    found.push_back(*item);
  }
  return found;
}

}  // namespace

at::Tensor delivered(const at::Tensor& value, std::vector<at::Tensor> gradients, at::TensorList tensors) {
  if (!torch::autograd::compute_requires_grad(tensors)) return value;
  torch::jit::Stack constants(std::make_move_iterator(gradients.begin()), std::make_move_iterator(gradients.end()));
  torch::autograd::set_history(value, c10::make_intrusive<Deliver>(tensors.vec(), std::move(constants)));
  return value;
}

PyObject* deliver(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "deliver takes 3 arguments, got %zd", count);
  if (watched() || !at::GradMode::is_enabled()) Py_RETURN_NOTIMPLEMENTED;
  HANDLE_TH_ERRORS
  const at::Tensor* value = tensor(args[0]);
  const auto gradients = plain_tensors(args[1]), given = plain_tensors(args[2]);
  if (!value || !gradients || !given || gradients->size() != given->size()) Py_RETURN_NOTIMPLEMENTED;
  return THPVariable_Wrap(delivered(*value, *gradients, *given));
  END_HANDLE_TH_ERRORS
}
