// interpolate: eps * real + (1 - eps) * fake, one eps per sample.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS interpolate_kernel(const T* real, const T* fake, const A* eps, T* out, int64_t rows,
                                              int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    const A weight = eps[row];
    for_packs(packs, [&](int64_t i) {
      const auto r = load<T, kWidth>(real, row * packs + i), f = load<T, kWidth>(fake, row * packs + i);
      Pack<T, kWidth> o;
      for (int k = 0; k < kWidth; ++k) o.at[k] = T(gpk::interpolate(A(r.at[k]), A(f.at[k]), weight));
      store(out, row * packs + i, o);
    });
  });
}

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS split_kernel(const T* cotangent, const A* eps, T* to_real, T* to_fake, int64_t rows,
                                        int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    const A weight = eps[row], rest = A(1) - weight;
    for_packs(packs, [&](int64_t i) {
      const auto c = load<T, kWidth>(cotangent, row * packs + i);
      Pack<T, kWidth> r, f;
      for (int k = 0; k < kWidth; ++k) {
        r.at[k] = T(weight * A(c.at[k]));
        f.at[k] = T(rest * A(c.at[k]));
      }
      if (to_real) store<T, kWidth>(to_real, row * packs + i, r);
      if (to_fake) store<T, kWidth>(to_fake, row * packs + i, f);
    });
  });
}

Tensor interpolate_cuda(Tensor real, Tensor fake, Tensor eps) {
  const Shape shape = check_interpolate(real, fake, eps);
  const MemoryFormat format = common_format({&real, &fake});
  const Tensor r = in_format(real, format), f = in_format(fake, format), out = empty_like(real, format);
  if (shape.cols == 0) return out;
  const Stream stream(real);
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor weights = in_accumulation<A>(eps);
    with_width<T>(shape.cols, {data<T>(r), data<T>(f), data<T>(out)}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(shape.rows, packs);
      auto kernel = interpolate_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, data<T>(r), data<T>(f), data<A>(weights), mutable_data<T>(out),
                 shape.rows, packs);
    });
  });
  check_launch();
  return out;
}

std::tuple<Tensor, Tensor> interpolate_backward_cuda(Tensor cotangent, Tensor eps, bool to_real, bool to_fake) {
  const Shape shape = rows_of("cotangent", cotangent);
  check_per_row("eps", eps, shape);
  const MemoryFormat format = common_format({&cotangent});
  const Tensor from = in_format(cotangent, format);
  const Tensor real = to_real ? empty_like(cotangent, format) : nothing_like(cotangent);
  const Tensor fake = to_fake ? empty_like(cotangent, format) : nothing_like(cotangent);
  if (shape.cols == 0 || !(to_real || to_fake)) return {real, fake};
  const Stream stream(cotangent);
  dispatch(cotangent, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor weights = in_accumulation<A>(eps);
    T* r = to_real ? mutable_data<T>(real) : nullptr;
    T* f = to_fake ? mutable_data<T>(fake) : nullptr;
    with_width<T>(shape.cols, {data<T>(from), r, f}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(shape.rows, packs);
      auto kernel = split_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, data<T>(from), data<A>(weights), r, f, shape.rows, packs);
    });
  });
  check_launch();
  return {real, fake};
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("interpolate", TORCH_BOX(&interpolate_cuda));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_backward_cuda));
}

}  // namespace gpk::cuda
