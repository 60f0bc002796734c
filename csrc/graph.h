#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/python_headers.h>

// Adds the classes Reader and Shelf to the module.
void add_reader(pybind11::module_& module);
