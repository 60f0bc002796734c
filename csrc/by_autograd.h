#pragma once
#include <vector>

#include "calls.h"

// Terms that follow the critic's calls: loss = adversarial + weight * penalty. pack: number of consecutive samples with
// one score and one norm; 0: norms are over the last axis, and the number of scores is free.
struct Ends {
  double target;
  bool one_sided;
  double power;
  int64_t pack;
  double weight;
};

// Returns the values of a critic that is left to autograd: (loss, adversarial, consistency, penalty), of which the loss
// has the graph, or the penalty alone where no call is scored; else a list of (output, batch) of the calls that were
// made; or None before any call, where this path does not apply. kinds: the score loss of each call, -1 for none;
// targets: its constants.
py::object by_autograd(Caller& caller, const py::object& critic, const py::tuple& tensors, const Places& places,
                       const std::vector<bool>& moves, const std::vector<int64_t>& kinds,
                       const std::vector<double>& targets, const py::tuple& args, const py::dict& kwargs,
                       const Ends& ends);
