// A critic's whole loss with its weight gradients, running no Python but the critic's own, where its program is cached:
// native part of gpkernels/critic/run.py, which handles every other case.
#include "shelf.h"

#include <ATen/SequenceNumber.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "by_autograd.h"
#include "calls.h"
#include "direct.h"
#include "graph.h"

namespace {

// One call of the critic. start: sequence number of its first node.
struct Called {
  std::vector<at::Tensor> outputs;
  at::Tensor x;
  uint64_t start;
};

// Results of a program. leaves: the distinct leaves of the graphs, whose gradients follow the values in results.
struct Done {
  std::vector<at::Tensor> results, leaves;
};

constexpr size_t kValues = 3;  // besides the penalties

// Calls of the critic: for each the places of its samples, as in ``Caller::batches``, and whether the gradient at them
// is needed. pack: samples per score, 0: any. tag: identifies the work. alone: index of the only value that is
// returned, 0 for all of them.
struct How {
  Places places;
  std::vector<bool> moves;
  int64_t pack;
  int64_t tag;
  size_t alone;
};

// Cache of programs, by everything that they depend on.
class Shelf {
 public:
  // uncompiled: Python's context in which compiled parts of a critic run eagerly.
  Shelf(const py::dict& rules, size_t capacity, py::object uncompiled)
      : reader_(rules), capacity_(capacity), uncompiled_(std::move(uncompiled)) {}

  // Calls the critic with each batch and runs the program. tensors: as in ``Caller::batches``; log: recorded calls for
  // one part's rows. Returns the values, or the one that is asked for; else (outputs of the calls, key or None); None,
  // before any call, where this path does not apply.
  py::object step(const py::object& critic, const py::tuple& tensors, const How& how, const std::shared_ptr<Log>& log,
                  const py::tuple& args, const py::dict& kwargs, const std::vector<double>& weights) {
    std::vector<at::Tensor> inputs = caller_.batches(tensors, how.places, how.moves);
    if (inputs.empty()) return py::none();
    const Eagerly eagerly(uncompiled_);
    py::list made;
    std::vector<Called> calls;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor& x = inputs[i];
      const uint64_t start = at::sequence_number::peek();
      const int64_t rows = x.size(0) / int64_t(how.places[i].size());
      const py::object output = Caller::called(critic, x, rows, log, args, kwargs);
      made.append(py::make_tuple(output, wrapped(x), start));
      std::vector<at::Tensor> outputs = Caller::outputs_of(output);
      const bool fit = !outputs.empty() && (!how.pack || outputs[0].numel() * how.pack >= x.size(0)) &&
                       (!how.moves[i] || outputs[0].requires_grad());
      if (!fit) return py::make_tuple(made, py::none());
      calls.push_back({std::move(outputs), x, start});
    }
    std::vector<at::Tensor> numbers{caller_.constant(1.0, inputs[0])};
    for (const double weight : weights) numbers.push_back(caller_.constant(weight, inputs[0]));
    Key key;
    key.number(how.tag);
    std::optional<Done> done = finish(
        calls,
        [&made, &inputs] {
          made.attr("clear")();
          inputs.clear();
        },
        std::move(numbers), key);
    if (!done) return py::make_tuple(made, py::bytes(key.bytes()));
    std::vector<at::Tensor>& results = done->results;
    const size_t values = kValues + weights.size();
    std::vector<at::Tensor> gradients, to;
    for (size_t i = 0; i < done->leaves.size(); ++i)
      if (at::Tensor& gradient = results[values + i]; gradient.defined()) {
        gradients.push_back(std::move(gradient));
        to.push_back(done->leaves[i]);
      }
    results.resize(values);
    at::Tensor& value = results[how.alone];
    if (!to.empty()) {
      const at::AutoGradMode enabled(true);
      value = delivered(value, std::move(gradients), to);
    }
    if (how.alone) return wrapped(value);
    const at::NoGradGuard no_graph;
    for (at::Tensor& other : results)
      if (!other.defined()) other = at::zeros_like(value);
    return py::tuple(listed(results));
  }

  // Returns the values with their graph, for a critic that is left to autograd; else the outputs of the calls, or None.
  py::object by_autograd(const py::object& critic, const py::tuple& tensors, const Places& places,
                         const std::vector<bool>& moves, const std::vector<int64_t>& kinds,
                         const std::vector<double>& targets, const py::tuple& args, const py::dict& kwargs,
                         double target, bool one_sided, double power, int64_t pack, double weight) {
    const Ends ends{target, one_sided, power, pack, weight};
    const Eagerly eagerly(uncompiled_);
    return ::by_autograd(caller_, critic, tensors, places, moves, kinds, targets, args, kwargs, ends);
  }

