// Steps and penalties that are made once more: native part of gpkernels/critic/settled.py. What surrounds the calls of
// the critic in Python, and checks what cannot have changed, costs more than a small critic.
#include "settled.h"

#include <ATen/ops/rand.h>
#include <ATen/ops/repeat_interleave.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "shelf.h"

namespace {

// Where the samples of a penalty are: scored with others, the real ones, between these and the fake ones, or made by
// Python.
enum class At : int64_t { kScored, kReal, kBetween, kMade };

// Whether an option is what it was. Those of before are numbers, strings, None, or a dictionary of such, copied.
bool is_same(const py::handle& before, const py::handle& now) {
  if (Py_TYPE(before.ptr()) != Py_TYPE(now.ptr())) return false;
  if (before.is(now) && !PyDict_Check(now.ptr())) return true;
  const int found = PyObject_RichCompareBool(before.ptr(), now.ptr(), Py_EQ);
  if (found < 0) throw py::error_already_set();
  return found;
}

// An attribute, None where there is none.
py::object attribute(const py::handle& object, const Name& name) {
  if (PyCode_Check(object.ptr())) return py::none();
  py::object found = name.of_or_null(object);
  if (found) return found;
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  return py::none();
}

// Arguments of a step or a penalty. fake: null for a penalty at given points; eps: null if it is to be drawn.
struct Given {
  const at::Tensor *real, *fake, *eps;
};

// How a call was made, with everything that decided that.
class Settled {
 public:
  // owner: of the critic; itself: whether it is the critic. like: the real samples or the points, which the next ones
  // have the dtype and the device of; fake: None for a penalty; options: of the function; most: elements of a batch
  // that is left to autograd, at most; small: bytes of a real batch up to which steps are made like this, 0: any
  // number; points: places of the penalties' samples; make: makes them where Python does; names: of penalties that are
  // returned by name, or None; parts: type of a step's result, or None for a penalty.
  Settled(std::shared_ptr<const Surroundings> surroundings, std::shared_ptr<Shelf> shelf, const py::object& owner,
          bool itself, const at::Tensor& like, const std::optional<at::Tensor>& fake, py::tuple options, bool further,
          std::variant<How, Left> how, std::shared_ptr<Log> log, std::vector<double> weights, int64_t most,
          int64_t small, std::vector<int64_t> points, py::object make, int64_t pack, py::object names, py::object parts)
      : surroundings_(std::move(surroundings)),
        shelf_(std::move(shelf)),
        owner_(py::weakref(owner)),
        itself_(itself),
        training_(attribute(owner, name_)),
        options_(std::move(options)),
        type_(like.scalar_type()),
        device_(like.device()),
        autocasts_(Surroundings::autocasts(like)),
        paired_(fake && fake->sizes() == like.sizes()),
        further_(further),
        how_(std::move(how)),
        log_(std::move(log)),
        weights_(std::move(weights)),
        most_(most),
        small_(small),
        is_small_(int64_t(like.nbytes()) < small),
        make_(std::move(make)),
        pack_(pack),
        names_(std::move(names)),
        parts_(std::move(parts)),
        compiled_(surroundings_->compiled()) {
    for (const int64_t at : points) points_.push_back(At(at));
  }

  // Returns the result; (points of the penalties, calls that were made, key) for Python to continue, both None where
  // one batch of all samples failed; or None, before anything is drawn or called, where something differs. eps: None
  // if it is to be drawn.
  py::object again(const py::object& critic, const py::tuple& options, const py::object& real, const py::object& fake,
                   const py::object& eps, const py::object& args, const py::object& kwargs) const {
    HANDLE_TH_ERRORS
    if (!PyTuple_CheckExact(args.ptr()) || !(kwargs.is_none() || PyDict_CheckExact(kwargs.ptr()))) return py::none();
    const bool further = PyTuple_GET_SIZE(args.ptr()) != 0 || (!kwargs.is_none() && PyDict_GET_SIZE(kwargs.ptr()) != 0);
    const std::optional<Given> given = this->given(real, fake, eps);
    if (!given || further != further_ || !is_next(critic, options, *given)) return py::none();
    std::optional<std::vector<at::Tensor>> points = this->points(*given);
    if (!points) return py::none();
    std::vector<at::Tensor> parts(2);
    if (!parts_.is_none()) parts = {*given->fake, *given->real};
    for (size_t i = 0; i < points_.size(); ++i) parts.push_back(part(points_[i], *given, (*points)[i]));
    const auto left = [&](const Outcome& outcome) {
      return py::make_tuple(listed(*points), outcome.made, outcome.key);
    };
    const py::tuple more = py::reinterpret_borrow<py::tuple>(args);
    const py::dict named = kwargs.is_none() ? py::dict() : py::reinterpret_borrow<py::dict>(kwargs);
    try {
      const Outcome outcome = made(critic, parts, more, named);
      return outcome.values.empty() ? left(outcome) : result(outcome.values);
    } catch (py::error_already_set& error) {
      if (!is_one_batch() || !(log_->is_difference(error) || error.matches(PyExc_Exception))) throw;
    } catch (python_error& error) {  // of the critic, through autograd
      if (!is_one_batch() || !PyErr_GivenExceptionMatches(error.type, PyExc_Exception)) throw;
    } catch (const std::exception&) {
      if (!is_one_batch()) throw;
    }
    return py::make_tuple(listed(*points), py::none(), py::none());
    END_HANDLE_TH_ERRORS_PYBIND
  }

