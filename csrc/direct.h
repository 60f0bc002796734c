#pragma once
#include <ATen/core/TensorBody.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <vector>

// Whether a mode, a transform, autocast or a tracer looks on.
bool watched();

// deliver(value, gradients, tensors): the value with a known gradient for each tensor, or NotImplemented.
PyObject* deliver(PyObject* self, PyObject* const* args, Py_ssize_t count);

// The same, of tensors that were looked at.
at::Tensor delivered(const at::Tensor& value, std::vector<at::Tensor> gradients, at::TensorList tensors);

// A list's tensors; none where not all of them are of PyTorch's own classes, under no transform and with no tangent.
std::optional<std::vector<at::Tensor>> plain_tensors(PyObject* list);
