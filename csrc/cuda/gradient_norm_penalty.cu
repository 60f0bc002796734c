// gradient norm penalty: norms, penalty and the coefficient that backward scales by, in one launch.
#include "reduce_rows.h"

namespace gpk::cuda {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

template <typename T, typename A, int kWidth, bool kSquare>
struct PenaltyOfRow {
  static constexpr int kSums = 1;
  const T* x;
  A *values, *coefficients;  // values: of every row, if they are wanted
  int64_t packs;
  PenaltyOptions<A> options;
  A share;

  __device__ void sum(int64_t row, int64_t first, int64_t step, A* sums) const {
#pragma unroll 2
    for (int64_t i = first; i < packs; i += step) {
      const auto pack = load<T, kWidth>(x, row * packs + i);
      for (int k = 0; k < kWidth; ++k) sums[0] += A(pack.at[k]) * A(pack.at[k]);
    }
  }
  __device__ double finish(int64_t row, const A* sums) const {
    const PenaltyRow<A> penalty = penalty_row<kSquare>(sums[0], options, share);
    coefficients[row] = penalty.coefficient;
    if (values) values[row] = penalty.value;
    return double(penalty.value);
  }
};

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS scale_kernel(const A* cotangent, bool by_row, const T* x, const A* coefficients, T* out,
                                        int64_t rows, int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    const A factor = cotangent[by_row ? row : 0] * coefficients[row];
    for_packs(packs, [&](int64_t i) {
      auto pack = load<T, kWidth>(x, row * packs + i);
      for (int k = 0; k < kWidth; ++k) pack.at[k] = T(factor * A(pack.at[k]));
      store<T, kWidth>(out, row * packs + i, pack);
    });
  });
}

std::tuple<Tensor, Tensor> gradient_norm_penalty_cuda(Tensor grad, double target, bool one_sided, int64_t reduction,
                                                      double power) {
  const Shape shape = rows_of("grad", grad);
  check_code("reduction", reduction, kSum);
  const Tensor dense = in_format(grad, common_format({&grad}));
  const double share = reduction == kMean ? 1.0 / double(shape.rows) : 1.0;
  Tensor value, coefficient;
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const bool each = reduction == kNone;
    value = each ? empty(grad, shape.rows, scalar_type_of<A>()) : empty_scalar<A>(grad);
    coefficient = empty(grad, shape.rows, scalar_type_of<A>());
    A* out = mutable_data<A>(value);
    const PenaltyOptions<A> options{A(target), one_sided, A(power)};
    with_width<T>(shape.cols, {data<T>(dense)}, [&](auto width, int64_t packs) {
      const auto reduce = [&](auto square) {
        const PenaltyOfRow<T, A, decltype(width)::value, decltype(square)::value> row{
            data<T>(dense), each ? out : nullptr, mutable_data<A>(coefficient), packs, options, A(share)};
        reduce_rows<A>(grad, row, each ? nullptr : out, share, shape.rows, packs);
      };
      power == 2 ? reduce(std::true_type{}) : reduce(std::false_type{});
    });
  });
  return {value, coefficient};
}

Tensor gradient_norm_penalty_backward_cuda(Tensor cotangent, Tensor grad, Tensor coefficient) {
  const Shape shape = rows_of("grad", grad);
  check_per_row("coefficient", coefficient, shape);
  const bool by_row = cotangent.numel() != 1;
  STD_TORCH_CHECK(!by_row || cotangent.numel() == shape.rows, "cotangent: expected one, or one per row");
  const MemoryFormat format = common_format({&grad});
  const Tensor from = in_format(grad, format), out = empty_like(grad, format);
  if (shape.cols == 0) return out;
  const Stream stream(grad);
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor by = in_accumulation<A>(cotangent), scale = in_accumulation<A>(coefficient);
    with_width<T>(shape.cols, {data<T>(from), data<T>(out)}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(shape.rows, packs);
      auto kernel = scale_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, data<A>(by), by_row, data<T>(from), data<A>(scale),
                 mutable_data<T>(out), shape.rows, packs);
    });
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&gradient_norm_penalty_cuda));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&gradient_norm_penalty_backward_cuda));
}

}  // namespace gpk::cuda