  // Whether the critic is gone.
  bool is_void() const { return owner_().is_none(); }

 private:
  bool is_one_batch() const { return log_ && std::holds_alternative<How>(how_); }

  // The tensors, if they are plain batches.
  std::optional<Given> given(const py::object& real, const py::object& fake, const py::object& eps) const {
    Given found{plain(real), plain(fake), plain(eps)};
    if (!found.real || (!found.fake && !fake.is_none()) || (!found.eps && !eps.is_none())) return std::nullopt;
    if (!Caller::is_batch(*found.real) || (found.fake && !Caller::is_batch(*found.fake))) return std::nullopt;
    return found;
  }

  bool is_next(const py::object& critic, const py::tuple& options, const Given& given) const {
    const at::Tensor& real = *given.real;
    const py::object owner = surroundings_->owner_of(critic);
    if (owner.is(critic) != itself_ || !owner_().is(owner) || !attribute(owner, name_).is(training_)) return false;
    if (options.size() != options_.size()) return false;
    for (size_t i = 0; i < options_.size(); ++i)
      if (!is_same(options_[i], options[i])) return false;
    if (real.scalar_type() != type_ || real.device() != device_ || (pack_ > 1 && real.size(0) % pack_)) return false;
    if (most_ && real.numel() > most_) return false;
    if (small_ && (int64_t(real.nbytes()) < small_) != is_small_) return false;
    if (given.fake) {
      const at::Tensor& fake = *given.fake;
      if (fake.scalar_type() != type_ || fake.device() != device_ || (real.sizes() == fake.sizes()) != paired_)
        return false;
      if (pack_ > 1 && fake.size(0) % pack_) return false;
      if (!parts_.is_none() && (real.requires_grad() || fake.requires_grad())) return false;
    }
    if (!at::GradMode::is_enabled() || Surroundings::autocasts(real) != autocasts_) return false;
    return surroundings_->are_usual() && surroundings_->compiled().is(compiled_);
  }

  // What is drawn or made for each penalty: the weights of interpolates, or the points; empty if eps does not fit.
  std::optional<std::vector<at::Tensor>> points(const Given& given) const {
    const at::Tensor& real = *given.real;
    const int64_t rows = real.size(0) / std::max<int64_t>(pack_, 1);
    std::vector<at::Tensor> found;
    for (const At at : points_)
      if (at == At::kBetween && given.eps && !Caller::weighs(*given.eps, real, rows)) return std::nullopt;
    for (const At at : points_) {
      at::Tensor x;
      if (at == At::kMade) x = THPVariable_Unpack(make_(wrapped(real)).ptr());
      if (at == At::kBetween) {
        x = given.eps ? *given.eps : drawn(real, rows);
        if (pack_ > 1) x = at::repeat_interleave(x, pack_, 0);
      }
      found.push_back(std::move(x));
    }
    return found;
  }

  // One weight per sample or pack: gpkernels/ops/interpolate.py, draw_eps.
  static at::Tensor drawn(const at::Tensor& real, int64_t rows) {
    std::vector<int64_t> sizes(size_t(real.dim()), 1);
    sizes[0] = rows;
    const at::ScalarType wide = real.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return at::rand(sizes, real.options().dtype(wide).requires_grad(false));
  }

