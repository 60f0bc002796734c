// The gradient of a model as a value, running no Python where its programs are known: native part of
// gpkernels/critic/gradient.py, which handles every other case.
#include "gradient.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SequenceNumber.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "calls.h"
#include "graph.h"
#include "node.h"
#include "program.h"

namespace {

using torch::autograd::variable_list;

// A tensor, or a tuple, list or dict of tensors and of what holds none.
class Flat {
 public:
  // Empty where containers are nested, or of another type.
  static std::optional<Flat> of(const py::handle& x) {
    Flat found;
    if (is_leaf(x)) {
      found.items.push_back(py::reinterpret_borrow<py::object>(x));
    } else if (PyDict_CheckExact(x.ptr())) {
      found.kind_ = Kind::kDict;
      for (const auto& [key, item] : py::reinterpret_borrow<py::dict>(x)) {
        found.keys_.push_back(py::reinterpret_borrow<py::object>(key));
        found.items.push_back(py::reinterpret_borrow<py::object>(item));
      }
    } else if (PyTuple_CheckExact(x.ptr()) || PyList_CheckExact(x.ptr())) {
      found.kind_ = PyTuple_CheckExact(x.ptr()) ? Kind::kTuple : Kind::kList;
      for (const py::handle& item : py::reinterpret_borrow<py::sequence>(x))
        found.items.push_back(py::reinterpret_borrow<py::object>(item));
    } else {
      return std::nullopt;
    }
    return std::all_of(found.items.begin(), found.items.end(), is_leaf) ? std::optional(std::move(found))
                                                                        : std::nullopt;
  }

  // The same structure of other items.
  py::object filled() const {
    switch (kind_) {
      case Kind::kOne: return items.at(0);
      case Kind::kTuple: return py::tuple(py::cast(items));
      case Kind::kList: return py::cast(items);
      case Kind::kDict: break;
    }
    py::dict made;
    for (size_t i = 0; i < items.size(); ++i) made[keys_[i]] = items[i];
    return made;
  }

  bool is_ordered() const { return kind_ != Kind::kDict; }

  std::vector<py::object> items;

 private:
  enum class Kind { kOne, kTuple, kList, kDict };

  static bool is_leaf(const py::handle& x) {
    PyObject* object = x.ptr();
    return THPVariable_CheckExact(object) || object == Py_None || PyLong_Check(object) || PyFloat_Check(object) ||
           PyUnicode_Check(object);
  }

  Kind kind_ = Kind::kOne;
  std::vector<py::object> keys_;
};

// What calls of models with one graph share. known: Python's twin, which computes what has no program yet. places: of
// the inputs among the leaves, -1 for inputs without a gradient. leaves: places of those that are differentiated by.
struct Halves {
  py::object known;
  std::shared_ptr<const Surroundings> surroundings;
  std::shared_ptr<Program> pull;
  std::vector<int64_t> places;
  std::vector<size_t> leaves;
  size_t outputs;
  std::unordered_map<std::string, std::shared_ptr<Program>> finish = {};  // by the cotangents

