// All that the passes over a graph depend on, as a string of bytes.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace py = pybind11;

// Facts one after the other, each with its length where that can differ.
class Key {
 public:
  void number(int64_t x) { bytes_.append(reinterpret_cast<const char*>(&x), sizeof(x)); }
  void real(double x) { bytes_.append(reinterpret_cast<const char*>(&x), sizeof(x)); }
  void text(const char* data, size_t size) {
    number(int64_t(size));
    bytes_.append(data, size);
  }
  void sizes(at::IntArrayRef x) {
    number(int64_t(x.size()));
    for (const int64_t n : x) number(n);
  }
  void kind(at::ScalarType type, at::Device device) {
    number(int64_t(type) << 32 | int64_t(device.type()) << 16 | int64_t(uint8_t(device.index())));
  }
  void tensor(const at::Tensor& x) {
    if (x.is_nested()) return number(-1);
    sizes(x.sizes());
    if (x.layout() == at::kStrided)
      sizes(x.strides());
    else
      number(-1 - int64_t(x.layout()));
    kind(x.scalar_type(), x.device());
  }
  // A constant of a node: None, numbers, texts, and tuples of them.
  void constant(const py::handle& x) {
    if (PyTuple_Check(x.ptr()) || PyList_Check(x.ptr())) {
      const py::sequence items = py::reinterpret_borrow<py::sequence>(x);
      number(int64_t(items.size()));
      for (const py::handle& item : items) constant(item);
    } else if (PyFloat_CheckExact(x.ptr())) {
      bytes_.push_back('f');
      real(PyFloat_AS_DOUBLE(x.ptr()));
    } else if (PyBool_Check(x.ptr())) {
      bytes_.push_back(x.ptr() == Py_True ? 't' : 'F');
    } else if (PyLong_CheckExact(x.ptr())) {
      bytes_.push_back('i');
      number(int64_t(PyLong_AsUnsignedLongLongMask(x.ptr())));
    } else if (x.is_none()) {
      bytes_.push_back('n');
    } else {
      const std::string value = py::str(x);
      text(value.data(), value.size());
    }
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};
