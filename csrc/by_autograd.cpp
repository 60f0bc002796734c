// The loss of a critic that is left to autograd, running no Python but the critic's calls: native part of
// gpkernels/critic/by_autograd.py.
#include "by_autograd.h"

#include <ATen/ops/add.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

#include "direct.h"

namespace {

// Casts to at least float32, the dtype of the loss, so that derivatives lose no precision under a loss scale.
at::Tensor widened(const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return type == at::kHalf || type == at::kBFloat16 ? x.to(at::kFloat) : x.detach();
}

// Returns the gradient of the summed scores, with its graph; undefined where they do not depend on x.
at::Tensor input_gradient(const at::Tensor& scores, const at::Tensor& x) {
  const py::gil_scoped_release released;
  const at::AutoGradMode enabled(true);
  return torch::autograd::grad({scores}, {x}, {at::ones_like(scores)}, true, true, true)[0];
}

// A value and its derivatives by the tensors that have a graph.
struct Value {
  at::Tensor value;
  std::vector<at::Tensor> gradients;
};

Value score_loss(const std::vector<at::Tensor>& scores, const std::vector<int64_t>& kinds,
                 const std::vector<double>& targets, const at::Tensor& unit) {
  static const c10::OperatorHandle forth = op("gpkernels::score_loss"), back = op("gpkernels::score_loss_backward");
  std::vector<at::Tensor> wide;
  for (const at::Tensor& s : scores) wide.push_back(widened(s));
  torch::jit::Stack value{wide, kinds, targets}, gradients{unit, wide, kinds, targets};
  forth.callBoxed(value);
  back.callBoxed(gradients);
  return {value[0].toTensor(), gradients[0].toTensorVector()};
}

Value penalty(const at::Tensor& gradient, const Ends& ends, const at::Tensor& weight) {
  static const c10::OperatorHandle forth = op("gpkernels::gradient_norm_penalty"),
                                   back = op("gpkernels::gradient_norm_penalty_backward");
  constexpr int64_t kMean = 1;  // as in ops/gradient_norm_penalty.py
  at::Tensor rows = widened(gradient);
  if (ends.pack != 1) rows = rows.reshape({-1, ends.pack ? ends.pack * rows.numel() / rows.size(0) : rows.size(-1)});
  torch::jit::Stack value{rows, ends.target, ends.one_sided, kMean, ends.power};
  forth.callBoxed(value);  // also returns the coefficient of the derivative
  torch::jit::Stack derivative{weight, rows, value[1]};
  back.callBoxed(derivative);
  return {value[0].toTensor(), {derivative[0].toTensor().view_as(gradient)}};
}

}  // namespace

Outcome by_autograd(Caller& caller, const py::object& critic, const std::vector<at::Tensor>& inputs,
                    const std::vector<bool>& moves, const std::vector<int64_t>& kinds,
                    const std::vector<double>& targets, const py::tuple& args, const py::dict& kwargs,
                    const Ends& ends) {
  Outcome outcome;
  std::vector<at::Tensor> scored;
  std::vector<int64_t> scored_kinds;
  std::vector<double> scored_targets;
  at::Tensor penalised, points;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& x = inputs[i];
    const py::object output = Caller::called(critic, x, x.size(0), nullptr, args, kwargs);
    outcome.made.append(py::make_tuple(output, wrapped(x)));
    const std::vector<at::Tensor> outputs = Caller::outputs_of(output);
    const bool fits = !outputs.empty() && plain(wrapped(outputs[0])) && Caller::is_floating(outputs[0]) &&
                      (!ends.pack || outputs[0].numel() * ends.pack >= x.size(0)) && outputs[0].numel() &&
                      (!moves[i] || outputs[0].requires_grad());
    if (!fits) return outcome;
    if (moves[i]) penalised = outputs[0], points = x;
    if (kinds[i] < 0) continue;
    scored.push_back(outputs[0]);
    scored_kinds.push_back(kinds[i]);
    scored_targets.push_back(targets[i]);
  }
  at::Tensor gradient;
  if (points.defined()) {
    gradient = input_gradient(penalised, points);
    if (!gradient.defined()) return outcome;  // an error in Python
  }
  const at::Tensor unit = caller.constant(1.0, inputs[0]), weight = caller.constant(ends.weight, inputs[0]);
  Value own, of_gradient;
  at::Tensor loss;
  {
    const py::gil_scoped_release released;
    const at::NoGradGuard no_graph;
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (!scored.empty()) own = score_loss(scored, scored_kinds, scored_targets, unit);
    if (gradient.defined()) of_gradient = penalty(gradient, ends, weight);
    const at::Tensor &a = own.value, &b = of_gradient.value;
    loss = a.defined() && b.defined() ? at::add(a, b, ends.weight) : a.defined() ? a.clone() : b;
  }
  std::vector<at::Tensor> gradients = std::move(own.gradients), to = std::move(scored);
  if (gradient.defined()) {
    gradients.push_back(of_gradient.gradients[0]);
    to.push_back(gradient);
  }
  const at::AutoGradMode enabled(true);
  const at::Tensor value = delivered(loss, std::move(gradients), to);
  if (!own.value.defined()) {
    outcome.values = {value};
    return outcome;
  }
  outcome.values = {value, own.value, at::zeros_like(own.value)};
  if (of_gradient.value.defined()) outcome.values.push_back(of_gradient.value);
  return outcome;
}