  ~Halves() {  // in any thread
    const py::gil_scoped_acquire held;
    known = py::object();
    surroundings.reset();
  }
};

// A tensor that owns the halves: compiled autograd accepts no other owner among a node's data.
at::Tensor owner_of(std::unique_ptr<Halves> halves) {
  Halves* own = halves.release();
  return at::from_blob(own, {int64_t(sizeof(*own))}, [own](void*) { delete own; }, at::kByte);
}

Halves& held_by(const at::Tensor& owner) { return *static_cast<Halves*>(owner.data_ptr()); }

std::vector<at::Tensor> joined(std::vector<at::Tensor> first, std::vector<at::Tensor> second) {
  first.insert(first.end(), std::make_move_iterator(second.begin()), std::make_move_iterator(second.end()));
  return first;
}

std::vector<at::Tensor> tensors_of(const py::handle& list) {
  std::vector<at::Tensor> found;
  for (const py::handle& x : py::reinterpret_borrow<py::sequence>(list))
    found.push_back(x.is_none() ? at::Tensor() : THPVariable_Unpack(x.ptr()));
  return found;
}

// Returns the gradients of all leaves. given: cotangents of the outputs and of the gradients at all inputs.
std::vector<at::Tensor> finished(Halves& halves, std::vector<at::Tensor> given, std::vector<at::Tensor> saved) {
  const py::gil_scoped_acquire held;
  Key key;
  bool usual = !is_seen();
  for (const at::Tensor& x : given) {
    key.number(x.defined());
    if (x.defined()) key.tensor(x);
    usual &= !x.defined() || !at::isTensorSubclassLike(x);
  }
  if (usual) {
    const auto found = halves.finish.find(key.bytes());
    const std::shared_ptr<Program> program = found == halves.finish.end() ? nullptr : found->second;
    if (program && !(program->has_backends() && !halves.surroundings->takes_any_backend()))
      return program->run(joined(std::move(given), std::move(saved)));
  }
  const py::tuple made = halves.known.attr("finished")(listed(given), listed(saved));
  if (usual && !made[1].is_none()) halves.finish.emplace(key.bytes(), made[1].cast<std::shared_ptr<Program>>());
  return tensors_of(made[0]);
}

std::string again(const Halves& halves) {
  const py::gil_scoped_acquire held;
  return halves.known.attr("again").cast<std::string>();
}

// Gradients at the leaves. constants: the owner of the halves. cotangents: of the outputs and of the gradients.
variable_list derived(gpk::Saved own, const variable_list& cotangents) {
  const at::Tensor owner = own.constants.at(0).toTensor();
  Halves& halves = held_by(owner);
  TORCH_CHECK(!at::GradMode::is_enabled(), again(halves));
  variable_list results(halves.leaves.size());
  const auto is_given = [](const at::Tensor& x) { return x.defined(); };
  if (std::none_of(cotangents.begin(), cotangents.end(), is_given)) return results;
  variable_list given(cotangents.begin(), cotangents.begin() + int64_t(halves.outputs));
  size_t next = halves.outputs;
  for (const int64_t place : halves.places) given.push_back(place < 0 ? at::Tensor() : cotangents.at(next++));
  const std::vector<at::Tensor> found = finished(halves, std::move(given), std::move(own.saved));
  for (size_t i = 0; i < halves.leaves.size(); ++i) results[i] = found.at(halves.leaves[i]);
  return results;
}

// Outputs of a model and gradients at its inputs, as a function of the leaves of the model's graph.
struct Gradient : gpk::SavingNode {
  Gradient(const std::vector<at::Tensor>& leaves, at::Tensor owner, const std::vector<at::Tensor>& saved)
      : SavingNode(&derived, leaves, {std::move(owner)}, saved) {}

  std::string name() const override { return "gpkernels::Gradient"; }
};

// A call of a model. score: which output is summed and differentiated. wanted: whether results are also differentiated
// by an input. start: sequence number of the model's first node. tag: of the options in force.
struct Made {
  std::vector<at::Tensor> outputs, inputs;
  size_t score;
  std::vector<bool> wanted;
  uint64_t start;
  int64_t tag;
};

// What was read of its graph. leaves: the tensors at which it ends, undefined for inputs that are not wanted; places:
// of the inputs among these; saved: tensors without their graph; graph: whether results have one; owner: of the halves,
// undefined where they are not known.
struct Graph {
  Key key;
  std::vector<at::Tensor> leaves, saved;
  std::vector<int64_t> places;
  bool graph;
  at::Tensor owner;
};

class Gradients {
 public:
  // rules: as for ``Shelf``. refused: names of nodes whose second derivative is not PyTorch's: Python refuses or mends.
  // left: Python's function whether the engine is to compute the gradient of a model, for an input; tag: that for the
  // number of options, above 0.
  Gradients(const py::dict& rules, size_t capacity, std::vector<std::string> refused,
            std::shared_ptr<const Surroundings> surroundings, std::shared_ptr<const Compiler> compiler, py::object left,
            py::object tag)
      : reader_(rules),
        capacity_(capacity),
        refused_(std::move(refused)),
        surroundings_(std::move(surroundings)),
        compiler_(std::move(compiler)),
        left_(std::move(left)),
        tag_(std::move(tag)) {}