  // The samples of a penalty; undefined if they are scored ones.
  at::Tensor part(At at, const Given& given, const at::Tensor& made) const {
    switch (at) {
      case At::kReal: return *given.real;
      case At::kBetween: return shelf_->caller().mixed(*given.real, *given.fake, made);
      case At::kMade: return made;
      default: return {};
    }
  }

  Outcome made(const py::object& critic, const std::vector<at::Tensor>& parts, const py::tuple& args,
               const py::dict& kwargs) const {
    if (const Left* left = std::get_if<Left>(&how_)) {
      const std::vector<at::Tensor> inputs = Caller::batches(parts, left->places, left->moves);
      return inputs.empty() ? Outcome() : shelf_->by_autograd(critic, inputs, *left, args, kwargs);
    }
    const How& how = std::get<How>(how_);
    std::vector<at::Tensor> inputs = Caller::batches(parts, how.places, how.moves);
    return inputs.empty() ? Outcome() : shelf_->step(critic, std::move(inputs), how, log_, args, kwargs, weights_);
  }

  // The value of a penalty, or a step's parts: CriticLossParts of gpkernels/critic/parts.py.
  py::object result(const std::vector<at::Tensor>& values) const {
    if (parts_.is_none()) return wrapped(values[0]);
    py::object penalty;
    if (!names_.is_none()) {
      py::dict named;
      size_t at = kValues;
      for (const py::handle& name : names_) named[name] = wrapped(values.at(at++));
      penalty = std::move(named);
    } else {
      penalty = wrapped(values.size() > kValues ? values[kValues] : at::zeros_like(values[1]));
    }
    const py::tuple parts = py::make_tuple(wrapped(values[0]), wrapped(values[1]), penalty, wrapped(values[2]));
    PyObject* found =
        PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(parts_.ptr()), py::make_tuple(parts).ptr(), nullptr);
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }

  const Name name_{"training"};
  const std::shared_ptr<const Surroundings> surroundings_;
  const std::shared_ptr<Shelf> shelf_;
  const py::weakref owner_;
  const bool itself_;
  const py::object training_;
  const py::tuple options_;
  const at::ScalarType type_;
  const at::Device device_;
  const bool autocasts_, paired_, further_;
  const std::variant<How, Left> how_;
  const std::shared_ptr<Log> log_;
  const std::vector<double> weights_;
  const int64_t most_, small_;
  const bool is_small_;
  std::vector<At> points_;
  const py::object make_;
  const int64_t pack_;
  const py::object names_, parts_, compiled_;
};

// The last calls of a function.
class Memory {
 public:
  // As Settled::again.
  py::object again(const py::object& critic, const py::tuple& options, const py::object& real, const py::object& fake,
                   const py::object& eps, const py::object& args, const py::object& kwargs) {
    for (size_t i = 0; i < known_.size(); ++i) {
      const std::shared_ptr<const Settled> one = known_[i];
      py::object found = one->again(critic, options, real, fake, eps, args, kwargs);
      if (found.is_none()) continue;
      if (i && i < known_.size() && known_[i] == one) std::swap(known_[i], known_[i - 1]);
      return found;
    }
    return py::none();
  }

  void add(std::shared_ptr<const Settled> one) {
    known_.erase(std::remove_if(known_.begin(), known_.end(), [](const auto& x) { return x->is_void(); }),
                 known_.end());
    if (known_.size() >= kMost) known_.pop_back();
    known_.insert(known_.begin(), std::move(one));
  }

 private:
  static constexpr size_t kMost = 8;
  std::vector<std::shared_ptr<const Settled>> known_;
};

}  // namespace

void add_settled(py::module_& module) {
  py::class_<Surroundings, std::shared_ptr<Surroundings>>(module, "Surroundings")
      .def(py::init<py::tuple, std::string, py::tuple, py::tuple, py::object, py::object, std::string, py::object,
                    py::object>());
  py::class_<Settled, std::shared_ptr<Settled>>(module, "Settled")
      .def(py::init<std::shared_ptr<Surroundings>, std::shared_ptr<Shelf>, py::object, bool, at::Tensor,
                    std::optional<at::Tensor>, py::tuple, bool, std::variant<How, Left>, std::shared_ptr<Log>,
                    std::vector<double>, int64_t, int64_t, std::vector<int64_t>, py::object, int64_t, py::object,
                    py::object>())
      .def("again", &Settled::again);
  py::class_<Memory>(module, "Memory").def(py::init<>()).def("again", &Memory::again).def("add", &Memory::add);
}
