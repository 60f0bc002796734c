// A whole critic step of an MLP with (leaky) ReLU: forward, input gradient, penalty, tangent and weight gradients by
// hand, ten forward passes' worth of products and a few loops between them.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

// A row-major matrix in memory that something else owns.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
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

// out = op(a) op(b), or added to it
template <typename T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, bool a_transposed, const Matrix<T>& b, bool b_transposed,
              bool add = false) {
  const Tensor to = borrowed(out, false), left = borrowed(a, a_transposed), right = borrowed(b, b_transposed);
  STABLE_TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1, 1)
                                    : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

template <typename T>
GPK_SIMD void bias_and_activation(T* y, const T* bias, T slope, bool activate, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    T* at = y + row * cols;
    if (bias)
      for (int64_t i = 0; i < cols; ++i) at[i] += bias[i];
    if (activate)
      for (int64_t i = 0; i < cols; ++i) at[i] = leaky_relu(at[i], slope);
  }
}

// to = x f'(y), told from the sign of the output y; to may be either
template <typename T>
GPK_SIMD void mask(T* to, const T* x, const T* y, T slope, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = leaky_pull(x[i], y[i], slope);
}

// to = (seeds w^T) f'(y): the cotangents below one score a row
template <typename T>
GPK_SIMD void masked_outer(T* to, const T* seeds, const T* w, const T* y, T slope, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * cols;
    for (int64_t i = 0; i < cols; ++i) to[at + i] = leaky_pull(seeds[row] * w[i], y[at + i], slope);
  }
}

// kept = t + scale * kept
template <typename T>
GPK_SIMD void join(T* kept, const T* t, const T* scale, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) kept[i] = t[i] + scale[row] * kept[i];
}

template <typename T>
GPK_SIMD void add_columns(const T* x, const T* scale, T* sums, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T s = scale ? scale[row] : T(1);
    for (int64_t i = 0; i < cols; ++i) sums[i] += s * x[row * cols + i];
  }
}

// out = eps * real + (1 - eps) * fake
template <typename T>
GPK_SIMD void mix(T* out, const T* real, const T* fake, const T* eps, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) out[i] = gpk::interpolate(real[i], fake[i], eps[row]);
}

// Calls f(row, rows) over a matrix, in parallel where it is large.
template <typename T, typename F>
void for_rows(const Matrix<T>& m, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, m.cols));
  parallel(m.rows, grain, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
}

struct Options {
  int64_t real, fake;
  ScoreLoss real_kind, fake_kind;
  double weight, target;
  bool one_sided, gradients;
};

// The layers, and their gradients so far.
template <typename T>
struct Critic {
  Critic(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<double>& slopes)
      : like(weights[0]) {
    for (size_t i = 0; i < weights.size(); ++i) {
      this->weights.push_back({const_cast<T*>(data<T>(weights[i])), weights[i].size(0), weights[i].size(1)});
      this->biases.push_back(biases[i].numel() ? data<T>(biases[i]) : nullptr);
      this->slopes.push_back(i < slopes.size() ? T(slopes[i]) : T(0));
      widest = std::max({widest, weights[i].size(0), weights[i].size(1)});
    }
  }

  size_t depth() const { return weights.size(); }

  // delta^T operand to a weight's gradient, and delta's columns, scaled by row, to its bias's.
  void add_weight_gradient(size_t l, const Matrix<T>& delta, const Matrix<T>& operand) {
    multiply<T>({mutable_data<T>(gradients[2 * l]), weights[l].rows, weights[l].cols}, delta, true, operand, false,
                added[l]);
    added[l] = true;
  }
  void add_bias_gradient(size_t l, const Matrix<T>& delta, const T* scale) {
    add_columns<T>(delta.data, scale, mutable_data<T>(gradients[2 * l + 1]), delta.rows, delta.cols);
  }

  void allocate_gradients() {
    added.assign(depth(), false);
    for (const Matrix<T>& w : weights) {
      gradients.push_back(empty_strided(like, {w.rows, w.cols}, {w.cols, 1}, dtype_of<T>()));
      gradients.push_back(empty_strided(like, {w.rows}, {1}, dtype_of<T>()));
      std::fill_n(mutable_data<T>(gradients.back()), w.rows, T(0));
    }
  }

