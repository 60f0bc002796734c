// The whole of a critic's loss with its weight gradients, without a word of Python but the critic's own, where its
// program is known: gpkernels/critic/run.py says what is done, and does the rest.
#include "shelf.h"

#include <ATen/SequenceNumber.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "direct.h"
#include "graph.h"
#include "program.h"

namespace {

// One call of the critic. start: the number of the first node that is its own.
struct Called {
  std::vector<at::Tensor> outputs;
  at::Tensor x;
  uint64_t start;
};

// What a program gave. leaves: those of the graph, each once, whose gradients come after the values in results.
struct Done {
  std::vector<at::Tensor> results, leaves;
};

constexpr size_t kValues = 4;

// Null unless it is a tensor of PyTorch's own class, on a device that has memory.
const at::Tensor* plain(const py::handle& x) {
  if (!THPVariable_CheckExact(x.ptr())) return nullptr;
  const at::Tensor& found = THPVariable_Unpack(x.ptr());
  const bool is_plain = found.defined() && !found.is_inference() && !at::isTensorSubclassLike(found) &&
                        (found.is_cpu() || found.is_cuda());
  return is_plain ? &found : nullptr;
}

// Whether a mode or a transform is on, which has to see every call. Autocast need not be: programs run without it.
bool is_seen() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet autocast = c10::autocast_dispatch_keyset;
  return keys.included_ != c10::default_included_set ||
         (keys.excluded_ | autocast) != (c10::default_excluded_set | autocast);
}

// Points between two batches: gpkernels' own op.
class Mixer {
 public:
  Mixer() : op_(c10::Dispatcher::singleton().findSchemaOrThrow("gpkernels::interpolate", "")) {}

  at::Tensor operator()(const at::Tensor& real, const at::Tensor& fake, const at::Tensor& eps) const {
    torch::jit::Stack stack{real, fake, eps};
    op_.callBoxed(stack);
    return std::move(stack[0]).toTensor();
  }

 private:
  c10::OperatorHandle op_;
};

// Programs by all that they depend on.
class Shelf {
 public:
  Shelf(const py::dict& rules, size_t capacity) : reader_(rules), capacity_(capacity) {}

