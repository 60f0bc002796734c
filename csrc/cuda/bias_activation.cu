// bias_activation_: a bias and a leaky ReLU, in place.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS activation_kernel(T* y, const T* bias, A slope, int64_t rows, int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    for_packs(packs, [&](int64_t i) {
      auto pack = load<T, kWidth>(y, row * packs + i);
      const auto add = bias ? load<T, kWidth>(bias, i) : Pack<T, kWidth>{};
      for (int k = 0; k < kWidth; ++k) pack.at[k] = T(leaky_relu(A(pack.at[k]) + A(add.at[k]), slope));
      store(y, row * packs + i, pack);
    });
  });
}

void bias_activation_cuda(Tensor y, Tensor bias, double slope) {
  STD_TORCH_CHECK(y.dim() == 2 && y.is_contiguous(), "y: expected a contiguous matrix");
  STD_TORCH_CHECK(bias.numel() == 0 || bias.numel() == y.size(1), "bias: expected one number per column");
  STD_TORCH_CHECK(bias.scalar_type() == y.scalar_type(), "bias: dtypes differ");
  if (y.numel() == 0) return;
  const Tensor add = torch::stable::contiguous(bias);
  const Stream stream(y);
  dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const T* by = add.numel() ? data<T>(add) : nullptr;
    with_width<T>(y.size(1), {data<T>(y), by}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(y.size(0), packs);
      auto kernel = activation_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, mutable_data<T>(y), by, A(slope), y.size(0), packs);
    });
  });
  check_launch();
}

}  // namespace

GPK_REGISTER(m) { m.impl("bias_activation_", TORCH_BOX(&bias_activation_cuda)); }

}  // namespace gpk::cuda
