// score losses: the sum over tensors of mean phi(scores), and its derivative.
#include "reduce_rows.h"

namespace gpk::cuda {
namespace {

constexpr int kTensors = 2;  // of real and fake scores

// Calls f(kind as a constant), so that loops over scores have no branches.
template <int64_t kFirst = 0, typename F>
__device__ __forceinline__ void with_kind(ScoreLoss kind, const F& f) {
  constexpr auto first = ScoreLoss(kFirst);
  if constexpr (first == ScoreLoss::least_squares) {
    f(std::integral_constant<ScoreLoss, first>{});
  } else {
    if (kind == first)
      f(std::integral_constant<ScoreLoss, first>{});
    else
      with_kind<kFirst + 1>(kind, f);
  }
}

// A row for each tensor of scores. Of `packs` packs a thread loads several before it needs the first.
template <typename T, typename A>
struct ScoresOfTensor {
  static constexpr int kSums = 1;
  const T* scores[kTensors];
  int64_t counts[kTensors], packs[kTensors];
  ScoreLoss kinds[kTensors];
  A targets[kTensors];

  __device__ void sum(int64_t row, int64_t first, int64_t step, A* sums) const {
    constexpr int kWidth = kWide<T>;
    const T* const x = scores[row];
    const A target = targets[row];
    A sum = 0;
    with_kind(kinds[row], [&](auto kind) {
#pragma unroll 4
      for (int64_t i = first; i < packs[row]; i += step) {
        const auto pack = load<T, kWidth>(x, i);
        for (int k = 0; k < kWidth; ++k) sum += score_value(decltype(kind)::value, A(pack.at[k]), target);
      }
      for (int64_t i = packs[row] * kWidth + first; i < counts[row]; i += step)
        sum += score_value(decltype(kind)::value, A(x[i]), target);
    });
    sums[0] += sum;
  }
  __device__ double finish(int64_t row, const A* sums) const { return double(sums[0]) / double(counts[row]); }
};

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS slope_kernel(const A* cotangent, const T* scores, ScoreLoss kind, A target, T* out,
                                        int64_t packs) {
  const A scale = *cotangent / A(packs * kWidth);
  with_kind(kind, [&](auto constant) {
    for (int64_t i = flat_thread(); i < packs; i += flat_threads()) {
      auto pack = load<T, kWidth>(scores, i);
      for (int k = 0; k < kWidth; ++k)
        pack.at[k] = T(scale * score_slope(decltype(constant)::value, A(pack.at[k]), target));
      store<T, kWidth>(out, i, pack);
    }
  });
}

std::vector<Tensor> checked(const std::vector<Tensor>& scores, const std::vector<int64_t>& kinds,
                            const std::vector<double>& targets) {
  check_scores(scores, kinds, targets, int64_t(ScoreLoss::least_squares));
  STD_TORCH_CHECK(scores.size() <= kTensors, "scores: expected one tensor or two");
  std::vector<Tensor> dense;
  for (const Tensor& s : scores) {
    STD_TORCH_CHECK(s.scalar_type() == scores[0].scalar_type(), "scores: dtypes differ");
    dense.push_back(torch::stable::contiguous(s));
  }
  return dense;
}

Tensor score_loss_cuda(std::vector<Tensor> scores, std::vector<int64_t> kinds, std::vector<double> targets) {
  const std::vector<Tensor> dense = checked(scores, kinds, targets);
  Tensor out;
  dispatch(dense[0], [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    ScoresOfTensor<T, A> rows{};
    int64_t longest = 0;
    for (size_t i = 0; i < dense.size(); ++i) {
      rows.scores[i] = data<T>(dense[i]);
      rows.counts[i] = dense[i].numel();
      rows.packs[i] = aligned({rows.scores[i]}) ? rows.counts[i] / kWide<T> : 0;
      rows.kinds[i] = ScoreLoss(kinds[i]);
      rows.targets[i] = A(targets[i]);
      longest = std::max(longest, rows.packs[i] ? ceil_div(rows.counts[i], kWide<T>) : rows.counts[i]);
    }
    out = empty_scalar<A>(dense[0]);
    reduce_rows<A>(dense[0], rows, mutable_data<A>(out), 1.0, int64_t(dense.size()), longest);
  });
  return out;
}

std::vector<Tensor> score_loss_backward_cuda(Tensor cotangent, std::vector<Tensor> scores, std::vector<int64_t> kinds,
                                             std::vector<double> targets) {
  const std::vector<Tensor> dense = checked(scores, kinds, targets);
  STD_TORCH_CHECK(cotangent.numel() == 1, "cotangent: expected one number");
  const Stream stream(dense[0]);
  std::vector<Tensor> grads;
  for (size_t i = 0; i < dense.size(); ++i) {
    const Tensor out = empty_like(dense[i], MemoryFormat::Contiguous);
    dispatch(dense[i], [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const Tensor by = in_accumulation<A>(cotangent);
      with_width<T>(out.numel(), {data<T>(dense[i]), data<T>(out)}, [&](auto width, int64_t packs) {
        auto kernel = slope_kernel<T, A, decltype(width)::value>;
        GPK_LAUNCH(kernel, flat_grid(packs), dim3(kThreads), stream, data<A>(by), data<T>(dense[i]),
                   ScoreLoss(kinds[i]), A(targets[i]), mutable_data<T>(out), packs);
      });
    });
    check_launch();
    grads.push_back(out);
  }
  return grads;
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("score_loss", TORCH_BOX(&score_loss_cuda));
  m.impl("score_loss_backward", TORCH_BOX(&score_loss_backward_cuda));
}

}  // namespace gpk::cuda
