// What the host side of all ops shares: dtype dispatch, layouts, allocation, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace gpk {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- dtypes -----------------------------------------------------------------------------------------------------

template <typename F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(c10::Half{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    default: STD_TORCH_CHECK(false, "expected a floating-point tensor");
  }
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// --- layouts ----------------------------------------------------------------------------------------------------

inline MemoryFormat channels_last_of(const Tensor& x) {
  if (x.dim() == 4) return MemoryFormat::ChannelsLast;
  return x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous;
}

// Dense strides of a shape, in contiguous or channels-last order.
inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, MemoryFormat format) {
  const int64_t dims = int64_t(sizes.size());
  std::vector<int64_t> strides(dims);
  int64_t step = 1;
  auto place = [&](int64_t dim) {
    strides[dim] = step;
    step *= std::max<int64_t>(sizes[dim], 1);
  };
  if (format == MemoryFormat::Contiguous) {
    for (int64_t dim = dims - 1; dim >= 0; --dim) place(dim);
  } else {
    place(1);
    for (int64_t dim = dims - 1; dim >= 2; --dim) place(dim);
    place(0);
  }
  return strides;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

inline bool laid_out(const Tensor& x, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return x.is_contiguous();
  if (x.numel() == 0) return false;
  const std::vector<int64_t> strides = dense_strides(sizes_of(x), format);
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    if (x.size(dim) != 1 && x.stride(dim) != strides[dim]) return false;
  return true;
}

// channels_last where every tensor is so, otherwise contiguous: as in gpkernels/ops/tensors.py.
inline MemoryFormat common_format(std::initializer_list<const Tensor*> tensors) {
  auto all = [&](MemoryFormat format) {
    return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) { return laid_out(*t, format); });
  };
  const MemoryFormat other = channels_last_of(**tensors.begin());
  return all(MemoryFormat::Contiguous) || !all(other) ? MemoryFormat::Contiguous : other;
}

inline Tensor in_format(const Tensor& x, MemoryFormat format) {
  return laid_out(x, format) ? x : torch::stable::contiguous(x, format);
}

// True where a tensor fills its span of memory with no gap and no overlap, in any order of its axes.
inline bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    if (x.size(dim) != 1) axes.emplace_back(x.stride(dim), x.size(dim));
  std::sort(axes.begin(), axes.end());
  int64_t step = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != step) return false;
    step *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) { return a.strides().equals(b.strides()); }

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // PyTorch before 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// --- allocation -------------------------------------------------------------------------------------------------

inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            int32_t dtype) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, type, index, &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_like(const Tensor& x, MemoryFormat format) {
  const std::vector<int64_t> sizes = sizes_of(x);
  return empty_strided(x, sizes, dense_strides(sizes, format), dtype_code(x));
}

inline Tensor nothing_like(const Tensor& x) { return empty_strided(x, {0}, {1}, dtype_code(x)); }

// --- checks -----------------------------------------------------------------------------------------------------

struct Shape {
  int64_t rows, cols;
};

inline Shape rows_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(0) > 0, name, ": expected a batch of at least one sample");
  return {x.size(0), x.numel() / x.size(0)};
}

inline void check_same(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": dtypes differ");
  STD_TORCH_CHECK(x.sizes().equals(like.sizes()), name, ": shapes differ");
}

inline void check_list(const char* name, const std::vector<Tensor>& tensors, const std::vector<Tensor>& params,
                       bool optional) {
  if (optional && tensors.empty()) return;
  STD_TORCH_CHECK(tensors.size() == params.size(), name, ": expected one for each parameter");
  for (size_t i = 0; i < params.size(); ++i) check_same(name, tensors[i], params[i]);
}

// Of an enumeration that starts at 0.
inline void check_code(const char* name, int64_t code, int64_t last) {
  STD_TORCH_CHECK(code >= 0 && code <= last, name, ": expected 0 to ", last, ", got ", code);
}

// With a kind, of an enumeration, and a target for each tensor.
inline void check_scores(const std::vector<Tensor>& scores, const std::vector<int64_t>& kinds,
                         const std::vector<double>& targets, int64_t last_kind) {
  STD_TORCH_CHECK(!scores.empty(), "scores: expected at least one tensor");
  STD_TORCH_CHECK(kinds.size() == scores.size(), "kinds: expected one for each tensor of scores");
  STD_TORCH_CHECK(targets.size() == scores.size(), "targets: expected one for each tensor of scores");
  for (const int64_t kind : kinds) check_code("kinds", kind, last_kind);
  for (const Tensor& s : scores) STD_TORCH_CHECK(s.numel() > 0, "scores: expected at least one");
}

inline void check_paired(const Tensor& real_scores, const Tensor& fake_scores) {
  STD_TORCH_CHECK(real_scores.numel() > 0, "real_scores: expected at least one");
  check_same("fake_scores", fake_scores, real_scores);
}

inline void check_per_row(const char* name, const Tensor& x, Shape shape) {
  STD_TORCH_CHECK(x.numel() == shape.rows, name, ": expected one number per row");
}

}  // namespace gpk
