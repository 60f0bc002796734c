// critic_batch: groups of rows below one another, the last perhaps interpolated between two on the way.
#include "mix.h"

namespace gpk::cuda {
namespace {

constexpr int kGroups = 3;

template <typename T>
struct Groups {
  const T* copied[kGroups];
  int copies;
};

// Blocks along z are groups.
template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS batch_kernel(Groups<T> groups, const T* real, const T* fake, const A* eps,
                                        const int64_t* key, T* out, int64_t rows, int64_t packs) {
  const int group = int(blockIdx.z);
  T* to = out + group * rows * packs * kWidth;
  for_rows(rows, [&](int64_t row) {
    if (group < groups.copies) {
      const T* from = groups.copied[group];
      for_packs(packs, [&](int64_t i) { store(to, row * packs + i, load<T, kWidth>(from, row * packs + i)); });
      return;
    }
    mix_row<T, A, kWidth>(real, fake, to, eps_of(eps, key, row), row, packs);
  });
}

Tensor critic_batch_cuda(std::vector<Tensor> plain, std::vector<Tensor> points) {
  STD_TORCH_CHECK(points.size() <= 1 || points.size() == 3, "points: expected none, a batch, or real, fake and eps");
  STD_TORCH_CHECK(!(plain.empty() && points.empty()), "plain: expected at least one batch");
  const Tensor like = (plain.empty() ? points : plain)[0];
  const Shape shape = rows_of("plain", like);
  STD_TORCH_CHECK(like.dim() == 2, "plain: expected matrices");
  std::vector<Tensor> copied = plain;
  if (points.size() == 1) copied.push_back(points[0]);
  const bool mixes = points.size() == 3, drawn = mixes && points[2].scalar_type() == ScalarType::Long;
  const int64_t groups = int64_t(copied.size()) + mixes;
  STD_TORCH_CHECK(groups <= kGroups, "plain: expected at most two batches");
  for (Tensor& group : copied) {
    check_same("plain", group, like);
    group = torch::stable::contiguous(group);
  }
  for (size_t i = 0; mixes && i < 2; ++i) {
    check_same("points", points[i], like);
    points[i] = torch::stable::contiguous(points[i]);
  }
  if (drawn) check_key(points[2]);
  if (mixes && !drawn) check_per_row("eps", points[2], shape);
  const Tensor out = empty_strided(like, {groups * shape.rows, shape.cols}, {shape.cols, 1}, dtype_code(like));
  if (shape.cols == 0) return out;
  const Stream stream(like);
  dispatch(like, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    Groups<T> from{};
    for (const Tensor& group : copied) from.copied[from.copies++] = data<T>(group);
    const Tensor eps = mixes && !drawn ? in_accumulation<A>(points[2]) : like;
    const T *real = mixes ? data<T>(points[0]) : nullptr, *fake = mixes ? data<T>(points[1]) : nullptr;
    with_width<T>(shape.cols, {from.copied[0], from.copied[1], from.copied[2], real, fake, data<T>(out)},
                  [&](auto width, int64_t packs) {
                    RowGrid grid = row_grid(shape.rows, packs);
                    grid.grid.z = unsigned(groups);
                    auto kernel = batch_kernel<T, A, decltype(width)::value>;
                    GPK_LAUNCH(kernel, grid.grid, grid.block, stream, from, real, fake,
                               mixes && !drawn ? data<A>(eps) : nullptr, drawn ? data<int64_t>(points[2]) : nullptr,
                               mutable_data<T>(out), shape.rows, packs);
                  });
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) { m.impl("critic_batch", TORCH_BOX(&critic_batch_cuda)); }

}  // namespace gpk::cuda