  // Runs the program for calls that were made, [(outputs, batch, sequence number of the first node)]. Returns results
  // and leaves, or the key; None where a mode or profiler observes calls.
  py::object run(const py::list& passes, int64_t tag, const std::vector<at::Tensor>& numbers) const {
    if (is_seen()) return py::none();
    std::vector<Called> calls;
    for (const py::handle& pass : passes) {
      const py::tuple all = pass.cast<py::tuple>();
      Called one{{}, THPVariable_Unpack(all[1].ptr()), all[2].cast<uint64_t>()};
      for (const py::handle& output : all[0].cast<py::list>()) one.outputs.push_back(THPVariable_Unpack(output.ptr()));
      calls.push_back(std::move(one));
    }
    Key key;
    key.number(tag);
    const auto let_go = [&passes] {
      for (const py::handle& pass : passes) {
        PyObject* outputs = PyTuple_GET_ITEM(pass.ptr(), 0);
        PyList_SetSlice(outputs, 0, PyList_GET_SIZE(outputs), nullptr);
      }
    };
    const std::optional<Done> done = finish(calls, let_go, numbers, key);
    if (!done) return py::bytes(key.bytes());
    return py::make_tuple(listed(done->results), listed(done->leaves));
  }

  // Returns the tensors at which a graph ends; handles for older nodes.
  py::list leaves(const std::vector<at::Tensor>& outputs, uint64_t start) const {
    return listed(read(outputs, start).leaves);
  }

  // Whether hooks have to be called in backward. x: the batch.
  bool hooked(const std::vector<at::Tensor>& outputs, const at::Tensor& x, uint64_t start) const {
    return has_hooks(x) || read(outputs, start).hooked;
  }

  // Whether a dropout node is in training mode.
  bool trains(const py::handle& node) const {
    const auto* wrapped = reinterpret_cast<const torch::autograd::THPCppFunction*>(node.ptr());
    const auto* dropout = dynamic_cast<const Dropout*>(wrapped->cdata.get());
    return dropout && dropout->train.value_or(true);
  }

  void add(const std::string& key, std::shared_ptr<Program> program) {
    if (programs_.size() >= capacity_) programs_.clear();
    programs_[key] = std::move(program);
  }

  void clear() { programs_.clear(); }

 private:
  Reader::Found read(const std::vector<at::Tensor>& outputs, uint64_t start) const {
    Key key;
    Reader::Found found;
    reader_.read_into(outputs, start, key, found);
    return found;
  }

  // Runs the program, if there is one. let_go: drops Python's references to the calls, so that each tensor is freed
  // once it has been read. given: one, and the weights of the penalties.
  template <typename LetGo>
  std::optional<Done> finish(std::vector<Called>& calls, const LetGo& let_go, std::vector<at::Tensor> given,
                             Key& key) const {
    Done done;
    std::unordered_map<const c10::TensorImpl*, int64_t> numbers;
    for (const Called& one : calls) {
      Reader::Found found;
      reader_.read_into(one.outputs, one.start, key, found);
      key.number(found.hooked || has_hooks(one.x));
      key.sizes(one.x.sizes());
      for (const at::Tensor& leaf : found.leaves) {
        const auto [at, is_new] = numbers.emplace(leaf.unsafeGetTensorImpl(), int64_t(done.leaves.size()));
        if (is_new) done.leaves.push_back(leaf);
        key.number(leaf.is_same(one.x) ? -at->second - 1 : at->second);
        key.number(at::isTensorSubclassLike(leaf));
      }
      for (const at::Tensor& value : one.outputs) {
        key.number(value.requires_grad());
        key.tensor(value);
        given.push_back(value.detach());
      }
      std::move(found.saved.begin(), found.saved.end(), std::back_inserter(given));
    }
    const auto known = programs_.find(key.bytes());
    if (known == programs_.end()) return std::nullopt;
    const std::shared_ptr<Program> program = known->second;  // another thread may clear the cache
    let_go();
    calls.clear();
    done.results = program->run(std::move(given));
    return done;
  }

  const Reader reader_;
  const size_t capacity_;
  const py::object uncompiled_;
  Caller caller_;
  std::unordered_map<std::string, std::shared_ptr<Program>> programs_;
};

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

void add_shelf(pybind11::module_& module) {
  module.def("joint", &joint);
  module.def("any_hooks", &any_hooks);
  py::class_<Log, std::shared_ptr<Log>>(module, "Log").def(py::init<py::list, py::object>());
  py::class_<Unhooked>(module, "Unhooked")
      .def(py::init<const std::vector<at::Tensor>&>())
      .def("__enter__", &Unhooked::swap)
      .def("__exit__", &Unhooked::swap);
  py::class_<How>(module, "How").def(py::init<Places, std::vector<bool>, int64_t, int64_t, size_t>());
  py::class_<Shelf>(module, "Shelf")
      .def(py::init<py::dict, size_t, py::object>())
      .def("step", &Shelf::step)
      .def("by_autograd", &Shelf::by_autograd)
      .def("run", &Shelf::run)
      .def("leaves", &Shelf::leaves)
      .def("hooked", &Shelf::hooked)
      .def("trains", &Shelf::trains)
      .def("add", &Shelf::add)
      .def("clear", &Shelf::clear);
}
