// A node of autograd's graph. Unlike those of torch::autograd::Function it costs no more than PyTorch's own and can
// release what it saved while it runs.
#pragma once
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace gpk {

using torch::autograd::variable_list;

// What a node's derivative is computed from. number: tells derivatives apart; constants: plain values, or tensors
// without checks and hooks; saved: those of its saved variables; needed: of which inputs gradients are wanted.
struct Saved {
  int64_t number;
  torch::jit::Stack constants;
  variable_list saved;
  std::vector<bool> needed;
};

using Derived = variable_list (*)(Saved, const variable_list& cotangents);

class SavingNode : public torch::autograd::Node {
 public:
  // to: the tensors that the derivative is by; number, constants, saved: as in ``Saved``.
  SavingNode(Derived derived, const std::vector<at::Tensor>& to, torch::jit::Stack constants,
             const std::vector<at::Tensor>& saved, int64_t number = 0)
      : Node(torch::autograd::collect_next_edges(to)),
        derived_(derived),
        number_(number),
        constants_(std::move(constants)) {
    saved_.reserve(saved.size());
    for (const at::Tensor& x : saved) saved_.emplace_back(x, /*is_output=*/false);
  }

  variable_list apply(variable_list&& cotangents) override {
    Saved own = taken();
    if (!torch::autograd::get_current_graph_task_keep_graph()) release_variables();
    return derived_(std::move(own), cotangents);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& x : saved_) x.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(number_);
    args.collect(int64_t(constants_.size()));
    for (const c10::IValue& x : constants_) args.collect(x);
    args.collect(saved_, /*is_output=*/false);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    namespace compiled = torch::dynamo::autograd;
    for (c10::IValue& x : constants_) swapped.before(x);
    swapped.before(saved_);
    const Saved own = taken();
    compiled::PackedArgs args;
    args.pack(own.number);
    args.pack(int64_t(own.constants.size()));
    for (const c10::IValue& x : own.constants) args.pack(x);
    args.pack(own.saved);
    args.pack(own.needed);
    std::vector<at::TypePtr> schema;
    for (const c10::IValue& x : args.vec())
      schema.push_back(x.isTensor() ? at::TypePtr(at::TensorType::get()) : x.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const auto run = [derived = derived_](const variable_list& given, const std::vector<c10::IValue>& packed) {
      compiled::PackedArgs from(packed);
      Saved own{from.unpack<int64_t>(), {}, {}, {}};
      own.constants.resize(size_t(from.unpack<int64_t>()));
      for (c10::IValue& x : own.constants) x = from.unpack<c10::IValue>();
      own.saved = from.unpack<variable_list>();
      own.needed = from.unpack<std::vector<bool>>();
      return derived(std::move(own), given);
    };
    PyObject* own_compiler = swapped.get_py_compiler();
    const std::string function = compiler->bind_function(own_compiler, name(), run, schema, /*is_custom_function=*/true,
                                                         /*is_traceable=*/false);
    const c10::IValue metadata =
        compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            compiled::get_input_metadata(next_edges()));
    variable_list gradients =
        compiler->call_function(own_compiler, "apply_functional", function, cotangents, args.vec(), metadata);
    for (c10::IValue& x : constants_) swapped.after(x);
    swapped.after(saved_);
    return gradients;
  }

 private:
  const Derived derived_;
  const int64_t number_;

 protected:
  torch::jit::Stack constants_;

 private:
  Saved taken() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Saved own{number_, constants_, {}, std::vector<bool>(num_outputs())};
    own.saved.reserve(saved_.size());
    for (const torch::autograd::SavedVariable& x : saved_) own.saved.push_back(x.unpack());
    for (size_t i = 0; i < own.needed.size(); ++i) own.needed[i] = task_should_compute_output(i);
    return own;
  }

  std::vector<torch::autograd::SavedVariable> saved_;
};

}  // namespace gpk
