// penalty_direction_: the penalty of an input gradient, which becomes the direction that the tangent pass pushes.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T>
struct Direction {
  T *x, *parts;
  int64_t rows, packs;
  double weight;
  Accumulate<T> target;
  bool one_sided;
};

// kLanes threads a row, or a block where kLanes = kThreads; the second reading of a row comes from cache.
template <typename T, typename A, int kWidth, int kLanes>
__global__ void GPK_BOUNDS direction_kernel(Direction<T> o, double* totals, unsigned* ticket) {
  const int lane = int(threadIdx.x) % kLanes;
  double total = 0;
  for (int64_t row = flat_thread() / kLanes; row < o.rows; row += flat_threads() / kLanes) {
    A squared = A(0);
    for (int64_t i = lane; i < o.packs; i += kLanes) {
      const auto pack = load<T, kWidth>(o.x, row * o.packs + i);
      for (int k = 0; k < kWidth; ++k) squared += A(pack.at[k]) * A(pack.at[k]);
    }
    if constexpr (kLanes == kThreads)
      squared = block_sum(squared);
    else
      squared = lanes_sum<kLanes>(squared);
    const PenaltyRow<A> penalty = penalty_row(squared, o.target, o.one_sided, A(1) / A(o.rows));
    const A factor = A(o.weight) * penalty.coefficient;
    for (int64_t i = lane; i < o.packs; i += kLanes) {
      auto pack = load<T, kWidth>(o.x, row * o.packs + i);
      for (int k = 0; k < kWidth; ++k) pack.at[k] = T(factor * A(pack.at[k]));
      store(o.x, row * o.packs + i, pack);
    }
    if (lane == 0) total += double(penalty.value);
  }
  grid_sum(total, totals, ticket, [&](double sum) {
    const double penalty = sum / double(o.rows);
    o.parts[0] = T(double(A(o.parts[0])) + o.weight * penalty);
    o.parts[2] = T(penalty);
  });
}

void penalty_direction_cuda(Tensor gradient, Tensor parts, double weight, double target, bool one_sided) {
  const Shape shape = rows_of("gradient", gradient);
  STD_TORCH_CHECK(gradient.is_contiguous(), "gradient: expected a contiguous tensor");
  STD_TORCH_CHECK(parts.numel() == 4 && parts.is_contiguous() && parts.scalar_type() == gradient.scalar_type(),
                  "parts: expected four contiguous numbers");
  const Stream stream(gradient);
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    with_width<T>(shape.cols, {data<T>(gradient)}, [&](auto width, int64_t packs) {
      constexpr int kWidth = decltype(width)::value;
      const int lanes = packs <= 4 ? 1 : packs <= 256 ? kWarp : kThreads;
      const int64_t blocks = std::clamp<int64_t>(ceil_div(shape.rows, kThreads / lanes), 1, 2048);
      const SumWorkspace workspace(gradient, blocks, stream);
      auto kernel = lanes == 1       ? &direction_kernel<T, A, kWidth, 1>
                    : lanes == kWarp ? &direction_kernel<T, A, kWidth, kWarp>
                                     : &direction_kernel<T, A, kWidth, kThreads>;
      GPK_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), stream,
                 Direction<T>{mutable_data<T>(gradient), mutable_data<T>(parts), shape.rows, packs, weight, A(target),
                              one_sided},
                 workspace.totals(), workspace.ticket());
    });
  });
  check_launch();
}

}  // namespace

GPK_REGISTER(m) { m.impl("penalty_direction_", TORCH_BOX(&penalty_direction_cuda)); }

}  // namespace gpk::cuda
