#pragma once
#include <torch/csrc/utils/pybind.h>

// Registers the classes Surroundings, Settled and Memory in the module.
void add_settled(pybind11::module_& module);
