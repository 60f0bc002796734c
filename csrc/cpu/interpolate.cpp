// interpolate: eps * real + (1 - eps) * fake, one eps per sample.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <bool kStreamed, typename T, typename A>
GPK_SIMD void interpolate_rows(const T* real, const T* fake, const A* eps, T* out, int64_t row_begin, int64_t row_end,
                               int64_t begin, int64_t end, int64_t cols) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const A weight = eps[row];
    const T *r = real + row * cols, *f = fake + row * cols;
    const auto mixed = [=](int64_t i) GPK_INLINE { return T(gpk::interpolate(A(r[i]), A(f[i]), weight)); };
    write<kStreamed>(std::array{r, f}, begin, end, Result{out + row * cols, mixed});
  }
}

template <bool kStreamed, typename T, typename A>
GPK_SIMD void split_rows(const T* cotangent, const A* eps, T* to_real, T* to_fake, int64_t row_begin, int64_t row_end,
                         int64_t begin, int64_t end, int64_t cols) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* c = cotangent + row * cols;
    const auto share = [=](T* to, A weight) GPK_INLINE {
      return Result{to + row * cols, [=](int64_t i) GPK_INLINE { return T(weight * A(c[i])); }};
    };
    const A weight = eps[row], rest = A(1) - weight;
    if (to_real && to_fake)
      write<kStreamed>(std::array{c}, begin, end, share(to_real, weight), share(to_fake, rest));
    else if (to_real)
      write<kStreamed>(std::array{c}, begin, end, share(to_real, weight));
    else if (to_fake)
      write<kStreamed>(std::array{c}, begin, end, share(to_fake, rest));
  }
}

Tensor interpolate_cpu(Tensor real, Tensor fake, Tensor eps) {
  const Shape shape = check_interpolate(real, fake, eps);
  const MemoryFormat format = common_format({&real, &fake});
  const Tensor r = in_format(real, format), f = in_format(fake, format), out = result_like(real, format);
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const std::vector<A> weights = small_vector<A>(eps);
    const auto kernel =
        past_cache(out.numel() * sizeof(T)) ? &interpolate_rows<true, T, A> : &interpolate_rows<false, T, A>;
    for_tiles(shape, [&, from_real = data<T>(r), from_fake = data<T>(f), to = mutable_data<T>(out)](
                         int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
      kernel(from_real, from_fake, weights.data(), to, r0, r1, c0, c1, shape.cols);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> interpolate_backward_cpu(Tensor cotangent, Tensor eps, bool to_real, bool to_fake) {
  const Shape shape = rows_of("cotangent", cotangent);
  check_per_row("eps", eps, shape);
  const MemoryFormat format = common_format({&cotangent});
  const Tensor from = in_format(cotangent, format);
  const Tensor real = to_real ? result_like(cotangent, format) : nothing_like(cotangent);
  const Tensor fake = to_fake ? result_like(cotangent, format) : nothing_like(cotangent);
  dispatch(cotangent, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const std::vector<A> weights = small_vector<A>(eps);
    T* r = to_real ? mutable_data<T>(real) : nullptr;
    T* f = to_fake ? mutable_data<T>(fake) : nullptr;
    const auto kernel =
        past_cache((real.numel() + fake.numel()) * sizeof(T)) ? &split_rows<true, T, A> : &split_rows<false, T, A>;
    for_tiles(shape, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
      kernel(data<T>(from), weights.data(), r, f, r0, r1, c0, c1, shape.cols);
    });
  });
  return {real, fake};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cpu));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cpu));
}

}  // namespace gpk::cpu
