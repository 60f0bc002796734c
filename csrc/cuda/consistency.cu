// consistency_term and lipschitz_consistency: squared distances per row, then a formula; one backward for both.
#include "reduce_rows.h"

namespace gpk::cuda {
namespace {

// A pair of tensors; row by row squared distances.
template <typename T, typename A, int kWidth>
struct Pair {
  const T *first, *second;
  int64_t packs;

  __device__ A distance(int64_t row, int64_t begin, int64_t step) const {
    A sum = 0;
#pragma unroll 2
    for (int64_t i = begin; i < packs; i += step) {
      const auto x = load<T, kWidth>(first, row * packs + i), y = load<T, kWidth>(second, row * packs + i);
      for (int k = 0; k < kWidth; ++k) {
        const A gap = A(x.at[k]) - A(y.at[k]);
        sum += gap * gap;
      }
    }
    return sum;
  }
};

template <typename PairA, typename PairB, typename A, bool kLipschitz>
struct ConsistencyOfRow {
  static constexpr int kSums = 2;
  PairA a;
  PairB b;
  A *a_coefficients, *b_coefficients;
  A margin, weight, share;

  __device__ void sum(int64_t row, int64_t first, int64_t step, A* sums) const {
    sums[0] += a.distance(row, first, step);
    sums[1] += b.distance(row, first, step);
  }
  __device__ double finish(int64_t row, const A* sums) const {
    const ConsistencyRow<A> result = kLipschitz ? lipschitz_row(sums[0], sums[1], margin, share)
                                                : consistency_row(sums[0], sums[1], margin, weight, share);
    a_coefficients[row] = result.a_coefficient;
    b_coefficients[row] = result.b_coefficient;
    return double(result.value);
  }
};

template <typename T, typename A, int kWidth>
__global__ void GPK_BOUNDS difference_kernel(const A* cotangent, const T* a, const T* b, const A* coefficients, T* plus,
                                             T* minus, int64_t rows, int64_t packs) {
  for_rows(rows, [&](int64_t row) {
    const A factor = *cotangent * coefficients[row];
    for_packs(packs, [&](int64_t i) {
      auto x = load<T, kWidth>(a, row * packs + i), y = load<T, kWidth>(b, row * packs + i);
      for (int k = 0; k < kWidth; ++k) {
        const A v = factor * (A(x.at[k]) - A(y.at[k]));
        x.at[k] = T(v);
        y.at[k] = T(-v);
      }
      store<T, kWidth>(plus, row * packs + i, x);
      store<T, kWidth>(minus, row * packs + i, y);
    });
  });
}

struct Dense {
  Tensor first, second;
  Shape shape;
};

Dense dense(const Tensor& x1, const Tensor& x2) {
  const MemoryFormat format = common_format({&x1, &x2});
  return {in_format(x1, format), in_format(x2, format), {x1.size(0), x1.numel() / x1.size(0)}};
}

template <bool kLipschitz>
std::tuple<Tensor, Tensor, Tensor> mean_over_rows(const Tensor& a1, const Tensor& a2, const Tensor& b1,
                                                  const Tensor& b2, double margin, double feature_weight) {
  const Dense a = dense(a1, a2), b = dense(b1, b2);
  const int64_t rows = a.shape.rows;
  const double share = 1.0 / double(rows), weight = feature_weight / double(std::max<int64_t>(1, b.shape.cols));
  Tensor value, to_a, to_b;
  dispatch(a1, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    value = empty_scalar<A>(a1);
    to_a = empty(a1, rows, scalar_type_of<A>());
    to_b = empty(a1, rows, scalar_type_of<A>());
    using PairA = Pair<T, A, 1>;  // one score or a few per row
    const int64_t a_packs = a.shape.cols;
    with_width<T>(b.shape.cols, {data<T>(b.first), data<T>(b.second)}, [&](auto width, int64_t b_packs) {
      using PairB = Pair<T, A, decltype(width)::value>;
      const ConsistencyOfRow<PairA, PairB, A, kLipschitz> row{{data<T>(a.first), data<T>(a.second), a_packs},
                                                              {data<T>(b.first), data<T>(b.second), b_packs},
                                                              mutable_data<A>(to_a),
                                                              mutable_data<A>(to_b),
                                                              A(margin),
                                                              A(weight),
                                                              A(share)};
      reduce_rows<A>(a1, row, mutable_data<A>(value), share, rows, std::max(a_packs, b_packs));
    });
  });
  return {value, to_a, to_b};
}

std::tuple<Tensor, Tensor, Tensor> consistency_term_cuda(Tensor score1, Tensor score2, Tensor features1,
                                                         Tensor features2, double margin, double feature_weight) {
  check_consistency(score1, score2, "features1", features1, "features2", features2);
  return mean_over_rows<false>(score1, score2, features1, features2, margin, feature_weight);
}

std::tuple<Tensor, Tensor, Tensor> lipschitz_consistency_cuda(Tensor score1, Tensor score2, Tensor x1, Tensor x2,
                                                              double margin) {
  check_consistency(score1, score2, "x1", x1, "x2", x2);
  return mean_over_rows<true>(score1, score2, x1, x2, margin, 0);
}

std::pair<Tensor, Tensor> pair_backward(const Tensor& cotangent, const Tensor& x1, const Tensor& x2,
                                        const Tensor& coefficient) {
  const Dense pair = dense(x1, x2);
  const auto [rows, cols] = pair.shape;
  const MemoryFormat format = common_format({&x1, &x2});
  const Tensor plus = empty_like(x1, format), minus = empty_like(x1, format);
  if (cols == 0) return {plus, minus};
  const Stream stream(x1);
  dispatch(x1, [&, rows = rows, cols = cols](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor by = in_accumulation<A>(cotangent), scale = in_accumulation<A>(coefficient);
    const T *a = data<T>(pair.first), *b = data<T>(pair.second);
    T *up = mutable_data<T>(plus), *down = mutable_data<T>(minus);
    with_width<T>(cols, {a, b, up, down}, [&](auto width, int64_t packs) {
      const RowGrid grid = row_grid(rows, packs);
      auto kernel = difference_kernel<T, A, decltype(width)::value>;
      GPK_LAUNCH(kernel, grid.grid, grid.block, stream, data<A>(by), a, b, data<A>(scale), up, down, rows, packs);
    });
  });
  check_launch();
  return {plus, minus};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> consistency_backward_cuda(Tensor cotangent, Tensor a1, Tensor a2, Tensor b1,
                                                                     Tensor b2, Tensor a_coefficient,
                                                                     Tensor b_coefficient, bool to_b) {
  check_consistency_backward(cotangent, "a1", a1, "a2", a2, a_coefficient);
  const auto [ga1, ga2] = pair_backward(cotangent, a1, a2, a_coefficient);
  if (!to_b) return {ga1, ga2, nothing_like(b1), nothing_like(b1)};
  check_consistency_backward(cotangent, "b1", b1, "b2", b2, b_coefficient);
  const auto [gb1, gb2] = pair_backward(cotangent, b1, b2, b_coefficient);
  return {ga1, ga2, gb1, gb2};
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("consistency_term", TORCH_BOX(&consistency_term_cuda));
  m.impl("lipschitz_consistency", TORCH_BOX(&lipschitz_consistency_cuda));
  m.impl("consistency_backward", TORCH_BOX(&consistency_backward_cuda));
}

}  // namespace gpk::cuda
