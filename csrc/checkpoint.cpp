// Puts autograd's graph of what reentrant checkpoints call in the place of the checkpoints' nodes.
#include "checkpoint.h"

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace py = pybind11;

namespace {

using torch::autograd::Edge;
using torch::autograd::Node;

// By the Python object of a node, the edges that take the place of those to its outputs.
using Edges = std::unordered_map<const PyObject*, std::vector<Edge>>;

// Returns the edge that takes the place of one; nodes have this name.
Edge replaced(const Edge& edge, const std::string& name, const Edges& edges) {
  if (!edge.is_valid() || edge.function->name() != name) return edge;
  const auto object = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(edge.function));
  const auto found = edges.find(object.ptr());
  return found == edges.end() ? edge : found->second.at(edge.input_nr);
}

// outputs: of the graph, which is changed in place. again: (node, results of its function with a graph of their own).
void replace_nodes(const std::vector<at::Tensor>& outputs, const std::string& name,
                   const std::vector<std::pair<py::object, std::vector<at::Tensor>>>& again) {
  Edges edges;
  for (const auto& [node, results] : again) {
    std::vector<Edge>& to = edges[node.ptr()];
    for (const at::Tensor& x : results)
      to.push_back(x.requires_grad() ? torch::autograd::impl::gradient_edge(x) : Edge());
  }
  std::unordered_set<const Node*> seen;
  std::vector<Node*> left;
  const auto visit = [&](const Edge& edge) {
    if (edge.is_valid() && seen.insert(edge.function.get()).second) left.push_back(edge.function.get());
  };
  for (const at::Tensor& x : outputs) {
    const Edge edge = torch::autograd::impl::gradient_edge(x), to = replaced(edge, name, edges);
    if (to.function != edge.function) torch::autograd::impl::set_gradient_edge(x, to);
    visit(to);
  }
  while (!left.empty()) {
    Node* node = left.back();
    left.pop_back();
    for (Edge& edge : node->next_edges()) {
      edge = replaced(edge, name, edges);
      visit(edge);
    }
  }
}

}  // namespace

void add_checkpoint(py::module_& module) { module.def("replace_nodes", &replace_nodes); }
