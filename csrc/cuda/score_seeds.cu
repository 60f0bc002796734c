// score_seeds: the scores' loss and their cotangents, a bias added on the way.
#include "device.h"

namespace gpk::cuda {
namespace {

struct Scored {
  int64_t rows, cols, n, real, fake, plain;
  ScoreLoss real_kind, fake_kind;
};

template <typename T, typename A>
__global__ void GPK_BOUNDS seeds_kernel(const T* scores, const T* bias, T* parts, T* seeds, T* scale, double* totals,
                                        unsigned* ticket, Scored o) {
  const A share = A(1) / A(o.n * o.cols);
  double total = 0;
  for (int64_t i = flat_thread(); i < o.rows * o.cols; i += flat_threads()) {
    const int64_t row = i / o.cols, col = i % o.cols, group = row / o.n;
    A seed = A(1);
    if (group == o.real || group == o.fake) {
      const ScoreLoss kind = group == o.real ? o.real_kind : o.fake_kind;
      const A score = A(scores[i]) + (bias ? A(bias[col]) : A(0)), slope = score_slope(kind, score) * share;
      total += double(score_value(kind, score));
      if (row < o.plain)
        seed = slope;
      else if (col == 0)
        scale[row % o.n] = T(slope);
    }
    seeds[i] = T(seed);
  }
  grid_sum(total, totals, ticket, [&](double sum) {
    parts[0] = parts[1] = T(sum / double(o.n * o.cols));
    parts[2] = parts[3] = T(0);
  });
}

std::tuple<Tensor, Tensor, Tensor> score_seeds_cuda(Tensor scores, Tensor bias, int64_t n, int64_t real, int64_t fake,
                                                    int64_t real_kind, int64_t fake_kind, int64_t plain) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.numel() > 0, "scores: expected a matrix of at least one");
  const int64_t groups = n > 0 ? scores.size(0) / n : 0;
  STD_TORCH_CHECK(n > 0 && groups * n == scores.size(0), "scores: expected groups of n rows");
  STD_TORCH_CHECK(real < groups && fake < groups, "real, fake: expected a group");
  STD_TORCH_CHECK(bias.numel() == 0 || bias.numel() == scores.size(1), "bias: expected one number per column");
  STD_TORCH_CHECK(bias.scalar_type() == scores.scalar_type(), "bias: dtypes differ");
  const Tensor from = torch::stable::contiguous(scores), add = torch::stable::contiguous(bias),
               seeds = empty_like(scores, MemoryFormat::Contiguous), parts = empty(scores, 4, scores.scalar_type()),
               scale = empty(scores, n * std::max(real, fake) >= plain ? n : 0, scores.scalar_type());
  const Stream stream(scores);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(scores.numel(), 16 * kThreads), 1, 1024);
  const SumWorkspace workspace(scores, blocks, stream);
  dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    auto kernel = seeds_kernel<T, Accumulate<T>>;
    GPK_LAUNCH(
        kernel, dim3(unsigned(blocks)), dim3(kThreads), stream, data<T>(from), add.numel() ? data<T>(add) : nullptr,
        mutable_data<T>(parts), mutable_data<T>(seeds), mutable_data<T>(scale), workspace.totals(), workspace.ticket(),
        Scored{scores.size(0), scores.size(1), n, real, fake, plain, ScoreLoss(real_kind), ScoreLoss(fake_kind)});
  });
  check_launch();
  return {parts, seeds, scale};
}

}  // namespace

GPK_REGISTER(m) { m.impl("score_seeds", TORCH_BOX(&score_seeds_cuda)); }

}  // namespace gpk::cuda
