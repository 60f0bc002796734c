#pragma once
#include <torch/csrc/utils/pybind.h>

void add_checkpoint(pybind11::module_& module);
