// score losses: the sum over tensors of mean phi(scores), and its derivative.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <ScoreLoss kKind, typename T, typename A>
GPK_SIMD double sum_of_values(const T* s, A target, bool ahead, int64_t begin, int64_t end) {
  constexpr bool kPlain = kKind == ScoreLoss::identity || kKind == ScoreLoss::negative;
  const auto value = [=](int64_t i) GPK_INLINE { return score_value(kKind, A(s[i]), target); };
  return sum_of<kPlain>(std::array{s}, ahead, begin, end, value);
}

template <ScoreLoss kKind, typename T, typename A>
GPK_SIMD void slopes(const T* s, A target, A scale, T* out, int64_t begin, int64_t end) {
  const auto slope = [=](int64_t i) GPK_INLINE { return T(scale * score_slope(kKind, A(s[i]), target)); };
  write<false>(std::array{s}, begin, end, Result{out, slope});
}

constexpr int64_t kLastKind = int64_t(ScoreLoss::least_squares);
using Kinds = std::make_index_sequence<kLastKind + 1>;

// The loops by kind: each has the code of its own kind alone.
template <typename T, typename A, size_t... kKind>
auto sum_of_kind(int64_t kind, std::index_sequence<kKind...>) {
  return std::array{&sum_of_values<ScoreLoss(kKind), T, A>...}[kind];
}

template <typename T, typename A, size_t... kKind>
auto slopes_of_kind(int64_t kind, std::index_sequence<kKind...>) {
  return std::array{&slopes<ScoreLoss(kKind), T, A>...}[kind];
}

Tensor score_loss_cpu(std::vector<Tensor> scores, std::vector<int64_t> kinds, std::vector<double> targets) {
  check_scores(scores, kinds, targets, kLastKind);
  double total = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor dense = in_format(scores[i], MemoryFormat::Contiguous);
    dispatch(dense, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const auto kernel = sum_of_kind<T, A>(kinds[i], Kinds());
      const bool ahead = reads_ahead_by_hand(dense.numel() * sizeof(T));
      const auto sum = [&](int64_t, int64_t begin, int64_t end) {
        return kernel(data<T>(dense), A(targets[i]), ahead, begin, end);
      };
      total += sum_rows({1, dense.numel()}, sum)[0] / double(dense.numel());
    });
  }
  return from_doubles(scores[0], &total, 1, true);
}

std::vector<Tensor> score_loss_backward_cpu(Tensor cotangent, std::vector<Tensor> scores, std::vector<int64_t> kinds,
                                            std::vector<double> targets) {
  check_scores(scores, kinds, targets, kLastKind);
  STD_TORCH_CHECK(cotangent.numel() == 1, "cotangent: expected one number");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor dense = in_format(scores[i], MemoryFormat::Contiguous),
                 out = result_like(scores[i], MemoryFormat::Contiguous);
    dispatch(dense, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const A scale = small_vector<A>(cotangent)[0] / A(dense.numel());
      const auto kernel = slopes_of_kind<T, A>(kinds[i], Kinds());
      parallel(dense.numel(), kTile, [&](int64_t begin, int64_t end) {
        kernel(data<T>(dense), A(targets[i]), scale, mutable_data<T>(out), begin, end);
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