  Tensor like;
  std::vector<Matrix<T>> weights;
  std::vector<const T*> biases;
  std::vector<T> slopes;
  int64_t widest = 0;
  std::vector<Tensor> gradients;
  std::vector<bool> added;
};

// Some groups that go through the critic as one batch: plain ones, then perhaps penalised points.
template <typename T>
class Pass {
 public:
  Pass(Critic<T>& critic, int64_t n, const std::vector<Tensor>& plain, const std::vector<Tensor>& points,
       const Options& options)
      : c_(critic),
        n_(n),
        batch_(n * int64_t(plain.size() + !points.empty())),
        plain_(n * int64_t(plain.size())),
        o_(options) {
    allocate();
    T* to = acts_[0].data;
    for (const Tensor& group : plain) to = std::copy_n(data<T>(group), group.numel(), to);
    if (points.size() == 1) std::copy_n(data<T>(points[0]), points[0].numel(), to);
    if (points.size() == 3)
      mix<T>(to, data<T>(points[0]), data<T>(points[1]), eps_of(points[2]).data(), n_, acts_[0].cols);
  }

  // Adds the adversarial loss and the penalty, and their weight gradients.
  void run(double& adversarial, double& penalty) {
    forward();
    adversarial += seed();
    if (plain_ == batch_ && !o_.gradients) return;
    pull();
    if (plain_ == batch_) return;
    penalty += direct();
    if (o_.gradients) push();
  }

 private:
  size_t depth() const { return c_.depth(); }
  int64_t penalised() const { return batch_ - plain_; }
  Matrix<T> at_points(const Matrix<T>& m) const { return {m.data + plain_ * m.cols, penalised(), m.cols}; }
  Matrix<T> at_plain(const Matrix<T>& m) const { return {m.data, plain_, m.cols}; }

  // Whether the points are scored too: their tangents and activations share one product.
  bool shared() const {
    const int64_t group = n_ ? plain_ / n_ : 0;
    return penalised() && (o_.real == group || o_.fake == group);
  }

  // Given, or drawn as by interpolate_random.
  std::vector<T> eps_of(const Tensor& eps_or_key) const {
    if (eps_or_key.scalar_type() != ScalarType::Long) return small_vector<T>(eps_or_key);
    const uint64_t key = philox_key(eps_or_key);
    std::vector<T> eps(n_);
    for (int64_t n = 0; n < n_; ++n) eps[n] = row_eps<T>(key, n);
    return eps;
  }

  // All activations; all cotangents if they are needed again, otherwise two in turn; the tangents' own buffers.
  void allocate() {
    std::vector<int64_t> sizes{batch_ * c_.weights[0].cols};
    const int64_t spares = penalised() ? (shared() ? 2 : 1) : 0;
    for (const Matrix<T>& w : c_.weights) sizes.push_back(batch_ * w.rows);
    for (const Matrix<T>& w : c_.weights) sizes.push_back(batch_ * (penalised() ? w.rows : 0));
    for (int i = 0; i < 2; ++i) sizes.push_back(penalised() ? 0 : batch_ * c_.widest);
    for (int i = 0; i < 2; ++i) sizes.push_back(i < spares ? penalised() * c_.widest : 0);
    int64_t total = 0;
    for (int64_t& size : sizes) total += size = (size + 15) / 16 * 16;
    memory_ = empty_strided(c_.like, {total}, {1}, dtype_of<T>());
    T* at = mutable_data<T>(memory_);
    size_t next = 0;
    auto take = [&] { return std::exchange(at, at + sizes[next++]); };
    acts_.push_back({take(), batch_, c_.weights[0].cols});
    for (const Matrix<T>& w : c_.weights) acts_.push_back({take(), batch_, w.rows});
    for (const Matrix<T>& w : c_.weights) deltas_.push_back({take(), batch_, w.rows});
    T* turns[2] = {take(), take()};
    if (!penalised())
      for (size_t l = 0; l < depth(); ++l) deltas_[l].data = turns[l % 2];
    for (T*& spare : spare_) spare = take();
  }

