#pragma once
#include <vector>

#include "calls.h"

// What comes after the critic's calls: loss = adversarial + weight * penalty. pack: so many samples have one score and
// one norm; 0: norms are over the last axis, and scores are as they are.
struct Ends {
  double target;
  bool one_sided;
  double power;
  int64_t pack;
  double weight;
};

// The values of a critic that is left to autograd: (loss, adversarial, consistency, penalty), of which the loss has the
// graph, or the penalty alone where no call is scored. kinds: the score loss of each call, -1 where it has none.
// Else a list of (output, batch), of the calls that were made; None, before any was made, where it is not for here.
py::object by_autograd(Caller& caller, const py::object& critic, const py::tuple& tensors, const Places& places,
                       const std::vector<bool>& moves, const std::vector<int64_t>& kinds, const py::tuple& args,
                       const py::dict& kwargs, const Ends& ends);
