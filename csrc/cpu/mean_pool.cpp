// mean_pool: means of h x w windows that tile each image, and the backward, which broadcasts a window's cotangent.
#include "../windows.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

// One row of windows; each is summed row by row, as in PyTorch.
template <int64_t kWidth, typename T, typename A>
GPK_SIMD void pool_row(const T* x, T* y, Windows v, A share) {
  const int64_t width = kWidth ? kWidth : v.w, stride = in_row(v);
  for (int64_t j = 0; j < v.cols; ++j) {
    A sum = 0;
    for (int64_t r = 0; r < v.h; ++r)
      for (int64_t k = 0; k < width; ++k) sum += A(x[r * stride + j * width + k]);
    y[j] = T(sum * share);
  }
}

template <typename T, typename A>
GPK_SIMD void pool_lanes(const T* x, T* y, Windows v, A share) {
  constexpr int64_t kBlock = 64;
  for (int64_t j = 0; j < v.cols; ++j)
    for (int64_t begin = 0; begin < v.lanes; begin += kBlock) {
      const int64_t count = std::min(kBlock, v.lanes - begin);
      A sums[kBlock] = {};
      for (int64_t r = 0; r < v.h; ++r)
        for (int64_t k = 0; k < v.w; ++k) {
          const T* from = x + r * in_row(v) + (j * v.w + k) * v.lanes + begin;
          for (int64_t lane = 0; lane < count; ++lane) sums[lane] += A(from[lane]);
        }
      for (int64_t lane = 0; lane < count; ++lane) y[j * v.lanes + begin + lane] = T(sums[lane] * share);
    }
}

template <int64_t kWidth, int64_t kLanes, typename T, typename A>  // compile-time sizes, or 0
GPK_SIMD void spread_row(const T* c, T* x, Windows v, A share) {
  const int64_t width = kWidth ? kWidth : v.w, lanes = kLanes ? kLanes : v.lanes, stride = in_row(v);
  for (int64_t j = 0; j < v.cols; ++j)
    for (int64_t k = 0; k < width; ++k)
      for (int64_t lane = 0; lane < lanes; ++lane)
        x[(j * width + k) * lanes + lane] = T(A(c[j * lanes + lane]) * share);
  for (int64_t r = 1; r < v.h; ++r) std::copy_n(x, stride, x + r * stride);
}

// Calls f(kernel variant, row of windows).
template <typename T, typename A, typename Kernel, typename F>
void for_rows(const Windows& v, Kernel* any, Kernel* pairs, Kernel* pixels, const F& f) {
  Kernel* kernel = v.lanes > 1 ? any : v.w == 2 ? pairs : pixels;
  const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, v.h * in_row(v)));
  parallel(v.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(kernel, row);
  });
}

Tensor mean_pool_cpu(Tensor x, int64_t h, int64_t w) {
  const MemoryFormat format = format_of("x", x, h, w);
  const Tensor from = in_format(x, format), out = pooled(x, format, h, w);
  const Windows v = windows_of(out, format, h, w);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    for_rows<T, A>(v, &pool_lanes<T, A>, &pool_row<2, T, A>, &pool_row<0, T, A>, [&](auto* pool, int64_t row) {
      pool(data<T>(from) + row * h * in_row(v), mutable_data<T>(out) + row * out_row(v), v, A(1) / A(h * w));
    });
  });
  return out;
}

Tensor mean_pool_backward_cpu(Tensor cotangent, int64_t h, int64_t w) {
  const MemoryFormat format = format_of("cotangent", cotangent, h, w);
  const Tensor from = in_format(cotangent, format);
  const Tensor out = unpooled(cotangent, format, h, w);
  const Windows v = windows_of(from, format, h, w);
  dispatch(from, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    for_rows<T, A>(
        v, &spread_row<0, 0, T, A>, &spread_row<2, 1, T, A>, &spread_row<0, 1, T, A>, [&](auto* spread, int64_t row) {
          spread(data<T>(from) + row * out_row(v), mutable_data<T>(out) + row * h * in_row(v), v, A(1) / A(h * w));
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
