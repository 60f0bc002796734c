#pragma once
#include <torch/csrc/python_headers.h>

#include <pybind11/pybind11.h>

// Adds the classes Reader and Shelf to the module.
void add_reader(pybind11::module_& module);
