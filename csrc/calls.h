// Calls of the critic: batches and outputs.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "program.h"
#include "surroundings.h"

// Null unless it is a plain CPU or CUDA tensor, not of a subclass.
inline const at::Tensor* plain(const py::handle& x) {
  if (!THPVariable_CheckExact(x.ptr())) return nullptr;
  const at::Tensor& found = THPVariable_Unpack(x.ptr());
  const bool is_plain = found.defined() && !found.is_inference() && !at::isTensorSubclassLike(found) &&
                        (found.is_cpu() || found.is_cuda());
  return is_plain ? &found : nullptr;
}

// Returns the tensor without its graph; both share memory and version counter.
inline at::Tensor detached(const at::Tensor& x) {
  c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), false));
}

// Looks up one of gpkernels' ops.
inline c10::OperatorHandle op(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// Calls a model. Further arguments are unpacked only where there are any, as that costs more than the check.
inline py::object applied(const py::object& model, const py::object& x, const py::tuple& args, const py::dict& kwargs) {
  return args.empty() && kwargs.empty() ? model(x) : model(x, *args, **kwargs);
}

// Interpolates between two batches.
class Mixer {
 public:
  Mixer() : op_(op("gpkernels::interpolate")) {}

  at::Tensor operator()(const at::Tensor& real, const at::Tensor& fake, const at::Tensor& eps) const {
    const at::AutoDispatchBelowADInplaceOrView below;  // the inputs are detached
    torch::jit::Stack stack{real, fake, eps};
    op_.callBoxed(stack);
    return std::move(stack[0]).toTensor();
  }

 private:
  c10::OperatorHandle op_;
};

using Places = std::vector<std::vector<size_t>>;

// Results of a step or a penalty: its values, of which the first has the graph; or, without values, the calls that were
// made, for Python to continue. made: for each its output and batch, and for a program the number of its first node;
// key: of the program that is missing, or None.
struct Outcome {
  std::vector<at::Tensor> values;
  py::list made;
  py::object key = py::none();
};

// Builds batches and calls the critic with them.
class Caller {
 public:
  // What batches are made of. given: fake, real and the points of the penalties, each a tensor, None or
  // (real, fake, eps) for interpolates; undefined for what is not supported.
  std::vector<at::Tensor> parts(const py::tuple& given) const {
    std::vector<at::Tensor> found;
    for (const py::handle& one : given) found.push_back(part(one));
    return found;
  }

  // A batch for each call; empty where a tensor is not supported. parts: fake, real and the points of the penalties;
  // places: indices among these, for each call; moves: whether the gradient at a batch is needed.
  static std::vector<at::Tensor> batches(const std::vector<at::Tensor>& parts, const Places& places,
                                         const std::vector<bool>& moves) {
    if (is_seen() || !at::GradMode::is_enabled()) return {};
    std::vector<at::Tensor> found;
    for (const size_t scored : {0, 1})
      if (parts.at(scored).defined() && parts[scored].requires_grad()) return {};
    for (size_t i = 0; i < places.size(); ++i) {
      found.push_back(batch(parts, places[i], moves[i]));
      if (!found.back().defined() || found.back().requires_grad() != moves[i]) return {};
    }
    return found;
  }

  // Calls the critic. log: recorded calls to compare with; rows: their batch size.
  static py::object called(const py::object& critic, const at::Tensor& x, int64_t rows, const std::shared_ptr<Log>& log,
                           const py::tuple& args, const py::dict& kwargs) {
    const at::AutoGradMode enabled(true);
    if (!log) return applied(critic, wrapped(x), args, kwargs);
    const Looking looking(log, rows, x.size(0));
    py::object output = applied(critic, wrapped(x), args, kwargs);
    looking.finish();
    return output;
  }

  // Scores, then features if there are any; empty without scores.
  static std::vector<at::Tensor> outputs_of(const py::object& output) {
    std::vector<at::Tensor> found;
    if (THPVariable_Check(output.ptr())) {
      found.push_back(THPVariable_Unpack(output.ptr()));
    } else if (PyTuple_Check(output.ptr()) || PyList_Check(output.ptr())) {
      const py::sequence items = py::reinterpret_borrow<py::sequence>(output);
      for (size_t i = 0; i < std::min<size_t>(2, items.size()); ++i) {
        const py::object item = items[i];
        if (!THPVariable_Check(item.ptr())) break;
        found.push_back(THPVariable_Unpack(item.ptr()));
      }
    }
    return found;
  }

  // Returns a cached scalar in the accumulation dtype; it must not be written to.
  at::Tensor constant(double value, const at::Tensor& like) {
    const at::ScalarType wide = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const std::tuple<double, at::ScalarType, at::Device> name{value, wide, like.device()};
    for (const auto& [known, number] : constants_)
      if (known == name) return number;
    if (constants_.size() >= 16) constants_.clear();
    constants_.emplace_back(name, at::full({}, value, like.options().dtype(wide).requires_grad(false)));
    return constants_.back().second;
  }

  // Interpolates; undefined where the arguments are not supported.
  at::Tensor mixed(const at::Tensor& real, const at::Tensor& fake, const at::Tensor& eps) const {
    const bool fits = is_batch(real) && alike(real, fake) && weighs(eps, real, real.size(0));
    return fits ? mix_(real, fake, eps) : at::Tensor();
  }

  // Whether eps are weights of that many samples like x.
  static bool weighs(const at::Tensor& eps, const at::Tensor& x, int64_t count) {
    return eps.device() == x.device() && is_floating(eps) && eps.numel() == count && eps.dim() &&
           eps.size(0) == count && (eps.dim() == 1 || eps.dim() == x.dim());
  }

  static bool is_batch(const at::Tensor& x) { return is_floating(x) && x.dim() && x.size(0); }
  static bool alike(const at::Tensor& a, const at::Tensor& b) {
    return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device() &&
           a.layout() == b.layout();
  }

  static bool is_floating(const at::Tensor& x) {
    const at::ScalarType type = x.scalar_type();
    return x.layout() == at::kStrided && !x.is_nested() &&
           (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16);
  }

 private:
  // Returns a floating-point batch, interpolating a tuple; undefined where the argument is not supported.
  at::Tensor part(const py::handle& given) const {
    if (!PyTuple_Check(given.ptr())) {
      const at::Tensor* x = plain(given);
      return x && is_batch(*x) ? *x : at::Tensor();
    }
    const at::Tensor *real = plain(PyTuple_GET_ITEM(given.ptr(), 0)), *fake = plain(PyTuple_GET_ITEM(given.ptr(), 1)),
                     *eps = plain(PyTuple_GET_ITEM(given.ptr(), 2));
    return real && fake && eps ? mixed(*real, *fake, *eps) : at::Tensor();
  }

  // Concatenates parts, to a leaf that requires grad where it moves; undefined where a part is, or they differ.
  static at::Tensor batch(const std::vector<at::Tensor>& parts, const std::vector<size_t>& places, bool moves) {
    const at::NoGradGuard no_graph;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> rows;
    for (const size_t place : places) {
      const at::Tensor& x = parts.at(place);
      if (!x.defined() || (!rows.empty() && !alike(x, rows[0]))) return {};
      rows.push_back(x);
    }
    if (rows.size() == 1 && !moves) return rows[0];
    const at::Tensor x = rows.size() == 1 ? rows[0].detach() : at::cat(rows);
    return moves ? x.set_requires_grad(true) : x;
  }

  const Mixer mix_;
  std::vector<std::pair<std::tuple<double, at::ScalarType, at::Device>, at::Tensor>> constants_;
};
