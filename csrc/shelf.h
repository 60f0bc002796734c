#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/python_headers.h>

// Registers the classes Shelf, Log and Check in the module.
void add_shelf(pybind11::module_& module);
