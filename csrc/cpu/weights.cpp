// clip_weights_ and rmsprop_: all parameters in one call, in chunks over threads.
#include <limits>

#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

// One chunk of one tensor of a list.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

template <typename F>
void for_chunks(const std::vector<Tensor>& tensors, const F& f) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += kTile)
      chunks.push_back({i, begin, std::min(begin + kTile, tensors[i].numel())});
  int64_t elements = 0;
  for (const Tensor& t : tensors) elements += t.numel();
  const int64_t count = int64_t(chunks.size());
  parallel(count, elements <= kTile ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(chunks[i]);
  });
}

// Tensors that kernels may write through flat pointers: the originals, or copies that `store` writes back.
class Flat {
 public:
  Flat(const std::vector<Tensor>& tensors, const std::vector<bool>& direct) : own_(tensors), flat_(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!direct[i]) flat_[i] = torch::stable::contiguous(tensors[i]);
  }
  const std::vector<Tensor>& tensors() const { return flat_; }
  void store() {
    for (size_t i = 0; i < own_.size(); ++i)
      if (own_[i].const_data_ptr() != flat_[i].const_data_ptr()) torch::stable::copy_(own_[i], flat_[i]);
  }

 private:
  std::vector<Tensor> own_, flat_;
};

template <typename T, typename A>
GPK_INLINE inline bool any_outside(const T* p, A c, int64_t begin, int64_t end) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t i = begin; i < end; ++i) outside |= std::fabs(A(p[i])) > c;
  return outside;
}

// A block with all weights inside is not written, which halves the traffic. After a block with a weight outside, the
// next blocks are clipped without testing, as their weights are likely to be outside as well.
template <typename T, typename A>
GPK_SIMD void clip_chunk(T* p, A c, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 512, kNeighbours = 31;
  for (int64_t first = begin; first < end;) {
    int64_t last = std::min(first + kBlock, end);
    if (any_outside(p, c, first, last)) {
      last = std::min(last + kNeighbours * kBlock, end);
      for (int64_t i = first; i < last; ++i) p[i] = T(clip(A(p[i]), c));
    }
    first = last;
  }
}

void clip_weights_cpu(std::vector<Tensor> params, double c) {
  check_writable("params", params);
  std::vector<bool> direct;
  for (const Tensor& p : params) {
    dispatch(p, [](auto) {});
    direct.push_back(is_dense(p));
  }
  Flat flat(params, direct);
  for_chunks(flat.tensors(), [&](const Chunk& chunk) {
    const Tensor& p = flat.tensors()[chunk.tensor];
    dispatch(p, [&](auto zero) {
      using T = decltype(zero);
      clip_chunk<T, Accumulate<T>>(mutable_data<T>(p), Accumulate<T>(c), chunk.begin, chunk.end);
    });
  });
  flat.store();
}

template <bool kCentered, bool kMomentum, bool kWeightDecay, typename T, typename A>
GPK_SIMD void rmsprop_chunk(T* p, const T* g, T* square, T* average, T* buffer, RmspropOptions<A> options,
                            int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    A param = A(p[i]), s = A(square[i]), a = kCentered ? A(average[i]) : A(0), b = kMomentum ? A(buffer[i]) : A(0);
    gpk::rmsprop<kCentered, kMomentum, kWeightDecay>(param, A(g[i]), s, a, b, options);
    p[i] = T(param);
    square[i] = T(s);
    if (kCentered) average[i] = T(a);
    if (kMomentum) buffer[i] = T(b);
  }
}

template <typename T, typename A, typename... Args>
void rmsprop_variant(bool centered, bool momentum, bool decay, Args... args) {
  using Kernel = void (*)(T*, const T*, T*, T*, T*, RmspropOptions<A>, int64_t, int64_t);
  static constexpr Kernel kernels[2][2][2] = {
      {{&rmsprop_chunk<false, false, false, T, A>, &rmsprop_chunk<false, false, true, T, A>},
       {&rmsprop_chunk<false, true, false, T, A>, &rmsprop_chunk<false, true, true, T, A>}},
      {{&rmsprop_chunk<true, false, false, T, A>, &rmsprop_chunk<true, false, true, T, A>},
       {&rmsprop_chunk<true, true, false, T, A>, &rmsprop_chunk<true, true, true, T, A>}}};
  kernels[centered][momentum][decay](args...);
}

void rmsprop_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> square_avgs,
                 std::vector<Tensor> grad_avgs, std::vector<Tensor> momentum_buffers, double lr, double alpha,
                 double eps, double weight_decay, double momentum, bool maximize, std::optional<double> clip) {
  check_rmsprop(params, grads, square_avgs, grad_avgs, momentum_buffers);
  const bool centered = !grad_avgs.empty(), with_momentum = !momentum_buffers.empty();
  std::vector<bool> direct(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    dispatch(params[i], [](auto) {});
    direct[i] = is_dense(params[i]) && same_layout(params[i], grads[i]) && same_layout(params[i], square_avgs[i]) &&
                (!centered || same_layout(params[i], grad_avgs[i])) &&
                (!with_momentum || same_layout(params[i], momentum_buffers[i]));
  }
  Flat p(params, direct), g(grads, direct), square(square_avgs, direct), average(grad_avgs, direct),
      buffer(momentum_buffers, direct);
  for_chunks(p.tensors(), [&](const Chunk& chunk) {
    const size_t i = chunk.tensor;
    dispatch(params[i], [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const RmspropOptions<A> options{A(lr),
                                      A(alpha),
                                      A(1 - alpha),
                                      A(eps),
                                      A(weight_decay),
                                      A(momentum),
                                      A(maximize ? -1 : 1),
                                      A(clip.value_or(std::numeric_limits<double>::infinity()))};
      rmsprop_variant<T, A>(
          centered, with_momentum, weight_decay != 0, mutable_data<T>(p.tensors()[i]), data<T>(g.tensors()[i]),
          mutable_data<T>(square.tensors()[i]), centered ? mutable_data<T>(average.tensors()[i]) : nullptr,
          with_momentum ? mutable_data<T>(buffer.tensors()[i]) : nullptr, options, chunk.begin, chunk.end);
    });
  });
  for (Flat* list : {&p, &square, &average, &buffer}) list->store();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) {
  m.impl("clip_weights_", TORCH_BOX(&clip_weights_cpu));
  m.impl("rmsprop_", TORCH_BOX(&rmsprop_cpu));
}

}  // namespace gpk::cpu
