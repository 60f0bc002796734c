// A critic's whole loss with its weight gradients, running no Python but the critic's own, where its program is cached:
// native part of gpkernels/critic/run.py, which handles every other case.
#pragma once
#include <ATen/SequenceNumber.h>
#include <ATen/ops/zeros_like.h>

#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "by_autograd.h"
#include "calls.h"
#include "direct.h"
#include "graph.h"

// Registers the classes Shelf, How, Left, Log, Compiler and Unhooked in the module.
void add_shelf(py::module_& module);

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

inline constexpr size_t kValues = 3;  // besides the penalties

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

// The same for a critic that is left to autograd. kinds: the score loss of each call, -1 for none; targets: its
// constants.
struct Left {
  Places places;
  std::vector<bool> moves;
  std::vector<int64_t> kinds;
  std::vector<double> targets;
  Ends ends;
};

// Cache of programs, by everything that they depend on.
class Shelf {
 public:
  Shelf(const py::dict& rules, size_t capacity, std::shared_ptr<const Compiler> compiler)
      : reader_(rules), capacity_(capacity), compiler_(std::move(compiler)) {}

  // Calls the critic with each batch and runs the program. log: recorded calls for one part's rows. Returns all values
  // and the loss with its graph, or the only one that is asked for.
  Outcome step(const py::object& critic, std::vector<at::Tensor> inputs, const How& how,
               const std::shared_ptr<Log>& log, const py::tuple& args, const py::dict& kwargs,
               const std::vector<double>& weights) {
    Outcome outcome;
    const Compiler::Eagerly eagerly(*compiler_);
    std::vector<Called> calls;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor& x = inputs[i];
      const uint64_t start = at::sequence_number::peek();
      const int64_t rows = x.size(0) / int64_t(how.places[i].size());
      const py::object output = Caller::called(critic, x, rows, log, args, kwargs);
      outcome.made.append(py::make_tuple(output, wrapped(x), start));
      std::vector<at::Tensor> outputs = Caller::outputs_of(output);
      const bool fit = !outputs.empty() && (!how.pack || outputs[0].numel() * how.pack >= x.size(0)) &&
                       (!how.moves[i] || outputs[0].requires_grad());
      if (!fit) return outcome;
      calls.push_back({std::move(outputs), x, start});
    }
    std::vector<at::Tensor> numbers{caller_.constant(1.0, inputs[0])};
    for (const double weight : weights) numbers.push_back(caller_.constant(weight, inputs[0]));
    Key key;
    key.number(how.tag);
    std::optional<Done> done = finish(
        calls,
        [&outcome, &inputs] {
          outcome.made.attr("clear")();
          inputs.clear();
        },
        std::move(numbers), key);
    if (!done) {
      outcome.key = py::bytes(key.bytes());
      return outcome;
    }
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
    if (how.alone) {
      outcome.values = {value};
      return outcome;
    }
    const at::NoGradGuard no_graph;
    for (at::Tensor& other : results)
      if (!other.defined()) other = at::zeros_like(value);
    outcome.values = std::move(results);
    return outcome;
  }

  // The same for a critic that is left to autograd.
  Outcome by_autograd(const py::object& critic, const std::vector<at::Tensor>& inputs, const Left& left,
                      const py::tuple& args, const py::dict& kwargs) {
    const Compiler::Eagerly eagerly(*compiler_);
    return ::by_autograd(caller_, critic, inputs, left.moves, left.kinds, left.targets, args, kwargs, left.ends);
  }

  const Caller& caller() const { return caller_; }

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
  const std::shared_ptr<const Compiler> compiler_;
  Caller caller_;
  std::unordered_map<std::string, std::shared_ptr<Program>> programs_;
};
