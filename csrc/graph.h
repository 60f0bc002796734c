// Reads autograd's graph of one call of the critic: C++ twin of gpkernels/critic/graph.py. The key is a byte string of
// the same facts.
#pragma once
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "calls.h"
#include "nodes.h"

using Dropout = torch::autograd::generated::NativeDropoutBackward0;
using torch::autograd::Edge;
using torch::autograd::Node;

// The node of DTensor.from_local, whose gradient gpkernels/private.py gives a graph.
constexpr const char* kFromLocal = "_FromTorchTensorBackward";

// A tensor without values whose graph is an output of a node.
inline at::Tensor handle_of(const Edge& edge) {
  const auto& meta = edge.function->input_metadata(edge.input_nr);
  std::vector<int64_t> sizes;
  for (const c10::SymInt& n : meta.shape_as_dim_vector()) sizes.push_back(n.guard_int(__FILE__, __LINE__));
  at::Tensor made = at::empty({}, meta.options()).expand(sizes);
  torch::autograd::impl::set_gradient_edge(made, edge);
  return made;
}

// Whether hooks see the gradient at an input of a model, a leaf or a view that was made for it.
inline bool has_hooks(const at::Tensor& input) {
  return input.requires_grad() && !torch::autograd::impl::gradient_edge(input).function->tensor_pre_hooks().empty();
}

struct Names {
  std::vector<py::object> saved, constants;  // attributes
  const Typed* typed = nullptr;              // the same past Python
  bool indexes = false;                      // whether the saved tensors are indices
};

class Reader {
 public:
  explicit Reader(const py::dict& rules) {
    for (const auto& [name, attributes] : rules) {
      Names names;
      const py::tuple both = attributes.cast<py::tuple>();
      for (const py::handle& attribute : both[0]) names.saved.push_back(interned(attribute));
      for (const py::handle& attribute : both[1]) names.constants.push_back(interned(attribute));
      names.indexes = both[2].cast<bool>();
      names.typed = typed_of(name.cast<std::string>(), both[0].cast<Attributes>(), both[1].cast<Attributes>());
      names_.emplace(name.cast<std::string>(), std::move(names));
    }
  }

  // Contents of one graph.
  struct Found {
    std::vector<at::Tensor> saved, leaves;
    bool hooked = false;  // a node has hooks on its gradients, or gets one in Python, or a leaf is sparse
  };

  // start: sequence number of the critic's first node; older nodes end its graph.
  void read_into(const std::vector<at::Tensor>& outputs, uint64_t start, Key& key, Found& found) const {
    std::vector<Edge> roots;
    for (const at::Tensor& output : outputs)
      if (output.requires_grad()) roots.push_back(torch::autograd::impl::gradient_edge(output));
    Places places;
    for (const Edge& edge : in_order(roots, start, places)) one(edge, start, places, key, found);
    for (const Edge& edge : roots) {
      key.number(place_of(edge, start, places));
      key.number(edge.input_nr);
    }
  }

 private:
  static py::object interned(const py::handle& text) {
    PyObject* name = text.ptr();
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    return py::reinterpret_steal<py::object>(name);
  }

  // Index of each node, or of each output of an older one.
  using Places = std::map<std::pair<const Node*, uint32_t>, int64_t>;

  static bool is_older(const Node* node, uint64_t start) { return node->sequence_nr() < start; }

  static std::pair<const Node*, uint32_t> name_of(const Edge& edge, uint64_t start) {
    return {edge.function.get(), is_older(edge.function.get(), start) ? edge.input_nr : 0};
  }

  static int64_t place_of(const Edge& edge, uint64_t start, const Places& places) {
    return places.at(name_of(edge, start));
  }

  // Parents before children.
  static std::vector<Edge> in_order(const std::vector<Edge>& roots, uint64_t start, Places& places) {
    std::vector<Edge> order, stack = roots;
    while (!stack.empty()) {
      const Edge edge = stack.back();
      const auto name = name_of(edge, start);
      if (places.count(name)) {
        stack.pop_back();
        continue;
      }
      const size_t before = stack.size();
      if (!is_older(edge.function.get(), start))
        for (const Edge& parent : edge.function->next_edges())
          if (parent.function && !places.count(name_of(parent, start))) stack.push_back(parent);
      if (stack.size() > before) continue;
      places.emplace(name, int64_t(order.size()));
      order.push_back(edge);
      stack.pop_back();
    }
    return order;
  }