  // Calls the model and returns (value, gradient), which have a graph in grad mode where something is trained;
  // (output, inputs, sequence number of the first node) for Python to continue; None, before any call, where this path
  // does not apply.
  py::object at_once(const py::object& model, const py::object& x, const py::tuple& args, const py::dict& kwargs) {
    HANDLE_TH_ERRORS
    if (at::impl::torch_function_mode_enabled() || !PyCallable_Check(model.ptr())) return py::none();
    if (!surroundings_->are_usual()) return py::none();
    std::optional<Flat> given = Flat::of(x);
    if (!given) return py::none();
    const bool graph = at::GradMode::is_enabled();
    const at::AutoGradMode enabled(true);
    Made made{{}, {}, 0, {}, 0, 0};
    std::vector<size_t> at;
    for (size_t i = 0; i < given->items.size(); ++i) {
      if (!THPVariable_Check(given->items[i].ptr())) continue;
      const at::Tensor* item = plain(given->items[i]);
      if (!item) return py::none();
      if (!at::isFloatingType(item->scalar_type())) continue;
      if (!Caller::is_floating(*item)) return py::none();
      const bool wants = graph && item->requires_grad();
      made.inputs.push_back(wants ? item->view_as(*item) : item->detach().set_requires_grad(true));
      made.wanted.push_back(wants);
      at.push_back(i);
      given->items[i] = wrapped(made.inputs.back());
    }
    if (at.empty()) return py::none();
    made.start = at::sequence_number::peek();
    py::object output;
    {
      const Compiler::Eagerly eagerly(*compiler_);
      output = applied(model, given->filled(), args, kwargs);
    }
    const auto begun = [&] { return py::make_tuple(output, listed(made.inputs), made.start); };
    std::optional<Flat> results = Flat::of(output);
    if (!results || !results->is_ordered()) return begun();
    std::vector<size_t> moving;
    for (size_t i = 0; i < results->items.size(); ++i) {
      if (!THPVariable_Check(results->items[i].ptr())) continue;
      const at::Tensor& item = THPVariable_Unpack(results->items[i].ptr());
      if (!item.requires_grad()) continue;
      if (!Caller::is_floating(item)) return begun();
      made.outputs.push_back(item);
      moving.push_back(i);
    }
    if (moving.empty() || moving[0] != 0) return begun();
    std::optional<Graph> read;
    made.tag = options();
    if (!left_(model, wrapped(made.inputs[0])).cast<bool>()) read = this->read(made, graph);
    if (read && !read->owner.defined()) return begun();
    std::vector<at::Tensor> found;
    if (!read || !held_by(read->owner).pull) {
      std::optional<std::vector<at::Tensor>> gradients = by_engine(made, graph);
      if (!gradients) return begun();
      found = joined(std::move(made.outputs), std::move(*gradients));
    } else {
      if (!read->graph) {  // each tensor is freed once it has been read
        output = py::none();
        for (const size_t i : moving) results->items[i] = py::none();
      }
      found = run(std::move(made.outputs), std::move(*read));
    }
    for (size_t i = 0; i < moving.size(); ++i) results->items[moving[i]] = wrapped(found[i]);
    for (py::object& item : given->items) item = py::none();
    for (size_t i = 0; i < at.size(); ++i) given->items[at[i]] = wrapped(found[moving.size() + i]);
    return py::make_tuple(results->filled(), given->filled());
    END_HANDLE_TH_ERRORS_PYBIND
  }

  // For a call that was made: returns outputs and gradients, as a list; where no program is known, what Python needs: a
  // key, leaves, places, saved tensors and whether results have a graph, as in ``Graph``; None where the engine has to
  // compute them: a node has hooks, or no input is in the graph. The list of outputs is emptied where results have no
  // graph, so that each tensor is freed once it has been read.
  py::object gradient(const py::list& outputs, const std::vector<at::Tensor>& inputs, size_t score,
                      const std::vector<bool>& wanted, uint64_t start, bool graph) {
    HANDLE_TH_ERRORS
    Made made{tensors_of(outputs), inputs, score, wanted, start, options()};
    std::optional<Graph> read = this->read(made, graph);
    if (!read || (read->owner.defined() && !held_by(read->owner).pull)) return py::none();
    bool usual = read->owner.defined();
    for (const py::handle& value : outputs) usual &= THPVariable_CheckExact(value.ptr());
    if (!usual)
      return py::make_tuple(py::bytes(read->key.bytes()), listed(read->leaves), read->places, listed(read->saved),
                            read->graph);
    if (!read->graph) PyList_SetSlice(outputs.ptr(), 0, PyList_GET_SIZE(outputs.ptr()), nullptr);
    return listed(run(std::move(made.outputs), std::move(*read)));
    END_HANDLE_TH_ERRORS_PYBIND
  }

