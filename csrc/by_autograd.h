#pragma once
#include <vector>

#include "calls.h"

// Options of loss = adversarial + weight * penalty; by_point: norms are over the last axis.
struct Ends {
  double target;
  bool one_sided, by_point;
  double weight;
};

// Returns (loss, adversarial, penalty, consistency) of a critic that is left to autograd, of which the loss has the
// graph, or the penalty alone where no call is scored. kinds: the score loss of each call, -1: none. Otherwise a list
// of (output, batch) of the calls made so far; None, before any call, where this path does not apply.
py::object by_autograd(Caller& caller, const py::object& critic, const py::tuple& tensors, const Places& places,
                       const std::vector<bool>& moves, const std::vector<int64_t>& kinds, const py::tuple& args,
                       const py::dict& kwargs, const Ends& ends);
