// relativistic loss: mean softplus(fake - real) over pairs of scores, and its derivative by both.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <typename T>
double sum_of_values(const T* real, const T* fake, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  Sum sum;
  for (int64_t i = begin; i < end; ++i) sum += double(softplus(A(fake[i]) - A(real[i])));
  return sum.value();
}

template <typename T, typename A>
void slopes(const T* real, const T* fake, A scale, T* to_real, T* to_fake, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const A slope = scale * sigmoid(A(fake[i]) - A(real[i]));
    to_real[i] = T(-slope);
    to_fake[i] = T(slope);
  }
}

Tensor relativistic_loss_cpu(Tensor real_scores, Tensor fake_scores) {
  check_paired(real_scores, fake_scores);
  const MemoryFormat format = common_format({&real_scores, &fake_scores});
  const Tensor real = in_format(real_scores, format), fake = in_format(fake_scores, format);
  double mean = 0;
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    const auto sum = [&](int64_t, int64_t begin, int64_t end) {
      return sum_of_values<T>(data<T>(real), data<T>(fake), begin, end);
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
  const Tensor to_real = empty_like(real_scores, format), to_fake = empty_like(fake_scores, format);
  dispatch(real, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A scale = small_vector<A>(cotangent)[0] / A(real.numel());
    parallel(real.numel(), kTile, [&](int64_t begin, int64_t end) {
      slopes<T, A>(data<T>(real), data<T>(fake), scale, mutable_data<T>(to_real), mutable_data<T>(to_fake), begin, end);
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