  // Adds the program that computes the gradients at inputs, under the key for which there was none; null: the engine is
  // to compute them.
  void keep(const std::string& key, py::object known, std::shared_ptr<Program> pull, std::vector<int64_t> places,
            const py::list& leaves, size_t outputs) {
    if (halves_.size() >= capacity_) halves_.clear();
    std::unique_ptr<Halves> made(
        new Halves{std::move(known), surroundings_, std::move(pull), std::move(places), {}, outputs});
    for (size_t i = 0; i < leaves.size(); ++i)
      if (!leaves[i].is_none()) made->leaves.push_back(i);
    halves_.insert_or_assign(key, owner_of(std::move(made)));
  }

  // For a call that was made, by the engine: returns outputs and gradients; None where a second derivative would be
  // wrong without an error, or where no input is in the graph.
  py::object by_engine(const py::list& outputs, const std::vector<at::Tensor>& inputs, size_t score,
                       const std::vector<bool>& wanted, bool graph) const {
    HANDLE_TH_ERRORS
    Made made{tensors_of(outputs), inputs, score, wanted, 0, 0};
    std::optional<std::vector<at::Tensor>> gradients = by_engine(made, graph);
    if (!gradients) return py::none();
    return listed(joined(std::move(made.outputs), std::move(*gradients)));
    END_HANDLE_TH_ERRORS_PYBIND
  }

 private:
  static int64_t place_of(const at::Tensor& x, const std::vector<at::Tensor>& leaves) {
    const auto edge = torch::autograd::impl::gradient_edge(x);
    const auto at = std::find_if(leaves.begin(), leaves.end(), [&edge](const at::Tensor& leaf) {
      return torch::autograd::impl::gradient_edge(leaf) == edge;
    });
    return at == leaves.end() ? -1 : at - leaves.begin();
  }

  // Empty where the engine has to compute the gradients. graph: whether results have one where something is trained.
  std::optional<Graph> read(const Made& made, bool graph) const {
    Graph to;
    Reader::Found found;
    reader_.read_into(made.outputs, made.start, to.key, found);
    to.leaves = std::move(found.leaves);
    for (const at::Tensor& x : made.inputs) {
      to.places.push_back(place_of(x, to.leaves));
      to.key.number(to.places.back());
      to.key.sizes(x.sizes());
    }
    const auto is_absent = [](int64_t place) { return place < 0; };
    found.hooked |= std::any_of(made.inputs.begin(), made.inputs.end(), &has_hooks);
    if (found.hooked || std::all_of(to.places.begin(), to.places.end(), is_absent)) return std::nullopt;
    for (size_t i = 0; i < to.places.size(); ++i)
      if (to.places[i] >= 0 && !made.wanted[i]) to.leaves[to.places[i]] = at::Tensor();
    for (const at::Tensor& leaf : to.leaves) to.key.number(leaf.defined() ? at::isTensorSubclassLike(leaf) : -1);
    for (const at::Tensor& output : made.outputs) to.key.tensor(output);
    to.graph =
        graph && std::any_of(to.leaves.begin(), to.leaves.end(), [](const at::Tensor& x) { return x.defined(); });
    for (const int64_t number : {int64_t(made.score), int64_t(to.graph), made.tag}) to.key.number(number);
    for (at::Tensor& x : found.saved)
      if (x.defined()) x = at::isTensorSubclassLike(x) ? x.detach() : detached(x);
    to.saved = std::move(found.saved);
    const auto known = is_seen() ? halves_.end() : halves_.find(to.key.bytes());
    if (known == halves_.end()) return to;
    const std::shared_ptr<Program>& pull = held_by(known->second).pull;
    if (!pull || !pull->has_backends() || surroundings_->takes_any_backend()) to.owner = known->second;
    return to;
  }

