#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <utility>
#include <vector>

// An argument: a tensor by its slot, several (-1: none there), or a constant.
struct Argument {
  enum class Kind { kSlot, kTensors, kMaybeTensors, kConstant } kind;
  std::vector<int> slots;
  c10::IValue constant;
};

// A tensor in Python, None where it is undefined; and several.
pybind11::object wrapped(const at::Tensor& x);
pybind11::list listed(const std::vector<at::Tensor>& tensors);

// Where a view of the first argument lies, if that is laid out as it was.
struct Alias {
  std::vector<int64_t> base_sizes, base_strides, sizes, strides;
  int64_t offset;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int> results;  // slots; -1: nobody reads it, or it is an argument
  std::vector<int> frees;    // slots that are empty from here on
  std::optional<Alias> alias;
};

// A list of calls and the loop that runs it, or a function of Python's in its place.
class Program {
 public:
  Program(const pybind11::list& calls, std::vector<int> inputs, std::vector<int> outputs,
          std::vector<std::vector<int>> frees, const pybind11::object& slot_type);
  // function: gives a list for a list, which it empties.
  explicit Program(pybind11::function function);

  // What the outputs name of the slots, None for -1. The list is emptied: tensors are freed when nobody reads them.
  pybind11::list run(const pybind11::list& given) const;
  // The same without the GIL, which the caller has; undefined for -1.
  std::vector<at::Tensor> run(std::vector<at::Tensor> given) const;

 private:
  std::vector<at::Tensor> call(std::vector<at::Tensor> given) const;
  void add(const pybind11::tuple& call, std::vector<int> frees, const pybind11::object& slot_type);

  std::vector<Call> calls_;
  std::vector<int> inputs_, outputs_;
  int count_ = 0;
  std::optional<pybind11::function> function_;
};