  static py::object wrapped_in_python(const decltype(Edge::function)& node) {
    const py::object found = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node));
    if (!found) throw py::error_already_set();
    return found;
  }

  void one(const Edge& at, uint64_t start, const Places& places, Key& key, Found& to) const {
    const auto& node = at.function;
    if (is_older(node.get(), start)) {
      to.leaves.push_back(handle_of(at));
      key.number(-2);
      key.tensor(to.leaves.back());
      return;
    }
    if (const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node.get())) {
      key.number(-2);
      key.tensor(leaf->variable);
      to.hooked |= leaf->variable.layout() != at::kStrided;
      to.leaves.push_back(leaf->variable);
      return;
    }
    to.hooked |= !node->tensor_pre_hooks().empty() || !node->pre_hooks().empty() || !node->post_hooks().empty();
    const std::string name = node->name();
    to.hooked |= name == kFromLocal;
    key.text(name.data(), name.size());
    key.number(node->num_inputs());
    for (uint32_t i = 0; i < node->num_inputs(); ++i) {
      const auto& meta = node->input_metadata(i);
      if (meta.was_default_constructed()) {
        key.number(-3);
        continue;
      }
      if (meta.is_nested_tensor()) {  // has no sizes; in Python an error, except where autograd's engine is used
        key.number(-7);
        to.hooked = true;
        return;
      }
      const c10::SymIntArrayRef shape = meta.shape_as_dim_vector();
      key.number(int64_t(shape.size()));
      for (const c10::SymInt& n : shape) key.number(n.guard_int(__FILE__, __LINE__));
      key.kind(c10::typeMetaToScalarType(meta.dtype()), meta.device());
    }
    key.number(int64_t(node->num_outputs()));
    for (const Edge& edge : node->next_edges()) {
      key.number(edge.function ? place_of(edge, start, places) : -1);
      key.number(edge.input_nr);
    }
    if (const auto* dropout = dynamic_cast<const Dropout*>(node.get())) key.number(dropout->train.value_or(true));
    const auto found = names_.find(name);
    if (found == names_.end() || (found->second.saved.empty() && found->second.constants.empty())) return;
    std::vector<const torch::autograd::SavedVariable*> saved;
    const size_t before = to.saved.size();
    if (found->second.typed && found->second.typed->read(*node, saved, key)) {
      for (const auto* variable : saved) tensor(variable->unpack(node), key, to);
      drop_unless_dense(before, to);
      return;
    }
    const py::object wrapped = wrapped_in_python(node);
    for (const py::object& attribute : found->second.saved) {
      const py::object value = wrapped.attr(attribute);
      if (PyTuple_Check(value.ptr())) {
        key.number(int64_t(PyTuple_GET_SIZE(value.ptr())));
        for (const py::handle& item : value.cast<py::tuple>()) tensor(item, key, to);
      } else {
        tensor(value, key, to);
      }
    }
    for (const py::object& attribute : found->second.constants) key.constant(wrapped.attr(attribute));
    if (drop_unless_dense(before, to)) return;
    if (found->second.indexes) key.number(index_by_row({to.saved.begin() + before, to.saved.end()}));
  }

  // Forgets the tensors of a call, from an index on, where one is sparse: no rule knows such calls.
  static bool drop_unless_dense(size_t before, Found& to) {
    const auto is_dense = [](const at::Tensor& x) {
      return !x.defined() || (x.layout() == at::kStrided && !x.is_nested());
    };
    if (std::all_of(to.saved.begin() + before, to.saved.end(), is_dense)) return false;
    to.saved.resize(before);
    return true;
  }

  // As in graph.py.
  static bool index_by_row(const std::vector<at::Tensor>& indices) {
    if (indices.empty() || !indices[0].defined()) return false;
    const at::Tensor& first = indices[0];
    if (!first.is_cpu() || first.scalar_type() != at::kLong || first.dim() != 1 ||
        first.key_set().has(c10::DispatchKey::Python))
      return false;
    for (const at::Tensor& other : indices)
      if (other.defined() && (other.scalar_type() != at::kLong || other.sizes() != first.sizes())) return false;
    const auto* numbers = first.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < first.numel(); ++i)
      if (numbers[i * first.stride(0)] != i) return false;
    return true;
  }

  static void tensor(const py::handle& x, Key& key, Found& to) {
    tensor(x.is_none() ? at::Tensor() : THPVariable_Unpack(x.ptr()), key, to);
  }

  static void tensor(at::Tensor x, Key& key, Found& to) {
    if (!x.defined()) {
      key.number(-4);
      to.saved.emplace_back();
      return;
    }
    PyObject* known = x.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
    key.number(!known || THPVariable_CheckExact(known) ? -5 : -6);
    // As in graph.py: without the graph that it comes from. A mode would see that, and a number itself.
    const bool is_number = x.unsafeGetTensorImpl()->is_wrapped_number();
    if (is_number || (!x.is_leaf() && !x.key_set().has(c10::DispatchKey::Python))) {
      const c10::impl::ExcludeDispatchKeyGuard unseen(c10::python_ks);
      x = detached(x);
      if (is_number) x.unsafeGetTensorImpl()->set_wrapped_number(false);
    }
    key.tensor(x);
    to.saved.push_back(std::move(x));
  }

  std::unordered_map<std::string, Names> names_;
};
