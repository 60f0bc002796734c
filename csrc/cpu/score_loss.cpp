// score losses: the sum over tensors of mean phi(scores), and its derivative.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <typename T>
double sum_of_values(const T* s, ScoreLoss kind, double target, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  Sum sum;
  for (int64_t i = begin; i < end; ++i) sum += double(score_value(kind, A(s[i]), A(target)));
  return sum.value();
}

template <typename T, typename A>
void slopes(const T* s, ScoreLoss kind, A target, A scale, T* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = T(scale * score_slope(kind, A(s[i]), target));
}

Tensor score_loss_cpu(std::vector<Tensor> scores, std::vector<int64_t> kinds, std::vector<double> targets) {
  check_scores(scores, kinds, targets, int64_t(ScoreLoss::least_squares));
  double total = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor dense = in_format(scores[i], MemoryFormat::Contiguous);
    dispatch(dense, [&](auto zero) {
      using T = decltype(zero);
      const auto sum = [&](int64_t, int64_t begin, int64_t end) {
        return sum_of_values<T>(data<T>(dense), ScoreLoss(kinds[i]), targets[i], begin, end);
      };
      total += sum_rows({1, dense.numel()}, sum)[0] / double(dense.numel());
    });
  }
  return from_doubles(scores[0], &total, 1, true);
}

std::vector<Tensor> score_loss_backward_cpu(Tensor cotangent, std::vector<Tensor> scores, std::vector<int64_t> kinds,
                                            std::vector<double> targets) {
  check_scores(scores, kinds, targets, int64_t(ScoreLoss::least_squares));
  STD_TORCH_CHECK(cotangent.numel() == 1, "cotangent: expected one number");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor dense = in_format(scores[i], MemoryFormat::Contiguous),
                 out = empty_like(scores[i], MemoryFormat::Contiguous);
    dispatch(dense, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const A scale = small_vector<A>(cotangent)[0] / A(dense.numel());
      parallel(dense.numel(), kTile, [&](int64_t begin, int64_t end) {
        slopes<T, A>(data<T>(dense), ScoreLoss(kinds[i]), A(targets[i]), scale, mutable_data<T>(out), begin, end);
      });
    });
    grads.push_back(out);
  }
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("score_loss", TORCH_BOX(&score_loss_cpu));
  m.impl("score_loss_backward", TORCH_BOX(&score_loss_backward_cpu));
}

}  // namespace gpk::cpu
