// mean_pool: means of h x w windows that tile each image, and the backward, which broadcasts a window's cotangent.
#include "../windows.h"
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A>
__global__ void GPK_BOUNDS pool_kernel(const T* x, T* y, Windows v) {
  const int64_t count = v.rows * v.cols * v.lanes, stride = v.cols * v.w * v.lanes;
  for (int64_t i = flat_thread(); i < count; i += flat_threads()) {
    const int64_t lane = i % v.lanes, j = i / v.lanes % v.cols, row = i / (v.lanes * v.cols);
    const T* from = x + row * v.h * stride + j * v.w * v.lanes + lane;
    A sum = 0;
    for (int64_t r = 0; r < v.h; ++r)
      for (int64_t k = 0; k < v.w; ++k) sum += A(from[r * stride + k * v.lanes]);
    y[i] = T(sum * (A(1) / A(v.h * v.w)));
  }
}

template <typename T, typename A>
__global__ void GPK_BOUNDS spread_kernel(const T* c, T* x, Windows v) {
  const int64_t width = v.cols * v.w, count = v.rows * v.h * width * v.lanes;
  for (int64_t i = flat_thread(); i < count; i += flat_threads()) {
    const int64_t lane = i % v.lanes, col = i / v.lanes % width, row = i / (v.lanes * width);
    x[i] = T(A(c[(row / v.h * v.cols + col / v.w) * v.lanes + lane]) * (A(1) / A(v.h * v.w)));
  }
}

Tensor mean_pool_cuda(Tensor x, int64_t h, int64_t w) {
  const MemoryFormat format = format_of("x", x, h, w);
  const Tensor from = in_format(x, format), out = pooled(x, format, h, w);
  if (out.numel() == 0) return out;
  const Stream stream(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = pool_kernel<T, Accumulate<T>>;
    GPK_LAUNCH(kernel, flat_grid(out.numel()), dim3(kThreads), stream, data<T>(from), mutable_data<T>(out),
               windows_of(out, format, h, w));
  });
  check_launch();
  return out;
}

Tensor mean_pool_backward_cuda(Tensor cotangent, int64_t h, int64_t w) {
  const MemoryFormat format = format_of("cotangent", cotangent, h, w);
  const Tensor from = in_format(cotangent, format);
  const Tensor out = unpooled(cotangent, format, h, w);
  if (out.numel() == 0) return out;
  const Stream stream(cotangent);
  dispatch(from, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = spread_kernel<T, Accumulate<T>>;
    GPK_LAUNCH(kernel, flat_grid(out.numel()), dim3(kThreads), stream, data<T>(from), mutable_data<T>(out),
               windows_of(from, format, h, w));
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("mean_pool", TORCH_BOX(&mean_pool_cuda));
  m.impl("mean_pool_backward", TORCH_BOX(&mean_pool_backward_cuda));
}

}  // namespace gpk::cuda
