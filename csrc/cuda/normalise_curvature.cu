// normalise_curvature: derivative of the JVP of a normalisation by its input. A block computes the moments of a group,
// then its result.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A>
__global__ void GPK_BOUNDS curvature_kernel(const T* normal, const A* inverse, const T* tangent, const T* cotangent,
                                            T* out, int64_t groups, int64_t count, bool centred) {
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const T *n = normal + group * count, *t = tangent + group * count, *d = cotangent + group * count;
    A nt = 0, nd = 0, td = 0, sum_t = 0, sum_d = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const A x = A(n[i]), u = A(t[i]), v = A(d[i]);
      nt += x * u;
      nd += x * v;
      td += u * v;
      sum_t += u;
      sum_d += v;
    }
    const A share = A(1) / A(count);
    nt = block_sum(nt) * share;
    nd = block_sum(nd) * share;
    td = block_sum(td) * share;
    sum_t = block_sum(sum_t) * share;
    sum_d = block_sum(sum_d) * share;
    const Curvature<A> c = gpk::normalise_curvature(nt, nd, td, sum_t, sum_d, inverse[group], centred);
    for (int64_t i = threadIdx.x; i < count; i += kThreads)
      out[group * count + i] = T(c.by_n * A(n[i]) + c.by_t * A(t[i]) + c.by_d * A(d[i]) + c.constant);
  }
}

Tensor normalise_curvature_cuda(Tensor normal, Tensor inverse, Tensor tangent, Tensor cotangent, bool centred) {
  check_normalise_curvature(normal, inverse, tangent, cotangent);
  const int64_t groups = normal.size(0) * normal.size(1), count = normal.size(2);
  const MemoryFormat format = MemoryFormat::Contiguous;
  const Tensor n = in_format(normal, format), t = in_format(tangent, format), d = in_format(cotangent, format);
  const Tensor out = empty_like(normal, format);
  if (out.numel() == 0) return out;
  const Stream stream(normal);
  dispatch(normal, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor r = in_accumulation<A>(inverse);
    auto kernel = curvature_kernel<T, A>;
    GPK_LAUNCH(kernel, dim3(unsigned(std::min<int64_t>(groups, 1 << 20))), dim3(kThreads), stream, data<T>(n),
               data<A>(r), data<T>(t), data<T>(d), mutable_data<T>(out), groups, count, centred);
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) { m.impl("normalise_curvature", TORCH_BOX(&normalise_curvature_cuda)); }

}  // namespace gpk::cuda
