// A whole critic step of an MLP with (leaky) ReLU: forward, input gradient, penalty, tangent and weight gradients by
// hand, ten forward passes' worth of products and a few loops between them.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../formulas.h"
#include "tensors.h"

namespace gpk::cpu {
namespace {

// A row-major matrix in memory that something else owns.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  Matrix from(int64_t row) const { return {data + row * cols, rows - row, cols}; }
  Matrix first(int64_t count) const { return {data, count, cols}; }
};

template <typename T>
int32_t dtype_of() {
  return std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

template <typename T>
Tensor borrowed(const Matrix<T>& m, bool transposed) {
  const int64_t plain[2] = {m.rows, m.cols}, swapped[2] = {m.cols, m.rows};
  const int64_t along[2] = {m.cols, 1}, across[2] = {1, m.cols};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(m.data, 2, transposed ? swapped : plain,
                                                                   transposed ? across : along, 0, dtype_of<T>(),
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = op(a) op(b)
template <typename T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, bool a_transposed, const Matrix<T>& b, bool b_transposed) {
  const Tensor to = borrowed(out, false), left = borrowed(a, a_transposed), right = borrowed(b, b_transposed);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

template <typename T>
GPK_SIMD void bias_and_activation(T* y, const T* bias, T slope, bool activate, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    T* at = y + row * cols;
    if (bias)
      for (int64_t i = 0; i < cols; ++i) at[i] += bias[i];
    if (activate)
      for (int64_t i = 0; i < cols; ++i) at[i] = at[i] > T(0) ? at[i] : slope * at[i];
  }
}

// x *= f'(y), told from the sign of the output y
template <typename T>
GPK_SIMD void mask(T* x, const T* y, T slope, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = y[i] > T(0) ? x[i] : slope * x[i];
}

// kept = t + scale * kept: what the weights of penalised rows are multiplied with
template <typename T>
GPK_SIMD void join(T* kept, const T* t, const T* scale, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T s = scale ? scale[row] : T(0);
    T* to = kept + row * cols;
    const T* from = t + row * cols;
    if (scale)
      for (int64_t i = 0; i < cols; ++i) to[i] = from[i] + s * to[i];
    else
      for (int64_t i = 0; i < cols; ++i) to[i] = from[i];
  }
}

template <typename T>
GPK_SIMD void add_columns(const T* x, const T* scale, T* sums, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T s = scale ? scale[row] : T(1);
    for (int64_t i = 0; i < cols; ++i) sums[i] += s * x[row * cols + i];
  }
}

struct Options {
  int64_t plain_groups, real, fake;
  ScoreLoss real_kind, fake_kind;
  double weight, target;
  bool one_sided, gradients;
};

template <typename T>
class Step {
 public:
  Step(const std::vector<Tensor>& groups, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
       const std::vector<double>& slopes, const Options& options)
      : n_(groups[0].size(0)), batch_(n_ * int64_t(groups.size())), plain_(n_ * options.plain_groups), o_(options) {
    for (size_t i = 0; i < weights.size(); ++i) {
      weights_.push_back({const_cast<T*>(data<T>(weights[i])), weights[i].size(0), weights[i].size(1)});
      biases_.push_back(biases[i].numel() ? data<T>(biases[i]) : nullptr);
      slopes_.push_back(i < slopes.size() ? T(slopes[i]) : T(0));
    }
    allocate();
    for (size_t g = 0; g < groups.size(); ++g)
      std::copy_n(data<T>(groups[g]), groups[g].numel(), acts_[0].data + int64_t(g) * n_ * acts_[0].cols);
  }

  // Returns the adversarial loss and the penalty.
  std::pair<double, double> run() {
    forward();
    const double adversarial = seed();
    if (plain_ == batch_) {
      if (o_.gradients) {
        pull();
        collect();
      }
      return {adversarial, 0};
    }
    pull();
    const double penalty = direct();
    if (o_.gradients) {
      push();
      collect();
    }
    return {adversarial, penalty};
  }

  std::vector<Tensor> gradients;

 private:
  size_t depth() const { return weights_.size(); }
  int64_t penalised() const { return batch_ - plain_; }

