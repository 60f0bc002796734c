#pragma once
#include <torch/csrc/python_headers.h>

// Whether a mode, a transform, autocast or a tracer looks on.
bool watched();

// deliver(value, gradients, tensors): the value with a known gradient for each tensor, or NotImplemented.
PyObject* deliver(PyObject* self, PyObject* const* args, Py_ssize_t count);
