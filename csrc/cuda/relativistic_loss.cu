// relativistic loss: mean softplus(fake - real) over pairs of scores, and its derivative by both; a launch each.
#include "reduce_rows.h"

namespace gpk::cuda {
namespace {

// One row of all pairs.
template <typename T, typename A, int kWidth>
struct LossOfPairs {
  static constexpr int kSums = 1;
  const T *real, *fake;
  int64_t packs;

  __device__ void sum(int64_t, int64_t first, int64_t step, A* sums) const {
    A sum = 0;
#pragma unroll 2
    for (int64_t i = first; i < packs; i += step) {
      const auto up = load<T, kWidth>(fake, i), down = load<T, kWidth>(real, i);
      for (int k = 0; k < kWidth; ++k) sum += softplus(A(up.at[k]) - A(down.at[k]));
    }
    sums[0] += sum;
  }
  __device__ double finish(int64_t, const A* sums) const { return double(sums[0]); }
};

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS slopes_kernel(const A* cotangent, const T* real, const T* fake, T* to_real, T* to_fake,
                                         int64_t packs) {
  const A scale = *cotangent / A(packs * kWidth);
  for (int64_t i = flat_thread(); i < packs; i += flat_threads()) {
    auto up = load<T, kWidth>(fake, i), down = load<T, kWidth>(real, i);
    for (int k = 0; k < kWidth; ++k) {
      const A slope = scale * sigmoid(A(up.at[k]) - A(down.at[k]));
      up.at[k] = T(slope);
      down.at[k] = T(-slope);
    }
    store<T, kWidth>(to_fake, i, up);
    store<T, kWidth>(to_real, i, down);
  }
}

Tensor relativistic_loss_cuda(Tensor real_scores, Tensor fake_scores) {
  check_paired(real_scores, fake_scores);
  const MemoryFormat format = common_format({&real_scores, &fake_scores});
  const Tensor real = in_format(real_scores, format), fake = in_format(fake_scores, format);
  Tensor out;
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    out = empty_scalar<A>(real);
    with_width<T>(real.numel(), {data<T>(real), data<T>(fake)}, [&](auto width, int64_t packs) {
      const LossOfPairs<T, A, decltype(width)::value> row{data<T>(real), data<T>(fake), packs};
      reduce_rows<A>(real, row, mutable_data<A>(out), 1.0 / double(real.numel()), 1, packs);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> relativistic_loss_backward_cuda(Tensor cotangent, Tensor real_scores, Tensor fake_scores) {
  check_paired(real_scores, fake_scores);
  STD_TORCH_CHECK(cotangent.numel() == 1, "cotangent: expected one number");
  const MemoryFormat format = common_format({&real_scores, &fake_scores});
  const Tensor real = in_format(real_scores, format), fake = in_format(fake_scores, format);
  const Tensor to_real = empty_like(real_scores, format), to_fake = empty_like(fake_scores, format);
  const Stream stream(real);
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor by = in_accumulation<A>(cotangent);
    const auto pointers = {static_cast<const void*>(data<T>(real)), static_cast<const void*>(data<T>(fake)),
                           static_cast<const void*>(data<T>(to_real)), static_cast<const void*>(data<T>(to_fake))};
    with_width<T>(real.numel(), pointers, [&](auto width, int64_t packs) {
      auto kernel = slopes_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, flat_grid(packs), dim3(kThreads), stream, data<A>(by), data<T>(real), data<T>(fake),
                 mutable_data<T>(to_real), mutable_data<T>(to_fake), packs);
    });
  });
  check_launch();
  return {to_real, to_fake};
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("relativistic_loss", TORCH_BOX(&relativistic_loss_cuda));
  m.impl("relativistic_loss_backward", TORCH_BOX(&relativistic_loss_backward_cuda));
}

}  // namespace gpk::cuda
