// consistency_term and lipschitz_consistency: squared distances per row, then a formula; one backward for both.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <typename T>
GPK_SIMD double squared_distance(const T* a, const T* b, bool ahead, int64_t begin, int64_t end) {
  return sum_of(std::array{a, b}, ahead, begin, end, [=](int64_t i) GPK_INLINE {
    const double v = double(Accumulate<T>(a[i])) - double(Accumulate<T>(b[i]));
    return v * v;
  });
}

template <bool kStreamed, typename T, typename A>
GPK_SIMD void scale_difference(const T* a, const T* b, const A* scale, T* plus, T* minus, int64_t row_begin,
                               int64_t row_end, int64_t begin, int64_t end, int64_t cols) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const A factor = scale[row];
    const int64_t offset = row * cols;
    const auto difference = [=](A by) GPK_INLINE {
      return [=](int64_t i) GPK_INLINE { return T(by * (A(a[i]) - A(b[i]))); };
    };
    write<kStreamed>(std::array{a, b}, offset + begin, offset + end, Result{plus, difference(factor)},
                     Result{minus, difference(-factor)});
  }
}

std::vector<double> row_distances(const Tensor& a, const Tensor& b) {
  const Shape shape{a.size(0), a.numel() / a.size(0)};
  const MemoryFormat format = common_format({&a, &b});
  const Tensor first = in_format(a, format), second = in_format(b, format);
  std::vector<double> sums;
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const bool ahead = reads_ahead_by_hand(2 * a.numel() * sizeof(T));
    sums = sum_rows(shape, [&, x = data<T>(first), y = data<T>(second)](int64_t row, int64_t begin, int64_t end) {
      return squared_distance<T>(x + row * shape.cols, y + row * shape.cols, ahead, begin, end);
    });
  });
  return sums;
}

// Mean over rows of `formula` of the two distances, and the coefficients of its derivative.
template <typename F>
std::tuple<Tensor, Tensor, Tensor> mean_over_rows(const Tensor& a1, const Tensor& a2, const Tensor& b1,
                                                  const Tensor& b2, const F& formula) {
  std::vector<double> a = row_distances(a1, a2), b = row_distances(b1, b2);
  Sum sum;
  for (size_t row = 0; row < a.size(); ++row) {
    const ConsistencyRow<double> result = formula(a[row], b[row], 1.0 / double(a.size()));
    sum += result.value;
    a[row] = result.a_coefficient;
    b[row] = result.b_coefficient;
  }
  const double total = sum.value() / double(a.size());
  const int64_t rows = int64_t(a.size());
  return {from_doubles(a1, &total, 1, true), from_doubles(a1, a.data(), rows), from_doubles(a1, b.data(), rows)};
}

std::tuple<Tensor, Tensor, Tensor> consistency_term_cpu(Tensor score1, Tensor score2, Tensor features1,
                                                        Tensor features2, double margin, double feature_weight) {
  check_consistency(score1, score2, "features1", features1, "features2", features2);
  const int64_t width = features1.numel() / features1.size(0);
  const double weight = feature_weight / double(std::max<int64_t>(1, width));
  return mean_over_rows(score1, score2, features1, features2, [=](double scores, double features, double share) {
    return consistency_row(scores, features, margin, weight, share);
  });
}

std::tuple<Tensor, Tensor, Tensor> lipschitz_consistency_cpu(Tensor score1, Tensor score2, Tensor x1, Tensor x2,
                                                             double margin) {
  check_consistency(score1, score2, "x1", x1, "x2", x2);
  return mean_over_rows(score1, score2, x1, x2, [=](double scores, double inputs, double share) {
    return lipschitz_row(scores, inputs, margin, share);
  });
}

std::pair<Tensor, Tensor> pair_backward(const Tensor& cotangent, const Tensor& x1, const Tensor& x2,
                                        const Tensor& coefficient, Shape shape) {
  const MemoryFormat format = common_format({&x1, &x2});
  const Tensor a = in_format(x1, format), b = in_format(x2, format);
  const Tensor plus = result_like(x1, format), minus = result_like(x1, format);
  dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    std::vector<A> scale = small_vector<A>(coefficient);
    const A by = small_vector<A>(cotangent)[0];
    for (A& s : scale) s *= by;
    const auto kernel =
        past_cache(2 * x1.numel() * sizeof(T)) ? &scale_difference<true, T, A> : &scale_difference<false, T, A>;
    for_tiles(shape, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
      kernel(data<T>(a), data<T>(b), scale.data(), mutable_data<T>(plus), mutable_data<T>(minus), r0, r1, c0, c1,
             shape.cols);
    });
  });
  return {plus, minus};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> consistency_backward_cpu(Tensor cotangent, Tensor a1, Tensor a2, Tensor b1,
                                                                    Tensor b2, Tensor a_coefficient,
                                                                    Tensor b_coefficient, bool to_b) {
  const Shape a_shape = check_consistency_backward(cotangent, "a1", a1, "a2", a2, a_coefficient);
  const auto [ga1, ga2] = pair_backward(cotangent, a1, a2, a_coefficient, a_shape);
  if (!to_b) return {ga1, ga2, nothing_like(b1), nothing_like(b1)};
  const Shape b_shape = check_consistency_backward(cotangent, "b1", b1, "b2", b2, b_coefficient);
  const auto [gb1, gb2] = pair_backward(cotangent, b1, b2, b_coefficient, b_shape);
  return {ga1, ga2, gb1, gb2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("consistency_term", TORCH_BOX(&consistency_term_cpu));
  m.impl("lipschitz_consistency", TORCH_BOX(&lipschitz_consistency_cpu));
  m.impl("consistency_backward", TORCH_BOX(&consistency_backward_cpu));
}

}  // namespace gpk::cpu
