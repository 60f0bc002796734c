// relativistic loss: mean softplus(fake - real) over pairs of scores, and its derivative by both.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <typename T>
GPK_SIMD double sum_of_values(const T* real, const T* fake, bool ahead, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const auto value = [=](int64_t i) GPK_INLINE { return softplus(A(fake[i]) - A(real[i])); };
  return sum_of(std::array{real, fake}, ahead, begin, end, value);
}

// Slopes of a block are computed once, then written for both tensors.
template <bool kStreamed, typename T, typename A>
GPK_SIMD void slopes(const T* real, const T* fake, A scale, T* to_real, T* to_fake, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 1024;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end);
    A slope[kBlock];
    for (int64_t i = first; i < last; ++i) slope[i - first] = scale * sigmoid(A(fake[i]) - A(real[i]));
    const auto down = [&](int64_t i) GPK_INLINE { return T(-slope[i - first]); };
    const auto up = [&](int64_t i) GPK_INLINE { return T(slope[i - first]); };
    write<kStreamed>(std::array{real, fake}, first, last, Result{to_real, down}, Result{to_fake, up});
  }
}

Tensor relativistic_loss_cpu(Tensor real_scores, Tensor fake_scores) {
  check_paired(real_scores, fake_scores);
  const MemoryFormat format = common_format({&real_scores, &fake_scores});
  const Tensor real = in_format(real_scores, format), fake = in_format(fake_scores, format);
  double mean = 0;
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    const bool ahead = reads_ahead_by_hand(2 * real.numel() * sizeof(T));
    const auto sum = [&](int64_t, int64_t begin, int64_t end) {
      return sum_of_values<T>(data<T>(real), data<T>(fake), ahead, begin, end);
    };
    mean = sum_rows({1, real.numel()}, sum)[0] / double(real.numel());
  });
  return from_doubles(real, &mean, 1, true);
}

std::tuple<Tensor, Tensor> relativistic_loss_backward_cpu(Tensor cotangent, Tensor real_scores, Tensor fake_scores) {
  check_paired(real_scores, fake_scores);
  STD_TORCH_CHECK(cotangent.numel() == 1, "cotangent: expected one number");
  const MemoryFormat format = common_format({&real_scores, &fake_scores});
  const Tensor real = in_format(real_scores, format), fake = in_format(fake_scores, format);
  const Tensor to_real = result_like(real_scores, format), to_fake = result_like(fake_scores, format);
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A scale = small_vector<A>(cotangent)[0] / A(real.numel());
    const auto kernel = past_cache(2 * real.numel() * sizeof(T)) ? &slopes<true, T, A> : &slopes<false, T, A>;
    parallel(real.numel(), kTile, [&](int64_t begin, int64_t end) {
      kernel(data<T>(real), data<T>(fake), scale, mutable_data<T>(to_real), mutable_data<T>(to_fake), begin, end);
    });
  });
  return {to_real, to_fake};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("relativistic_loss", TORCH_BOX(&relativistic_loss_cpu));
  m.impl("relativistic_loss_backward", TORCH_BOX(&relativistic_loss_backward_cpu));
}

}  // namespace gpk::cpu
