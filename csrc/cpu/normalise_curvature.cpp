// normalise_curvature: derivative of the JVP of a normalisation by its input, for a tangent t and a cotangent d:
// r^2 ((3 c_t c_d - a) n - c_d t - c_t d), with t and d centred where the normalisation centres.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

struct Moments {
  double nt, nd, td, t, d;
};

template <typename T>
GPK_SIMD Moments moments(const T* n, const T* t, const T* d, int64_t count) {
  double nt = 0, nd = 0, td = 0, sum_t = 0, sum_d = 0;
#pragma omp simd reduction(+ : nt, nd, td, sum_t, sum_d)
  for (int64_t i = 0; i < count; ++i) {
    const double x = double(Accumulate<T>(n[i])), u = double(Accumulate<T>(t[i])), v = double(Accumulate<T>(d[i]));
    nt += x * u;
    nd += x * v;
    td += u * v;
    sum_t += u;
    sum_d += v;
  }
  return {nt, nd, td, sum_t, sum_d};
}

template <bool kStreamed, typename T, typename A>
GPK_SIMD void bend(const T* n, const T* t, const T* d, T* out, int64_t count, A by_n, A by_t, A by_d, A constant) {
  const auto bent = [=](int64_t i)
                        GPK_INLINE { return T(by_n * A(n[i]) + by_t * A(t[i]) + by_d * A(d[i]) + constant); };
  write<kStreamed>(std::array{n, t, d}, 0, count, Result{out, bent});
}

Tensor normalise_curvature_cpu(Tensor normal, Tensor inverse, Tensor tangent, Tensor cotangent, bool centred) {
  check_normalise_curvature(normal, inverse, tangent, cotangent);
  const int64_t groups = normal.size(0) * normal.size(1), count = normal.size(2);
  const MemoryFormat format = MemoryFormat::Contiguous;
  const Tensor n = in_format(normal, format), t = in_format(tangent, format), d = in_format(cotangent, format);
  const Tensor out = result_like(normal, format);
  dispatch(normal, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const std::vector<double> r = small_vector<double>(inverse);
    const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, count));
    const auto kernel = past_cache(out.numel() * sizeof(T)) ? &bend<true, T, A> : &bend<false, T, A>;
    parallel(groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t at = group * count;
        const Moments sums = moments<T>(data<T>(n) + at, data<T>(t) + at, data<T>(d) + at, count);
        const Curvature<double> c = normalise_curvature(sums.nt / count, sums.nd / count, sums.td / count,
                                                        sums.t / count, sums.d / count, r[group], centred);
        kernel(data<T>(n) + at, data<T>(t) + at, data<T>(d) + at, mutable_data<T>(out) + at, count, A(c.by_n),
               A(c.by_t), A(c.by_d), A(c.constant));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("normalise_curvature", TORCH_BOX(&normalise_curvature_cpu)); }

}  // namespace gpk::cpu