  void forward() {
    for (size_t l = 0; l < depth(); ++l) {
      const Matrix<T>& to = acts_[l + 1];
      multiply(to, acts_[l], false, c_.weights[l], true);
      for_rows(to, [&](int64_t row, int64_t rows) {
        bias_and_activation<T>(to.data + row * to.cols, c_.biases[l], c_.slopes[l], l + 1 < depth(), rows, to.cols);
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
      const bool scaled = begin >= plain_ * scores.cols;
      if (scaled) scale_.resize(n_);
      Sum sum;
      for (int64_t i = 0; i < count; ++i) {
        const T s = scores.data[begin + i];
        sum += double(score_value(kind, s));
        const T slope = score_slope(kind, s) / T(count);
        if (scaled)
          scale_[i / scores.cols] = slope;  // one score a row, or a constant slope: checked by the caller
        else
          delta.data[begin + i] = slope;
      }
      loss += sum.value() / double(count);
    }
    return loss;
  }

  // Cotangents down to the first layer's output. Plain rows alone leave their weight gradients on the way.
  void pull() {
    for (size_t l = depth() - 1;; --l) {
      if (!penalised()) {
        c_.add_weight_gradient(l, deltas_[l], acts_[l]);
        c_.add_bias_gradient(l, deltas_[l], nullptr);
      }
      if (l == 0) return;
      const Matrix<T>&to = deltas_[l - 1], &y = acts_[l], &from = deltas_[l], &w = c_.weights[l];
      if (from.cols > 1) multiply(to, from, false, w, false);
      for_rows(to, [&](int64_t row, int64_t rows) {
        const int64_t at = row * to.cols;
        if (from.cols > 1)
          mask<T>(to.data + at, to.data + at, y.data + at, c_.slopes[l - 1], rows * to.cols);
        else
          masked_outer<T>(to.data + at, from.data + row, w.data, y.data + at, c_.slopes[l - 1], rows, to.cols);
      });
    }
  }

  // The direction to push: apart from the input's rows only if those are needed again.
  Matrix<T> direction() const {
    const Matrix<T> x = at_points(acts_[0]);
    return shared() ? Matrix<T>{spare_[0], x.rows, x.cols} : x;
  }

  // The penalty of the input gradient at the points, which becomes the direction.
  double direct() {
    const Matrix<T> gradient = direction();
    multiply(gradient, at_points(deltas_[0]), false, c_.weights[0], false);
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

  // Tangents layer by layer. Each takes the place of its activation at the points, or joins it where the scores count:
  // then one product with the cotangents gives every row's weight gradient.
  void push() {
    Matrix<T> tangent = direction();
    for (size_t l = 0; l < depth(); ++l) {
      const Matrix<T> y = at_points(acts_[l]);
      if (l > 0) {
        const Matrix<T> pushed{spare_[shared() ? l % 2 : 0], y.rows, y.cols};
        multiply(pushed, tangent, false, c_.weights[l - 1], true);
        tangent = shared() ? pushed : y;
        for_rows(y, [&](int64_t row, int64_t rows) {
          const int64_t at = row * y.cols;
          mask<T>(tangent.data + at, pushed.data + at, y.data + at, c_.slopes[l - 1], rows * y.cols);
        });
      }
      if (shared()) {
        for_rows(y, [&](int64_t row, int64_t rows) {
          const int64_t at = row * y.cols;
          join<T>(y.data + at, tangent.data + at, scale_.data() + row, rows, y.cols);
        });
        c_.add_bias_gradient(l, at_points(deltas_[l]), scale_.data());
      }
      c_.add_weight_gradient(l, deltas_[l], acts_[l]);
      c_.add_bias_gradient(l, at_plain(deltas_[l]), nullptr);
    }
  }

  Critic<T>& c_;
  int64_t n_, batch_, plain_;
  Options o_;
  std::vector<Matrix<T>> acts_, deltas_;
  std::vector<T> scale_;
  Tensor memory_;
  T* spare_[2];
};

// Elements of the widest layer's output up to which all groups are one batch: half as many where a group alone has rows
// enough for products at full speed.
constexpr int64_t kBatched = 1 << 17, kEnoughRows = 256;

// Group by group where that keeps activations in cache, and memory low.
template <typename T>
void run_groups(Critic<T>& critic, const std::vector<Tensor>& plain, const std::vector<Tensor>& points,
                const Options& options, double& adversarial, double& penalty) {
  const int64_t n = (plain.empty() ? points : plain)[0].size(0);
  if (options.gradients) critic.allocate_gradients();
  const int64_t elements = n * int64_t(plain.size() + !points.empty()) * critic.widest;
  if (elements <= (n < kEnoughRows ? kBatched : kBatched / 2)) {
    Pass<T>(critic, n, plain, points, options).run(adversarial, penalty);
    return;
  }
  auto only = [&](int64_t group) {
    Options own = options;
    own.real = options.real == group ? 0 : -1;
    own.fake = options.fake == group ? 0 : -1;
    return own;
  };
  for (size_t g = 0; g < plain.size(); ++g)
    Pass<T>(critic, n, {plain[g]}, {}, only(int64_t(g))).run(adversarial, penalty);
  if (!points.empty()) Pass<T>(critic, n, {}, points, only(int64_t(plain.size()))).run(adversarial, penalty);
}

Tensor batch_like(const char* name, const Tensor& x, const Tensor& like) {
  check_same(name, x, like);
  return torch::stable::contiguous(x);
}

std::tuple<Tensor, std::vector<Tensor>> mlp_critic_step_cpu(std::vector<Tensor> plain, std::vector<Tensor> points,
                                                            std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                            std::vector<double> slopes, int64_t real, int64_t fake,
                                                            int64_t real_kind, int64_t fake_kind, double weight,
                                                            double target, bool one_sided, bool gradients) {
  STD_TORCH_CHECK(points.size() <= 1 || points.size() == 3, "points: expected none, a batch, or real, fake and eps");
  STD_TORCH_CHECK(!(plain.empty() && points.empty()) && !weights.empty(), "plain, weights: expected at least one");
  STD_TORCH_CHECK(biases.size() == weights.size(), "biases: expected one for each weight, perhaps empty");
  STD_TORCH_CHECK(slopes.size() + 1 == weights.size(), "slopes: expected one for each hidden layer");
  const int64_t count = int64_t(plain.size() + !points.empty());
  STD_TORCH_CHECK(real < count && fake < count, "real, fake: expected a group");
  const Tensor like = (plain.empty() ? points : plain)[0];
  int64_t width = like.dim() == 2 ? like.size(1) : -1;
  const Shape shape = rows_of("plain", like);
  for (Tensor& group : plain) group = batch_like("plain", group, like);
  for (size_t i = 0; i < std::min<size_t>(2, points.size()); ++i) points[i] = batch_like("points", points[i], like);
  if (points.size() == 3 && points[2].scalar_type() != ScalarType::Long) check_per_row("eps", points[2], shape);
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor &w = weights[i], &b = biases[i];
    STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == width && w.size(0) > 0, "weights: shapes do not follow each other");
    width = w.size(0);
    STD_TORCH_CHECK(b.numel() == 0 || (b.dim() == 1 && b.size(0) == width), "biases: shapes do not fit the weights");
    STD_TORCH_CHECK(w.scalar_type() == like.scalar_type() && b.scalar_type() == like.scalar_type(), "dtypes differ");
    w = torch::stable::contiguous(w);
    b = torch::stable::contiguous(b);
  }
  const Options options{real, fake, ScoreLoss(real_kind), ScoreLoss(fake_kind), weight, target, one_sided, gradients};
  auto run = [&](auto zero) -> std::tuple<Tensor, std::vector<Tensor>> {
    Critic<decltype(zero)> critic(weights, biases, slopes);
    double adversarial = 0, penalty = 0;
    run_groups(critic, plain, points, options, adversarial, penalty);
    const double parts[4] = {adversarial + weight * penalty, adversarial, penalty, 0};
    return {from_doubles(like, parts, 4), critic.gradients};
  };
  if (like.scalar_type() == ScalarType::Double) return run(double{});
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float, "plain: expected float32 or float64");
  return run(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("mlp_critic_step", TORCH_BOX(&mlp_critic_step_cpu)); }

}  // namespace gpk::cpu
