#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "direct.h"

// Where an argument of a derivative comes from: the cotangent, an argument or a result of the op, or whether any of
// its tensors from first to last needs a gradient.
struct Source {
  enum Kind { kCotangent, kArgument, kResult, kNeeded } kind;
  size_t first, last;
};

// How an op is differentiated.
struct Derivative {
  int64_t number = 0;
  std::string node;                       // its name
  std::vector<bool> tensors;              // which of the op's arguments are tensors
  size_t results = 0;                     // how many the op has
  size_t differentiable = 0;              // how many of the op's tensors, from the first; of a list all
  bool takes_list = false;                // the first argument is the one that has tensors
  std::optional<c10::OperatorHandle> op;  // without one, the cotangent is the gradient
  std::vector<Source> sources;            // of the arguments of `op`
  pybind11::object function;              // whose `gradients` may have a graph
  pybind11::object choice;                // a ContextVar: backend chosen by the thread, if any
  pybind11::object everywhere;            // a function: the one of the process

  bool keeps(Source::Kind kind, size_t i) const;
};

// From (function, differentiable, name of `op` or None, [(kind, first, last), ...], `everywhere`).
const Derivative* derivative_of(const c10::OperatorHandle& op, PyObject* choice, const pybind11::tuple& given);

// Exchange an op's arguments on the stack for its results, the first of which has the derivative as its node.
void record(const Derivative& derivative, const c10::OperatorHandle& op, torch::jit::Stack& stack);