  // Activations, their cotangents, and two buffers for tangents: blocks that the allocator can hand out again.
  void allocate() {
    int64_t widest = weights_[0].cols;
    acts_.push_back(take(batch_, weights_[0].cols));
    for (const auto& w : weights_) {
      widest = std::max(widest, w.rows);
      acts_.push_back(take(batch_, w.rows));
      deltas_.push_back(take(batch_, w.rows));
    }
    if (plain_ == batch_) return;
    for (T*& spare : spare_) spare = take(penalised(), widest).data;
  }

  Matrix<T> take(int64_t rows, int64_t cols) {
    memory_.push_back(empty_strided({rows, cols}, {cols, 1}, dtype_of<T>()));
    return {mutable_data<T>(memory_.back()), rows, cols};
  }

  void forward() {
    for (size_t l = 0; l < depth(); ++l) {
      const Matrix<T>&from = acts_[l], &to = acts_[l + 1];
      multiply(to, from, false, weights_[l], true);
      parallel_rows(to, [&](int64_t row, int64_t count) {
        bias_and_activation<T>(to.data + row * to.cols, biases_[l], slopes_[l], l + 1 < depth(), count, to.cols);
      });
    }
  }

  // The scores' cotangents: of the loss at plain rows, 1 at penalised rows; those of the loss go to scale_ there.
  double seed() {
    const Matrix<T>&scores = acts_.back(), &delta = deltas_.back();
    std::fill_n(delta.data, batch_ * delta.cols, T(1));
    double loss = 0;
    for (const auto& [group, kind] : {std::pair{o_.real, o_.real_kind}, std::pair{o_.fake, o_.fake_kind}}) {
      if (group < 0) continue;
      const int64_t begin = group * n_ * scores.cols, count = n_ * scores.cols;
      const bool shared = group >= o_.plain_groups;
      if (shared) scale_.resize(n_);
      Sum sum;
      for (int64_t i = 0; i < count; ++i) {
        const T s = scores.data[begin + i];
        sum += double(score_value(kind, s));
        const T slope = score_slope(kind, s) / T(count);
        if (shared)
          scale_[i / scores.cols] = slope;  // one score a row, or a constant slope: checked by the caller
        else
          delta.data[begin + i] = slope;
      }
      loss += sum.value() / double(count);
    }
    return loss;
  }

  void pull() {
    for (size_t l = depth() - 1; l > 0; --l) {
      const Matrix<T>& to = deltas_[l - 1];
      multiply(to, deltas_[l], false, weights_[l], false);
      parallel_rows(to, [&](int64_t row, int64_t count) {
        mask<T>(to.data + row * to.cols, acts_[l].data + row * to.cols, slopes_[l - 1], count * to.cols);
      });
    }
  }

  // The penalty of the input gradient at penalised rows, and the direction to push, in spare_[0].
  double direct() {
    const Matrix<T> gradient{spare_[0], penalised(), weights_[0].cols};
    multiply(gradient, deltas_[0].from(plain_), false, weights_[0], false);
    Sum sum;
    for (int64_t row = 0; row < gradient.rows; ++row) {
      T* g = gradient.data + row * gradient.cols;
      double squared = 0;
      for (int64_t i = 0; i < gradient.cols; ++i) squared += double(g[i]) * double(g[i]);
      const PenaltyRow<double> result = penalty_row(squared, o_.target, o_.one_sided, 1.0 / double(gradient.rows));
      sum += result.value;
      const T coefficient = T(o_.weight * result.coefficient);
      for (int64_t i = 0; i < gradient.cols; ++i) g[i] *= coefficient;
    }
    return sum.value() / double(gradient.rows);
  }

  // Tangents layer by layer; each replaces the penalised rows of the activations it belongs to.
  void push() {
    const T* scale = scale_.empty() ? nullptr : scale_.data();
    for (size_t l = 0; l < depth(); ++l) {
      const Matrix<T> t{spare_[l % 2], penalised(), weights_[l].cols}, kept = acts_[l].from(plain_);
      if (l > 0) {
        multiply(t, {spare_[(l - 1) % 2], penalised(), weights_[l - 1].cols}, false, weights_[l - 1], true);
      }
      parallel_rows(t, [&](int64_t row, int64_t count) {
        T *tangent = t.data + row * t.cols, *own = kept.data + row * t.cols;
        if (l > 0) mask<T>(tangent, own, slopes_[l - 1], count * t.cols);
        join<T>(own, tangent, scale ? scale + row : nullptr, count, t.cols);
      });
    }
  }

