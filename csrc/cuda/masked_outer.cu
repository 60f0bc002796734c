// masked_outer: (seeds w) f'(y), the pull through a layer with one output and the leaky ReLU before it.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS outer_kernel(const T* seeds, const T* w, const T* y, A slope, T* out, int64_t rows,
                                        int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    const A seed = A(seeds[row]);
    for_packs(packs, [&](int64_t i) {
      const auto at = load<T, kWidth>(y, row * packs + i), by = load<T, kWidth>(w, i);
      Pack<T, kWidth> o;
      for (int k = 0; k < kWidth; ++k) o.at[k] = T(leaky_pull(seed * A(by.at[k]), A(at.at[k]), slope));
      store(out, row * packs + i, o);
    });
  });
}

Tensor masked_outer_cuda(Tensor seeds, Tensor w, Tensor y, double slope) {
  STD_TORCH_CHECK(y.dim() == 2, "y: expected a matrix");
  check_per_row("seeds", seeds, {y.size(0), y.size(1)});
  STD_TORCH_CHECK(w.numel() == y.size(1), "w: expected one number per column");
  STD_TORCH_CHECK(seeds.scalar_type() == y.scalar_type() && w.scalar_type() == y.scalar_type(), "dtypes differ");
  const Tensor s = torch::stable::contiguous(seeds), by = torch::stable::contiguous(w),
               at = torch::stable::contiguous(y), out = empty_like(y, MemoryFormat::Contiguous);
  if (y.numel() == 0) return out;
  const Stream stream(y);
  dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    with_width<T>(y.size(1), {data<T>(by), data<T>(at), data<T>(out)}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(y.size(0), packs);
      auto kernel = outer_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, data<T>(s), data<T>(by), data<T>(at), A(slope),
                 mutable_data<T>(out), y.size(0), packs);
    });
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) { m.impl("masked_outer", TORCH_BOX(&masked_outer_cuda)); }

}  // namespace gpk::cuda
