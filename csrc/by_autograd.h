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

// Calls the critic with each batch and computes loss, adversarial loss, consistency term and penalty, if there is one;
// the penalty alone where no call is scored. kinds: the score loss of each call, -1 for none; targets: its constants.
Outcome by_autograd(Caller& caller, const py::object& critic, const std::vector<at::Tensor>& inputs,
                    const std::vector<bool>& moves, const std::vector<int64_t>& kinds,
                    const std::vector<double>& targets, const py::tuple& args, const py::dict& kwargs,
                    const Ends& ends);