  void collect() {
    const int32_t dtype = dtype_of<T>();
    for (size_t l = 0; l < depth(); ++l) {
      const Matrix<T>&w = weights_[l], &delta = deltas_[l];
      const Tensor to_weight = empty_strided({w.rows, w.cols}, {w.cols, 1}, dtype);
      multiply<T>({mutable_data<T>(to_weight), w.rows, w.cols}, delta, true, acts_[l], false);
      gradients.push_back(to_weight);
      const Tensor to_bias = empty_strided({w.rows}, {1}, dtype);
      T* sums = mutable_data<T>(to_bias);
      std::fill_n(sums, w.rows, T(0));
      add_columns<T>(delta.data, nullptr, sums, plain_, w.rows);
      if (!scale_.empty()) add_columns<T>(delta.from(plain_).data, scale_.data(), sums, penalised(), w.rows);
      gradients.push_back(to_bias);
    }
  }

  template <typename F>
  static void parallel_rows(const Matrix<T>& m, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, m.cols));
    parallel(m.rows, grain, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
  }

  int64_t n_, batch_, plain_;
  Options o_;
  std::vector<Matrix<T>> weights_, acts_, deltas_;
  std::vector<const T*> biases_;
  std::vector<T> slopes_, scale_;
  std::vector<Tensor> memory_;
  T* spare_[2] = {nullptr, nullptr};
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> mlp_critic_step_cpu(
    std::vector<Tensor> groups, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<double> slopes,
    int64_t plain_groups, int64_t real, int64_t fake, int64_t real_kind, int64_t fake_kind, double weight,
    double target, bool one_sided, bool gradients) {
  STD_TORCH_CHECK(!groups.empty() && !weights.empty(), "groups, weights: expected at least one");
  STD_TORCH_CHECK(biases.size() == weights.size(), "biases: expected one for each weight, perhaps empty");
  STD_TORCH_CHECK(slopes.size() + 1 == weights.size(), "slopes: expected one for each hidden layer");
  const int64_t count = int64_t(groups.size());
  STD_TORCH_CHECK(plain_groups == count || plain_groups == count - 1, "plain_groups: expected all, or all but one");
  STD_TORCH_CHECK(real < count && fake < count, "real, fake: expected a group");
  const Tensor& like = groups[0];
  int64_t width = like.dim() == 2 ? like.size(1) : -1;
  rows_of("groups", like);
  for (Tensor& g : groups) {
    check_same("groups", g, like);
    g = torch::stable::contiguous(g);
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor &w = weights[i], &b = biases[i];
    STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == width && w.size(0) > 0, "weights: shapes do not follow each other");
    width = w.size(0);
    STD_TORCH_CHECK(b.numel() == 0 || (b.dim() == 1 && b.size(0) == width), "biases: shapes do not fit the weights");
    STD_TORCH_CHECK(w.scalar_type() == like.scalar_type() && b.scalar_type() == like.scalar_type(), "dtypes differ");
    w = torch::stable::contiguous(w);
    b = torch::stable::contiguous(b);
  }
  const Options options{plain_groups, real,      fake,     ScoreLoss(real_kind), ScoreLoss(fake_kind), weight,
                        target,       one_sided, gradients};
  auto run = [&](auto zero) -> std::tuple<Tensor, Tensor, std::vector<Tensor>> {
    Step<decltype(zero)> step(groups, weights, biases, slopes, options);
    const auto [adversarial, penalty] = step.run();
    return {from_doubles(like, &adversarial, 1, true), from_doubles(like, &penalty, 1, true), step.gradients};
  };
  if (like.scalar_type() == ScalarType::Double) return run(double{});
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float, "groups: expected float32 or float64");
  return run(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("mlp_critic_step", TORCH_BOX(&mlp_critic_step_cpu)); }

}  // namespace gpk::cpu
