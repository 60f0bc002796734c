// affine_gradients: gradients of w and b (K,) in y = x w + b, for a cotangent and an operand (R, K, I): sums of
// cotangent * operand, and of cotangent, over R and I.
#include "loops.h"

namespace gpk::cpu {
namespace {

constexpr int64_t kRows = 32, kLanes = 256;  // rows summed in the accumulation dtype before double

// I = 1: columns [begin, end), all rows.
template <typename T, typename A>
GPK_SIMD void sum_columns(const T* c, const T* x, double* products, double* sums, int64_t rows, int64_t cols,
                          int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    for (int64_t top = 0; top < rows; top += kRows) {
      A product[kLanes] = {}, sum[kLanes] = {};
      for (int64_t row = top; row < std::min(top + kRows, rows); ++row) {
        const T *from = c + row * cols + first, *by = x + row * cols + first;
        for (int64_t i = 0; i < count; ++i) {
          product[i] += A(from[i]) * A(by[i]);
          sum[i] += A(from[i]);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        products[first + i] += double(product[i]);
        sums[first + i] += double(sum[i]);
      }
    }
  }
}

template <typename T, typename A>
GPK_SIMD void sum_plane(const T* c, const T* x, double* product, double* sum, int64_t count) {
  double p = 0, s = 0;
#pragma omp simd reduction(+ : p, s)
  for (int64_t i = 0; i < count; ++i) {
    p += double(A(c[i])) * double(A(x[i]));
    s += double(A(c[i]));
  }
  *product += p;
  *sum += s;
}

std::tuple<Tensor, Tensor> affine_gradients_cpu(Tensor cotangent, Tensor operand) {
  check_affine_gradients(cotangent, operand);
  const Tensor c = torch::stable::contiguous(cotangent), x = torch::stable::contiguous(operand);
  const int64_t rows = c.size(0), cols = c.size(1), inner = c.size(2);
  std::vector<double> products(cols), sums(cols);
  dispatch(c, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const int64_t grain = std::max<int64_t>(inner == 1 ? kLanes : 1, kTile / std::max<int64_t>(1, rows * inner));
    parallel(cols, grain, [&](int64_t begin, int64_t end) {
      if (inner == 1) {
        sum_columns<T, A>(data<T>(c), data<T>(x), products.data(), sums.data(), rows, cols, begin, end);
        return;
      }
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = begin; k < end; ++k) {
          const int64_t at = (row * cols + k) * inner;
          sum_plane<T, A>(data<T>(c) + at, data<T>(x) + at, &products[k], &sums[k], inner);
        }
    });
  });
  return {from_doubles(c, products.data(), cols), from_doubles(c, sums.data(), cols)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("affine_gradients", TORCH_BOX(&affine_gradients_cpu)); }

}  // namespace gpk::cpu
