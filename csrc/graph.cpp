// Reads autograd's graph of one call of the critic: gpkernels/critic/graph.py says what is read, and does it itself where
// this was not built. The key here is a string of bytes for the same facts.
#include "graph.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

// Facts one after the other, each with its length where that can differ.
class Key {
 public:
  void number(int64_t x) { bytes_.append(reinterpret_cast<const char*>(&x), sizeof(x)); }
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
    sizes(x.sizes());
    sizes(x.strides());
    kind(x.scalar_type(), x.device());
  }
  // A constant of a node: None, numbers, texts, and tuples of them.
  void constant(const py::handle& x) {
    if (PyTuple_Check(x.ptr()) || PyList_Check(x.ptr())) {
      const py::sequence items = py::reinterpret_borrow<py::sequence>(x);
      number(int64_t(items.size()));
      for (const py::handle& item : items) constant(item);
    } else if (PyFloat_CheckExact(x.ptr())) {
      const double value = PyFloat_AS_DOUBLE(x.ptr());
      bytes_.push_back('f');
      bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
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
  py::bytes bytes() const { return py::bytes(bytes_); }

 private:
  std::string bytes_;
};

struct Names {
  std::vector<py::object> saved, constants;  // attributes
};

class Reader {
 public:
  explicit Reader(const py::dict& rules) {
    for (const auto& [name, attributes] : rules) {
      Names names;
      const py::tuple both = attributes.cast<py::tuple>();
      for (const py::handle& attribute : both[0]) names.saved.push_back(interned(attribute));
      for (const py::handle& attribute : both[1]) names.constants.push_back(interned(attribute));
      names_.emplace(name.cast<std::string>(), std::move(names));
    }
  }

  py::tuple read(const py::list& outputs) const {
    std::vector<Edge> roots;
    for (const py::handle& x : outputs) roots.push_back(torch::autograd::impl::gradient_edge(x.cast<at::Tensor>()));
    std::unordered_map<const Node*, int64_t> places;
    const std::vector<c10::intrusive_ptr<Node>> order = in_order(roots, places);
    Key key;
    py::list nodes, saved, leaves;
    for (const auto& node : order) one(node, places, key, nodes, saved, leaves);
    for (const Edge& edge : roots) {
      key.number(places.at(edge.function.get()));
      key.number(edge.input_nr);
    }
    return py::make_tuple(key.bytes(), nodes, saved, leaves);
  }

 private:
  static py::object interned(const py::handle& text) {
    PyObject* name = text.ptr();
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    return py::reinterpret_steal<py::object>(name);
  }

  // Parents before children.
  static std::vector<c10::intrusive_ptr<Node>> in_order(const std::vector<Edge>& roots,
                                                        std::unordered_map<const Node*, int64_t>& places) {
    std::vector<c10::intrusive_ptr<Node>> order, stack;
    for (const Edge& edge : roots) stack.push_back(edge.function);
    while (!stack.empty()) {
      const c10::intrusive_ptr<Node> node = stack.back();
      if (places.count(node.get())) {
        stack.pop_back();
        continue;
      }
      const size_t before = stack.size();
      for (const Edge& edge : node->next_edges())
        if (edge.function && !places.count(edge.function.get())) stack.push_back(edge.function);
      if (stack.size() > before) continue;
      places.emplace(node.get(), int64_t(order.size()));
      order.push_back(node);
      stack.pop_back();
    }
    return order;
  }

  void one(const c10::intrusive_ptr<Node>& node, const std::unordered_map<const Node*, int64_t>& places, Key& key,
           py::list& nodes, py::list& saved, py::list& leaves) const {
    const py::object wrapped = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node));
    if (!wrapped) throw py::error_already_set();
    nodes.append(wrapped);
    if (const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node.get())) {
      key.number(-2);
      key.tensor(leaf->variable);
      leaves.append(py::cast(leaf->variable));
      return;
    }
    const std::string name = node->name();
    key.text(name.data(), name.size());
    key.number(node->num_inputs());
    for (uint32_t i = 0; i < node->num_inputs(); ++i) {
      const auto& meta = node->input_metadata(i);
      if (meta.was_default_constructed()) {
        key.number(-3);
        continue;
      }
      const c10::SymIntArrayRef shape = meta.shape_as_dim_vector();
      key.number(int64_t(shape.size()));
      for (const c10::SymInt& n : shape) key.number(n.guard_int(__FILE__, __LINE__));
      key.kind(c10::typeMetaToScalarType(meta.dtype()), meta.device());
    }
    key.number(int64_t(node->num_outputs()));
    for (const Edge& edge : node->next_edges()) {
      key.number(edge.function ? places.at(edge.function.get()) : -1);
      key.number(edge.input_nr);
    }
    const auto found = names_.find(name);
    if (found == names_.end()) return;
    for (const py::object& attribute : found->second.saved) {
      const py::object value = wrapped.attr(attribute);
      if (PyTuple_Check(value.ptr())) {
        key.number(int64_t(PyTuple_GET_SIZE(value.ptr())));
        for (const py::handle& item : value.cast<py::tuple>()) tensor(item, key, saved);
      } else {
        tensor(value, key, saved);
      }
    }
    for (const py::object& attribute : found->second.constants) key.constant(wrapped.attr(attribute));
  }

  static void tensor(const py::handle& x, Key& key, py::list& saved) {
    saved.append(x);
    if (x.is_none()) {
      key.number(-4);
      return;
    }
    key.tensor(THPVariable_Unpack(x.ptr()));
  }

  std::unordered_map<std::string, Names> names_;
};

}  // namespace

void add_reader(pybind11::module_& module) {
  py::class_<Reader>(module, "Reader").def(py::init<py::dict>()).def("__call__", &Reader::read);
}
