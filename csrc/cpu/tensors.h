// What the CPU ops share: layouts, allocation, dtype dispatch and tiles over threads.
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

// One binary, several instruction sets: the loader picks the clone that the machine can run.
#ifdef GPK_TARGET_CLONES
#define GPK_SIMD __attribute__((target_clones(GPK_TARGET_CLONES)))
#else
#define GPK_SIMD
#endif

namespace gpk::cpu {

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

// A cotangent, coefficient or eps may come in any float dtype or stride; these vectors have one number per row.
template <typename A>
std::vector<A> small_vector(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  std::vector<A> values(dense.numel());
  dispatch(dense, [&](auto zero) {
    using T = decltype(zero);
    std::transform(data<T>(dense), data<T>(dense) + values.size(), values.begin(), [](T v) { return A(v); });
  });
  return values;
}

inline uint64_t philox_key(const Tensor& key) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.numel() == 1, "key: expected one int64");
  return uint64_t(*data<int64_t>(key));
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

// channels_last where every tensor is so, otherwise contiguous: as ops.memory_format.
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

// --- allocation -------------------------------------------------------------------------------------------------

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor empty_like(const Tensor& x, MemoryFormat format) {
  const std::vector<int64_t> sizes = sizes_of(x);
  return empty_strided(sizes, dense_strides(sizes, format), dtype_code(x));
}

inline Tensor nothing_like(const Tensor& x) { return empty_strided({0}, {1}, dtype_code(x)); }

// A scalar or one number per row, in the accumulation dtype of x, rounded once from double.
inline Tensor from_doubles(const Tensor& x, const double* values, int64_t count, bool scalar = false) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor out = scalar ? empty_strided({}, {}, dtype) : empty_strided({count}, {1}, dtype);
  if (wide)
    std::copy(values, values + count, mutable_data<double>(out));
  else
    std::copy(values, values + count, mutable_data<float>(out));
  return out;
}

// Neumaier's compensated sum: a mean over many rows loses no digits.
class Sum {
 public:
  void operator+=(double x) {
    const double next = sum_ + x;
    lost_ += std::fabs(sum_) >= std::fabs(x) ? (sum_ - next) + x : (x - next) + sum_;
    sum_ = next;
  }
  double value() const { return std::isfinite(sum_) ? sum_ + lost_ : sum_; }

 private:
  double sum_ = 0, lost_ = 0;
};

// --- rows and tiles ---------------------------------------------------------------------------------------------

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

inline void check_per_row(const char* name, const Tensor& x, Shape shape) {
  STD_TORCH_CHECK(x.numel() == shape.rows, name, ": expected one number per row");
}

constexpr int64_t kTile = 32768;  // elements that one task reads: large enough to pay for a thread, small enough for L2

inline int64_t tiles_per_row(Shape shape) { return std::max<int64_t>(1, (shape.cols + kTile - 1) / kTile); }

// Calls f(begin, end) over [0, count) in parallel where there is work for more than one thread.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= grain)
    f(int64_t(0), count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

// Calls f(row_begin, row_end, col_begin, col_end): many whole rows at once, or one tile of a long row. Tiles depend on
// the shape alone, so sums over them have the same bits for any number of threads.
template <typename F>
void for_tiles(Shape shape, const F& f) {
  const int64_t tiles = tiles_per_row(shape);
  if (tiles == 1) {
    const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, shape.cols));
    parallel(shape.rows, grain, [&](int64_t begin, int64_t end) { f(begin, end, int64_t(0), shape.cols); });
    return;
  }
  parallel(shape.rows * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, col = task % tiles * kTile;
      f(row, row + 1, col, std::min(col + kTile, shape.cols));
    }
  });
}

// Per-row sums: partial(row, begin, end) over tiles, added in a fixed order.
template <typename F>
std::vector<double> sum_rows(Shape shape, const F& partial) {
  const int64_t tiles = tiles_per_row(shape);
  std::vector<double> partials(shape.rows * tiles);
  for_tiles(shape, [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    for (int64_t row = row_begin; row < row_end; ++row)
      partials[row * tiles + begin / kTile] = partial(row, begin, end);
  });
  if (tiles == 1) return partials;
  std::vector<double> sums(shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t tile = 0; tile < tiles; ++tile) sums[row] += partials[row * tiles + tile];
  return sums;
}

}  // namespace gpk::cpu
