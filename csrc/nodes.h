// What rules read of the commonest of autograd's nodes. Python has it as attributes, each of which makes an object.
#pragma once
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "key.h"

using Attributes = std::vector<std::string>;

inline void add(const c10::SymInt& x, Key& key) { key.number(x.guard_int(__FILE__, __LINE__)); }
inline void add(int64_t x, Key& key) { key.number(x); }
inline void add(bool x, Key& key) { key.number(x); }
inline void add(const at::Scalar& x, Key& key) {
  key.number(int64_t(x.type()));
  key.real(x.toComplexDouble().real());
  key.real(x.toComplexDouble().imag());
}
inline void add(const std::vector<c10::SymInt>& x, Key& key) {
  key.number(int64_t(x.size()));
  for (const c10::SymInt& n : x) add(n, key);
}

// How to read one kind of node.
struct Typed {
  Attributes saved, constants;  // in Python
  // The variables that were saved, whose constants go into the key; false where the node is of another class.
  std::function<bool(const torch::autograd::Node&, std::vector<const torch::autograd::SavedVariable*>&, Key&)> read;
};

template <typename N, typename T>
struct Field {
  const char* name;
  T N::* place;
};
template <typename N, typename T>
Field(const char*, T N::*) -> Field<N, T>;

template <typename N, typename... Constants>
Typed typed(std::vector<Field<N, torch::autograd::SavedVariable>> saved, Field<N, Constants>... constants) {
  Attributes names;
  for (const auto& field : saved) names.emplace_back(field.name);
  const auto read = [=](const torch::autograd::Node& node, std::vector<const torch::autograd::SavedVariable*>& found,
                        Key& key) {
    const auto* own = dynamic_cast<const N*>(&node);
    if (!own) return false;
    for (const auto& field : saved) found.push_back(&(own->*field.place));
    (add(own->*constants.place, key), ...);
    return true;
  };
  return {std::move(names), {constants.name...}, read};
}

// Null where rules want something else of a node than is read here.
inline const Typed* typed_of(const std::string& name, const Attributes& saved, const Attributes& constants) {
  namespace own = torch::autograd::generated;
#define SAVED(node, name) Field{"_saved_" #name, &own::node::name##_}
#define CONSTANT(node, name) \
  Field { "_saved_" #name, &own::node::name }
  static const std::map<std::string, Typed> known{
      {"AddmmBackward0", typed<own::AddmmBackward0>({SAVED(AddmmBackward0, mat1), SAVED(AddmmBackward0, mat2)},
                                                    CONSTANT(AddmmBackward0, alpha), CONSTANT(AddmmBackward0, beta))},
      {"MmBackward0", typed<own::MmBackward0>({SAVED(MmBackward0, self), SAVED(MmBackward0, mat2)})},
      {"ConvolutionBackward0",
       typed<own::ConvolutionBackward0>(
           {SAVED(ConvolutionBackward0, input), SAVED(ConvolutionBackward0, weight)},
           CONSTANT(ConvolutionBackward0, stride), CONSTANT(ConvolutionBackward0, padding),
           CONSTANT(ConvolutionBackward0, dilation), CONSTANT(ConvolutionBackward0, transposed),
           CONSTANT(ConvolutionBackward0, output_padding), CONSTANT(ConvolutionBackward0, groups))},
      {"NativeLayerNormBackward0",
       typed<own::NativeLayerNormBackward0>(
           {SAVED(NativeLayerNormBackward0, input), SAVED(NativeLayerNormBackward0, weight),
            SAVED(NativeLayerNormBackward0, result1), SAVED(NativeLayerNormBackward0, result2),
            SAVED(NativeLayerNormBackward0, bias)},
           CONSTANT(NativeLayerNormBackward0, normalized_shape))},
      {"NativeGroupNormBackward0",
       typed<own::NativeGroupNormBackward0>(
           {SAVED(NativeGroupNormBackward0, input), SAVED(NativeGroupNormBackward0, weight),
            SAVED(NativeGroupNormBackward0, result1), SAVED(NativeGroupNormBackward0, result2)},
           CONSTANT(NativeGroupNormBackward0, group))},
      {"MulBackward0", typed<own::MulBackward0>({SAVED(MulBackward0, self), SAVED(MulBackward0, other)})},
      {"ReluBackward0", typed<own::ReluBackward0>({SAVED(ReluBackward0, result)})},
      {"TanhBackward0", typed<own::TanhBackward0>({SAVED(TanhBackward0, result)})},
      {"SigmoidBackward0", typed<own::SigmoidBackward0>({SAVED(SigmoidBackward0, result)})},
      {"SiluBackward0", typed<own::SiluBackward0>({SAVED(SiluBackward0, self)})},
      {"SinBackward0", typed<own::SinBackward0>({SAVED(SinBackward0, self)})},
      {"LeakyReluBackward0",
       typed<own::LeakyReluBackward0>({SAVED(LeakyReluBackward0, self)}, CONSTANT(LeakyReluBackward0, negative_slope))},
      {"SoftplusBackward0",
       typed<own::SoftplusBackward0>({SAVED(SoftplusBackward0, self)}, CONSTANT(SoftplusBackward0, beta),
                                     CONSTANT(SoftplusBackward0, threshold))},
  };
#undef SAVED
#undef CONSTANT
  const auto found = known.find(name);
  const bool fits = found != known.end() && found->second.saved == saved && found->second.constants == constants;
  return fits ? &found->second : nullptr;
}