  // Calls the critic with each batch and goes through the passes. tensors: fake, real, and where the gradient is
  // penalised, each a tensor, None or (real, fake, eps) for points between them; batches: places among these, for each
  // call; moves: whether the gradient at a batch is wanted. log: what was watched of one of as many rows as a part has.
  // of: the place of the value that gets the gradients. Gives the values; else (what came of the calls, key or None);
  // None, before anything is called, where it is not for here.
  py::object step(const py::object& critic, const py::tuple& tensors, const std::vector<std::vector<size_t>>& batches,
                  const std::vector<bool>& moves, const std::shared_ptr<Log>& log, bool pools, const py::tuple& args,
                  const py::dict& kwargs, int64_t tag, double weight, size_t of) {
    if (is_seen() || !at::GradMode::is_enabled()) return py::none();
    std::vector<at::Tensor> parts;
    for (const py::handle& given : tensors) parts.push_back(part(given));
    for (const size_t scored : {0, 1})
      if (parts.at(scored).defined() && parts[scored].requires_grad()) return py::none();
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < batches.size(); ++i) {
      inputs.push_back(batch(parts, batches[i], moves[i]));
      if (!inputs.back().defined() || inputs.back().requires_grad() != moves[i]) return py::none();
    }
    parts.clear();
    py::list made;
    std::vector<Called> calls;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor& x = inputs[i];
      const uint64_t start = at::sequence_number::peek();
      const int64_t rows = x.size(0) / int64_t(batches[i].size());
      const py::object output = called(critic, x, rows, log, args, kwargs);
      made.append(py::make_tuple(output, wrapped(x), start));
      std::vector<at::Tensor> outputs = outputs_of(output);
      const bool fit =
          !outputs.empty() && (pools || outputs[0].numel() >= x.size(0)) && (!moves[i] || outputs[0].requires_grad());
      if (!fit) return py::make_tuple(made, py::none());
      calls.push_back({std::move(outputs), x, start});
    }
    Key key;
    key.number(tag);
    std::optional<Done> done = finish(
        calls,
        [&made, &inputs] {
          made.attr("clear")();
          inputs.clear();
        },
        constant(weight, inputs[0]), constant(1.0, inputs[0]), key);
    if (!done) return py::make_tuple(made, py::bytes(key.bytes()));
    std::vector<at::Tensor>& results = done->results;
    std::vector<at::Tensor> gradients, to;
    for (size_t i = 0; i < done->leaves.size(); ++i)
      if (at::Tensor& gradient = results[kValues + i]; gradient.defined()) {
        gradients.push_back(std::move(gradient));
        to.push_back(done->leaves[i]);
      }
    results.resize(kValues);
    for (at::Tensor& value : results)
      if (!value.defined()) value = at::zeros_like(results[of]);
    if (!to.empty()) {
      const at::AutoGradMode enabled(true);
      at::Tensor value = std::move(results[of]);
      results[of] = delivered(value, std::move(gradients), to);
    }
    return py::tuple(listed(results));
  }

  // The same of calls that were made, [(outputs, the batch, the number of the first node)]: results and leaves, or the
  // key; None where something looks on.
  py::object run(const py::list& passes, int64_t tag, const at::Tensor& weight, const at::Tensor& unit) const {
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
    const std::optional<Done> done = finish(calls, let_go, weight, unit, key);
    if (!done) return py::bytes(key.bytes());
    return py::make_tuple(listed(done->results), listed(done->leaves));
  }

  // The tensors at which a graph ends; handles where that is an older node.
  py::list leaves(const std::vector<at::Tensor>& outputs, uint64_t start) const {
    return listed(read(outputs, start).leaves);
  }

  // Whether hooks have to be called on the way back.
  bool hooked(const std::vector<at::Tensor>& outputs, uint64_t start) const { return read(outputs, start).hooked; }

  // Whether a node of dropout scales what it keeps.
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

  // A floating-point batch; undefined where it is none that plain calls can take. A tuple is of points between two.
  at::Tensor part(const py::handle& given) const {
    if (!PyTuple_Check(given.ptr())) {
      const at::Tensor* x = plain(given);
      return x && is_batch(*x) ? *x : at::Tensor();
    }
    const at::Tensor *real = plain(PyTuple_GET_ITEM(given.ptr(), 0)), *fake = plain(PyTuple_GET_ITEM(given.ptr(), 1)),
                     *eps = plain(PyTuple_GET_ITEM(given.ptr(), 2));
    if (!real || !fake || !eps || !is_batch(*real) || !alike(*real, *fake) || eps->device() != real->device())
      return {};
    const bool fits = is_floating(*eps) && eps->numel() == real->size(0) && eps->dim() &&
                      eps->size(0) == eps->numel() && (eps->dim() == 1 || eps->dim() == real->dim());
    if (!fits) return {};
    const at::NoGradGuard no_graph;
    return mix_(real->detach(), fake->detach(), eps->detach());
  }

  static bool is_floating(const at::Tensor& x) {
    const at::ScalarType type = x.scalar_type();
    return x.layout() == at::kStrided &&
           (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16);
  }
  static bool is_batch(const at::Tensor& x) { return is_floating(x) && x.dim() && x.size(0); }
  static bool alike(const at::Tensor& a, const at::Tensor& b) {
    return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device() &&
           a.layout() == b.layout();
  }

  // One after the other, a leaf where it moves; undefined where some part of it is, or they differ.
  static at::Tensor batch(const std::vector<at::Tensor>& parts, const std::vector<size_t>& places, bool moves) {
    const at::NoGradGuard no_graph;
    const c10::impl::ExcludeDispatchKeyGuard plainly(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> rows;
    for (const size_t place : places) {
      const at::Tensor& x = parts.at(place);
      if (!x.defined() || (!rows.empty() && !alike(x, rows[0]))) return {};
      rows.push_back(x);
    }
    if (rows.size() == 1 && !moves) return rows[0];
    const at::Tensor x = rows.size() == 1 ? rows[0].detach() : at::cat(rows);
    return moves ? x.set_requires_grad(true) : x;
  }

  // A number as a tensor that nobody writes to, as wide as losses of such a batch are.
  at::Tensor constant(double value, const at::Tensor& like) {
    const at::ScalarType wide = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const std::tuple<double, at::ScalarType, at::Device> name{value, wide, like.device()};
    for (const auto& [known, number] : constants_)
      if (known == name) return number;
    if (constants_.size() >= 16) constants_.clear();
    constants_.emplace_back(name, at::full({}, value, like.options().dtype(wide).requires_grad(false)));
    return constants_.back().second;
  }

  static py::object called(const py::object& critic, const at::Tensor& x, int64_t rows, const std::shared_ptr<Log>& log,
                           const py::tuple& args, const py::dict& kwargs) {
    const at::AutoGradMode enabled(true);
    if (!log) return critic(wrapped(x), *args, **kwargs);
    const py::object check = py::cast(Check(log, rows, x.size(0)));
    py::object output;
    {
      const Looking looking(check);
      output = critic(wrapped(x), *args, **kwargs);
    }
    check.cast<Check&>().finish();
    return output;
  }

  // Scores, and features where there are any; empty where there are no scores.
  static std::vector<at::Tensor> outputs_of(const py::object& output) {
    std::vector<at::Tensor> found;
    if (THPVariable_Check(output.ptr())) {
      found.push_back(THPVariable_Unpack(output.ptr()));
    } else if (PyTuple_Check(output.ptr()) || PyList_Check(output.ptr())) {
      const py::sequence items = py::reinterpret_borrow<py::sequence>(output);
      for (size_t i = 0; i < std::min<size_t>(2, items.size()); ++i) {
        const py::object item = items[i];
        if (!THPVariable_Check(item.ptr())) break;
        found.push_back(THPVariable_Unpack(item.ptr()));
      }
    }
    return found;
  }

  // Runs the program, if there is one. let_go: drops Python's hold on the calls; each tensor goes when it has been
  // read.
  template <typename LetGo>
  std::optional<Done> finish(std::vector<Called>& calls, const LetGo& let_go, const at::Tensor& weight,
                             const at::Tensor& unit, Key& key) const {
    Done done;
    std::vector<at::Tensor> given{weight, unit};
    std::unordered_map<const c10::TensorImpl*, int64_t> numbers;
    for (const Called& one : calls) {
      Reader::Found found;
      reader_.read_into(one.outputs, one.start, key, found);
      key.number(found.hooked);
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
    const std::shared_ptr<Program> program = known->second;  // another thread may clear the shelf
    let_go();
    calls.clear();
    done.results = program->run(std::move(given));
    return done;
  }

  const Reader reader_;
  const size_t capacity_;
  const Mixer mix_;
  std::vector<std::pair<std::tuple<double, at::ScalarType, at::Device>, at::Tensor>> constants_;
  std::unordered_map<std::string, std::shared_ptr<Program>> programs_;
};

}  // namespace

void add_shelf(pybind11::module_& module) {
  py::class_<Log, std::shared_ptr<Log>>(module, "Log").def(py::init<py::list, py::object>());
  py::class_<Check>(module, "Check")
      .def("__torch_function__", &Check::torch_function, py::arg(), py::arg(), py::arg() = py::tuple(),
           py::arg() = py::none());
  py::class_<Shelf>(module, "Shelf")
      .def(py::init<py::dict, size_t>())
      .def("step", &Shelf::step)
      .def("run", &Shelf::run)
      .def("leaves", &Shelf::leaves)
      .def("hooked", &Shelf::hooked)
      .def("trains", &Shelf::trains)
      .def("add", &Shelf::add)
      .def("clear", &Shelf::clear);
}
