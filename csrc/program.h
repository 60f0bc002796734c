#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/python_headers.h>

#include <optional>
#include <utility>
#include <vector>

// An argument: a tensor or several by slot (-1: None), or a constant.
struct Argument {
  enum class Kind { kSlot, kTensors, kMaybeTensors, kConstant } kind;
  std::vector<int> slots;
  c10::IValue constant;
};

// Converts tensors to Python, undefined ones to None.
pybind11::object wrapped(const at::Tensor& x);
pybind11::list listed(const std::vector<at::Tensor>& tensors);

// Geometry of a view of the first argument, valid for the recorded layout.
struct Alias {
  std::vector<int64_t> base_sizes, base_strides, sizes, strides;
  int64_t offset;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<int> results;  // slots; -1: unused, or an argument
  std::vector<int> frees;    // slots to free after the call
  std::optional<Alias> alias;
};

// A list of calls and the loop that runs it, or a Python function in its place.
class Program {
 public:
  Program(const pybind11::list& calls, std::vector<int> inputs, std::vector<int> outputs,
          std::vector<std::vector<int>> frees, const pybind11::object& slot_type);
  // function: gives a list for a list, which it empties.
  explicit Program(pybind11::function function);

  // Returns the outputs, None for -1. The list of inputs is emptied: tensors are freed after their last use.
  pybind11::list run(const pybind11::list& given) const;
  // The same, releasing the GIL; undefined for -1.
  std::vector<at::Tensor> run(std::vector<at::Tensor> given) const;
  // Whether a backend that is forced may change what is run.
  bool has_backends() const { return has_backends_; }

 private:
  std::vector<at::Tensor> call(std::vector<at::Tensor> given) const;
  void add(const pybind11::tuple& call, std::vector<int> frees, const pybind11::object& slot_type);

  std::vector<Call> calls_;
  std::vector<int> inputs_, outputs_;
  int count_ = 0;
  bool has_backends_ = false;
  std::optional<pybind11::function> function_;
};
