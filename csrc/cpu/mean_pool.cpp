// mean_pool: means of h x w windows that tile each plane, and the backward, which spreads a window's cotangent.
#include "tensors.h"

namespace gpk::cpu {
namespace {

// One row of windows: the sum goes through a window row by row, as PyTorch's does.
template <int64_t kWidth, typename T, typename A>
GPK_SIMD void pool_row(const T* x, T* y, int64_t h, int64_t w, int64_t cols, A share) {
  const int64_t width = kWidth ? kWidth : w, stride = cols * width;
  for (int64_t j = 0; j < cols; ++j) {
    A sum = 0;
    for (int64_t r = 0; r < h; ++r)
      for (int64_t k = 0; k < width; ++k) sum += A(x[r * stride + j * width + k]);
    y[j] = T(sum * share);
  }
}

template <int64_t kWidth, typename T, typename A>
GPK_SIMD void spread_row(const T* c, T* x, int64_t h, int64_t w, int64_t cols, A share) {
  const int64_t width = kWidth ? kWidth : w, stride = cols * width;
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t k = 0; k < width; ++k) x[j * width + k] = T(A(c[j]) * share);
  for (int64_t r = 1; r < h; ++r) std::copy_n(x, stride, x + r * stride);
}

// Sizes with the last two axes changed by f.
template <typename F>
Tensor resized(const Tensor& x, int64_t h, int64_t w, const F& f) {
  STD_TORCH_CHECK(x.dim() >= 2 && h > 0 && w > 0, "x: expected planes, and windows that are not empty");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  f(sizes[sizes.size() - 2], h);
  f(sizes.back(), w);
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  return empty_strided(sizes, strides, dtype_code(x));
}

// Calls f(row) for each row of windows, of which each spans so many elements.
template <typename F>
void for_window_rows(int64_t rows, int64_t elements, const F& f) {
  parallel(rows, std::max<int64_t>(1, kTile / std::max<int64_t>(1, elements)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

Tensor mean_pool_cpu(Tensor x, int64_t h, int64_t w) {
  const Tensor from = torch::stable::contiguous(x), out = resized(x, h, w, [](int64_t& size, int64_t window) {
    STD_TORCH_CHECK(size % window == 0, "x: expected windows that tile the planes");
    size /= window;
  });
  if (out.numel() == 0) return out;
  const int64_t cols = out.size(out.dim() - 1), elements = h * w * cols;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    auto* pool = w == 2 ? &pool_row<2, T, A> : &pool_row<0, T, A>;
    for_window_rows(out.numel() / cols, elements, [&](int64_t row) {
      pool(data<T>(from) + row * elements, mutable_data<T>(out) + row * cols, h, w, cols, A(1) / A(h * w));
    });
  });
  return out;
}

Tensor mean_pool_backward_cpu(Tensor cotangent, int64_t h, int64_t w) {
  const Tensor from = torch::stable::contiguous(cotangent);
  const Tensor out = resized(cotangent, h, w, [](int64_t& size, int64_t window) { size *= window; });
  if (out.numel() == 0) return out;
  const int64_t cols = from.size(from.dim() - 1), elements = h * w * cols;
  dispatch(from, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    auto* spread = w == 2 ? &spread_row<2, T, A> : &spread_row<0, T, A>;
    for_window_rows(from.numel() / cols, elements, [&](int64_t row) {
      spread(data<T>(from) + row * cols, mutable_data<T>(out) + row * elements, h, w, cols, A(1) / A(h * w));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("mean_pool", TORCH_BOX(&mean_pool_cpu));
  m.impl("mean_pool_backward", TORCH_BOX(&mean_pool_backward_cpu));
}

}  // namespace gpk::cpu
