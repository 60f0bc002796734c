// Python's classes around programs, and queries of autograd's graph for gpkernels/critic/run.py.
#include "shelf.h"

#include <algorithm>
#include <unordered_set>

namespace {

// Results of a step as Python has them: the values, or the only one; else the calls that were made and a key.
py::object in_python(const Outcome& outcome) {
  if (outcome.values.empty()) return py::make_tuple(outcome.made, outcome.key);
  return outcome.values.size() == 1 ? wrapped(outcome.values[0]) : py::object(py::tuple(listed(outcome.values)));
}

// None, before any call, where this path does not apply.
py::object step(Shelf& shelf, const py::object& critic, const py::tuple& tensors, const How& how,
                const std::shared_ptr<Log>& log, const py::tuple& args, const py::dict& kwargs,
                const std::vector<double>& weights) {
  HANDLE_TH_ERRORS
  std::vector<at::Tensor> inputs = Caller::batches(shelf.caller().parts(tensors), how.places, how.moves);
  if (inputs.empty()) return py::none();
  return in_python(shelf.step(critic, std::move(inputs), how, log, args, kwargs, weights));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object left(Shelf& shelf, const py::object& critic, const py::tuple& tensors, const Left& how,
                const py::tuple& args, const py::dict& kwargs) {
  HANDLE_TH_ERRORS
  const std::vector<at::Tensor> inputs = Caller::batches(shelf.caller().parts(tensors), how.places, how.moves);
  return inputs.empty() ? py::none() : in_python(shelf.by_autograd(critic, inputs, how, args, kwargs));
  END_HANDLE_TH_ERRORS_PYBIND
}

// A context in which hooks on the gradients of some tensors are not called: their gradients are delivered later,
// through the same tensors.
class Unhooked {
 public:
  explicit Unhooked(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& x : tensors) hooks_.try_emplace(torch::autograd::impl::gradient_edge(x).function);
  }

  void swap(const py::args&) {
    for (auto& [node, hooks] : hooks_) node->tensor_pre_hooks().swap(hooks);
  }

 private:
  using Hooks = std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>;

  std::unordered_map<decltype(Edge::function), Hooks> hooks_;
};

// Returns a tensor without values whose graph is the given output of a node.
at::Tensor joint(const py::handle& node, uint32_t number) {
  if (!torch::autograd::THPCppFunction_Check(node.ptr()))
    throw py::type_error("node: expected a node of PyTorch's own");
  const c10::impl::ExcludeDispatchKeyGuard unseen(c10::python_ks);
  const auto& own = reinterpret_cast<const torch::autograd::THPCppFunction*>(node.ptr())->cdata;
  at::Tensor made = at::empty({0}, own->input_metadata(number).options());
  torch::autograd::impl::set_gradient_edge(made, {own, number});
  return made;
}

// Whether backward calls hooks at an input, or at a node that outputs depend on. Leaves are not asked: gradients are
// delivered to them. Unlike Shelf::hooked this reads no sizes, which are symbolic in a compiler's graph.
bool any_hooks(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& inputs) {
  if (std::any_of(inputs.begin(), inputs.end(), &has_hooks)) return true;
  std::vector<Node*> stack;
  std::unordered_set<const Node*> seen;
  const auto visit = [&](const Edge& at) {
    if (at.function && at.function->num_outputs() && seen.insert(at.function.get()).second)
      stack.push_back(at.function.get());
  };
  for (const at::Tensor& x : outputs) visit(torch::autograd::impl::gradient_edge(x));
  while (!stack.empty()) {
    Node* node = stack.back();
    stack.pop_back();
    if (!node->tensor_pre_hooks().empty() || !node->pre_hooks().empty() || !node->post_hooks().empty()) return true;
    for (const Edge& edge : node->next_edges()) visit(edge);
  }
  return false;
}

}  // namespace

void add_shelf(py::module_& module) {
  module.def("joint", &joint);
  module.def("any_hooks", &any_hooks);
  py::class_<Log, std::shared_ptr<Log>>(module, "Log").def(py::init<py::list, py::object>());
  py::class_<Unhooked>(module, "Unhooked")
      .def(py::init<const std::vector<at::Tensor>&>())
      .def("__enter__", &Unhooked::swap)
      .def("__exit__", &Unhooked::swap);
  py::class_<How>(module, "How").def(py::init<Places, std::vector<bool>, int64_t, int64_t, size_t>());
  py::class_<Left>(module, "Left")
      .def(py::init([](Places places, std::vector<bool> moves, std::vector<int64_t> kinds, std::vector<double> targets,
                       double target, bool one_sided, double power, int64_t pack, double weight) {
        return Left{std::move(places), std::move(moves), std::move(kinds), std::move(targets),
                    Ends{target, one_sided, power, pack, weight}};
      }));
  py::class_<Compiler, std::shared_ptr<Compiler>>(module, "Compiler")
      .def(py::init<py::object, py::object, std::string, std::string, std::string, std::string>());
  py::class_<Shelf, std::shared_ptr<Shelf>>(module, "Shelf")
      .def(py::init<py::dict, size_t, std::shared_ptr<Compiler>>())
      .def("step", &step)
      .def("by_autograd", &left)
      .def("run", &Shelf::run)
      .def("leaves", &Shelf::leaves)
      .def("hooked", &Shelf::hooked)
      .def("trains", &Shelf::trains)
      .def("add", &Shelf::add)
      .def("clear", &Shelf::clear);
}
