#pragma once
#include <ATen/core/TensorBody.h>
#include <torch/csrc/python_headers.h>

#include <vector>

// Whether a mode, a transform, autocast or a tracer is active.
bool watched();

// Whether it is a dense tensor on a CPU or a CUDA device, without a tangent.
bool plain(const at::Tensor& x);

// Whether a choice of backend, None or a name, is that of the native kernels of a device.
bool selects_native(PyObject* choice, bool on_gpu);

// deliver(value, gradients, tensors): the value with a precomputed gradient for each tensor, or NotImplemented.
PyObject* deliver(PyObject* self, PyObject* const* args, Py_ssize_t count);

// The same, for tensors that were checked.
at::Tensor delivered(const at::Tensor& value, std::vector<at::Tensor> gradients, at::TensorList tensors);