  // Runs the program; returns outputs and gradients.
  static std::vector<at::Tensor> run(std::vector<at::Tensor> values, Graph of) {
    const Halves& halves = held_by(of.owner);
    for (at::Tensor& value : values) value = detached(value);
    std::vector<at::Tensor> given = joined(values, of.graph ? of.saved : std::move(of.saved)), found;
    {
      const at::NoGradGuard no_graph;
      found = halves.pull->run(std::move(given));
    }
    if (!of.graph) return joined(std::move(values), std::move(found));
    const auto kept = found.begin() + int64_t(halves.places.size());
    of.saved.insert(of.saved.end(), std::make_move_iterator(kept), std::make_move_iterator(found.end()));
    found.erase(kept, found.end());
    std::vector<at::Tensor> trained;
    for (const size_t leaf : halves.leaves) trained.push_back(of.leaves.at(leaf));
    const auto node = c10::make_intrusive<Gradient>(trained, of.owner, of.saved);
    std::vector<at::Tensor> results = joined(std::move(values), std::move(found));
    for (const at::Tensor& x : results)
      if (x.defined()) torch::autograd::set_history(x, node);
    return results;
  }

  // Returns the gradients; outputs lose their graph unless ``graph`` and something is trained.
  std::optional<std::vector<at::Tensor>> by_engine(Made& made, bool graph) const {
    std::unordered_set<const Node*> own;
    for (size_t i = 0; i < made.inputs.size(); ++i)
      if (!made.wanted[i]) own.insert(torch::autograd::impl::gradient_edge(made.inputs[i]).function.get());
    const at::Tensor& scores = made.outputs.at(made.score);
    bool trains = false;
    if (is_refused(scores, own, trains)) return std::nullopt;
    graph &= trains;
    std::vector<at::Tensor> found;
    {
      const py::gil_scoped_release released;
      found = torch::autograd::grad({scores}, made.inputs, {at::ones_like(scores)}, graph, graph, true);
    }
    if (std::none_of(found.begin(), found.end(), [](const at::Tensor& x) { return x.defined(); })) return std::nullopt;
    for (at::Tensor& output : made.outputs)
      if (!graph) output = output.detach();
    return found;
  }

  // Whether a node of the graph is refused. own: ends of the graph that are not trained; trains: set where others are.
  bool is_refused(const at::Tensor& scores, const std::unordered_set<const Node*>& own, bool& trains) const {
    std::unordered_set<const Node*> seen;
    std::vector<const Node*> stack{torch::autograd::impl::gradient_edge(scores).function.get()};
    while (!stack.empty()) {
      const Node* node = stack.back();
      stack.pop_back();
      if (!seen.insert(node).second) continue;
      if (dynamic_cast<const torch::autograd::AccumulateGrad*>(node)) {
        trains |= !own.count(node);
        continue;
      }
      if (std::find(refused_.begin(), refused_.end(), node->name()) != refused_.end()) return true;
      for (const Edge& edge : node->next_edges())
        if (edge.function) stack.push_back(edge.function.get());
    }
    return false;
  }

  // The number of the options with which programs are compiled, 0 where they are not.
  int64_t options() const {
    const py::object found = surroundings_->compiled();
    return found.is_none() ? 0 : tag_(found).cast<int64_t>();
  }

  const Reader reader_;
  const size_t capacity_;
  const std::vector<std::string> refused_;
  const std::shared_ptr<const Surroundings> surroundings_;
  const std::shared_ptr<const Compiler> compiler_;
  const py::object left_, tag_;
  std::unordered_map<std::string, at::Tensor> halves_;  // owners
};

}  // namespace

void add_gradients(pybind11::module_& module) {
  py::class_<Gradients>(module, "Gradients")
      .def(py::init<py::dict, size_t, std::vector<std::string>, std::shared_ptr<Surroundings>,
                    std::shared_ptr<Compiler>, py::object, py::object>())
      .def("at_once", &Gradients::at_once)
      .def("gradient", &Gradients::gradient)
      .def("keep", &Gradients::keep)
      .def("by_engine",
           py::overload_cast<const py::list&, const std::vector<at::Tensor>&, size_t, const std::vector<bool>&, bool>(
               &Gradients::by_engine, py::const_));
}
