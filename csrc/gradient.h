#pragma once
#include <torch/csrc/utils/pybind.h>

void add_gradients(pybind11::module_& module);
