// gradient norm penalty: one pass over the rows gives norms, penalty and the coefficient that backward scales by.
#include <cmath>
#include <limits>

#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

template <typename T>
GPK_SIMD double sum_of_squares(const T* x, bool ahead, int64_t begin, int64_t end) {
  return sum_of(std::array{x}, ahead, begin, end, [=](int64_t i) GPK_INLINE {
    const double v = double(Accumulate<T>(x[i]));
    return v * v;
  });
}

template <bool kStreamed, typename T, typename A>
GPK_SIMD void scale_rows(const T* x, const A* scale, T* out, int64_t row_begin, int64_t row_end, int64_t begin,
                         int64_t end, int64_t cols) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const A factor = scale[row];
    const T* from = x + row * cols;
    T* to = out + row * cols;
    const auto scaled = [=](int64_t i) GPK_INLINE { return T(factor * A(from[i])); };
    write<kStreamed>(std::array{from}, begin, end, Result{to, scaled});
  }
}

// Their sum. squared becomes the values. A norm so small that its coefficient is beyond `largest` counts as 0.
template <bool kSquare>
double finish_rows(double* squared, double* coefficients, int64_t rows, PenaltyOptions<double> options, double share,
                   double largest) {
  Sum sum;
  for (int64_t row = 0; row < rows; ++row) {
    const PenaltyRow<double> penalty = penalty_row<kSquare>(squared[row], options, share);
    coefficients[row] = squared[row] < 1 && std::fabs(penalty.coefficient) > largest ? 0 : penalty.coefficient;
    squared[row] = penalty.value;
    sum += penalty.value;
  }
  return sum.value();
}

std::tuple<Tensor, Tensor> gradient_norm_penalty_cpu(Tensor grad, double target, bool one_sided, int64_t reduction,
                                                     double power) {
  const Shape shape = rows_of("grad", grad);
  check_code("reduction", reduction, kSum);
  const Tensor dense = in_format(grad, common_format({&grad}));
  std::vector<double> values;
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    const bool ahead = reads_ahead_by_hand(dense.numel() * sizeof(T));
    values = sum_rows(shape, [=, x = data<T>(dense), cols = shape.cols](int64_t row, int64_t begin, int64_t end) {
      return sum_of_squares<T>(x + row * cols, ahead, begin, end);
    });
  });
  std::vector<double> coefficients(shape.rows);
  const PenaltyOptions<double> options{target, one_sided, power};
  const double share = reduction == kMean ? 1.0 / double(shape.rows) : 1.0;
  const auto finish = power == 2 ? &finish_rows<true> : &finish_rows<false>;
  const double largest =
      grad.scalar_type() == ScalarType::Double ? HUGE_VAL : double(std::numeric_limits<float>::max());
  const double sum = finish(values.data(), coefficients.data(), shape.rows, options, share, largest);
  const Tensor coefficient = from_doubles(grad, coefficients.data(), shape.rows);
  if (reduction == kNone) return {from_doubles(grad, values.data(), shape.rows), coefficient};
  const double total = reduction == kMean ? sum / double(shape.rows) : sum;
  return {from_doubles(grad, &total, 1, true), coefficient};
}

Tensor gradient_norm_penalty_backward_cpu(Tensor cotangent, Tensor grad, Tensor coefficient) {
  const Shape shape = rows_of("grad", grad);
  check_per_row("coefficient", coefficient, shape);
  STD_TORCH_CHECK(cotangent.numel() == 1 || cotangent.numel() == shape.rows, "cotangent: expected one, or one per row");
  const MemoryFormat format = common_format({&grad});
  const Tensor from = in_format(grad, format), out = result_like(grad, format);
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    std::vector<A> scale = small_vector<A>(coefficient);
    const std::vector<A> by = small_vector<A>(cotangent);
    for (size_t row = 0; row < scale.size(); ++row) scale[row] *= by[by.size() == 1 ? 0 : row];
    const auto kernel = past_cache(grad.numel() * sizeof(T)) ? &scale_rows<true, T, A> : &scale_rows<false, T, A>;
    for_tiles(shape, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
      kernel(data<T>(from), scale.data(), mutable_data<T>(out), r0, r1, c0, c1, shape.cols);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("gradient_norm_penalty", TORCH_BOX(&gradient_norm_penalty_cpu));
  m.impl("gradient_norm_penalty_backward", TORCH_BOX(&gradient_norm_penalty_backward_cpu));
}

}  // namespace gpk::cpu
