// Shared parts of the CPU ops: small tensors, sums, and tiles over threads.
#pragma once

#include "../tensors.h"
#include "memory.h"

namespace gpk::cpu {

// --- small tensors ----------------------------------------------------------------------------------------------

// Copies a cotangent, coefficient or eps of any floating-point dtype and strides; one number per row at most.
template <typename A>
std::vector<A> small_vector(const Tensor& x) {
  const Tensor dense = in_format(x, MemoryFormat::Contiguous);
  std::vector<A> values(dense.numel());
  dispatch(dense, [&](auto zero) {
    using T = decltype(zero);
    std::transform(data<T>(dense), data<T>(dense) + values.size(), values.begin(), [](T v) { return A(v); });
  });
  return values;
}

// A scalar or one number per row, in the accumulation dtype of x, rounded once from double.
inline Tensor from_doubles(const Tensor& x, const double* values, int64_t count, bool scalar = false) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor out = scalar ? empty_strided(x, {}, {}, dtype) : empty_strided(x, {count}, {1}, dtype);
  if (wide)
    std::copy(values, values + count, mutable_data<double>(out));
  else
    std::copy(values, values + count, mutable_data<float>(out));
  return out;
}

// Allocates an uninitialised result.
inline Tensor result_like(const Tensor& x, MemoryFormat format) {
  const Tensor out = empty_like(x, format);
  advise_large_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
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

constexpr int64_t kTile = 32768;  // elements per task: large enough to amortise a thread, small enough for L2

inline int64_t tiles_per_row(Shape shape) { return std::max<int64_t>(1, (shape.cols + kTile - 1) / kTile); }

// Calls f(begin, end) over [0, count), in parallel if there is more than one grain.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  const auto task = [&](int64_t begin, int64_t end) {
    f(begin, end);
    finish_streams();
  };
  if (count <= grain)
    task(0, count);
  else
    torch::stable::parallel_for(0, count, grain, task);
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
  for (int64_t row = 0; row < shape.rows; ++row) {
    Sum sum;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partials[row * tiles + tile];
    sums[row] = sum.value();
  }
  return sums;
}

}  // namespace gpk::cpu
