// score losses: the sum over tensors of mean phi(scores), and its derivative.
#include "reduce_rows.h"

namespace gpk::cuda {
namespace {

constexpr int kTensors = 2;  // of real and fake scores

// A row for each tensor of scores.
template <typename T, typename A>
struct ScoresOfTensor {
  static constexpr int kSums = 1;
  const T* scores[kTensors];
  int64_t counts[kTensors];
  ScoreLoss kinds[kTensors];
  A targets[kTensors];

  __device__ void sum(int64_t row, int64_t first, int64_t step, A* sums) const {
    for (int64_t i = first; i < counts[row]; i += step)
      sums[0] += score_value(kinds[row], A(scores[row][i]), targets[row]);
  }
  __device__ double finish(int64_t row, const A* sums) const { return double(sums[0]) / double(counts[row]); }
};

template <typename T, typename A>
__global__ void GPK_BOUNDS slope_kernel(const A* cotangent, const T* scores, ScoreLoss kind, A target, T* out,
                                        int64_t count) {
  const A scale = *cotangent / A(count);
  for (int64_t i = flat_thread(); i < count; i += flat_threads())
    out[i] = T(scale * score_slope(kind, A(scores[i]), target));
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
      rows.kinds[i] = ScoreLoss(kinds[i]);
      rows.targets[i] = A(targets[i]);
      longest = std::max(longest, dense[i].numel());
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
      auto kernel = slope_kernel<T, A>;
      GPK_LAUNCH(kernel, flat_grid(out.numel()), dim3(kThreads), stream, data<A>(by), data<T>(dense[i]),
                 ScoreLoss(kinds[i]), A(targets[i]), mutable_data<T>(out), out.numel());
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
