// instance noise: x + sigma * scale * xi, four random numbers to a Philox call.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

template <typename T, typename A>
GPK_SIMD void add_noise(const T* x, T* out, A amplitude, uint64_t key, bool gaussian, int64_t begin, int64_t end,
                        int64_t count) {
  for (int64_t group = begin; group < end; ++group) {
    A numbers[4];
    random_numbers(key, uint64_t(group), gaussian, numbers);
    const int64_t first = group * 4, last = std::min(first + 4, count);
    for (int64_t i = first; i < last; ++i) out[i] = T(A(x[i]) + amplitude * numbers[i - first]);
  }
}

Tensor instance_noise_cpu(Tensor x, double sigma, std::optional<Tensor> scale, Tensor key, bool gaussian) {
  const uint64_t seed = philox_key(key);
  STD_TORCH_CHECK(!scale.has_value() || scale->numel() == 1, "scale: expected one number");
  const MemoryFormat format = common_format({&x});
  const Tensor from = in_format(x, format), out = empty_like(x, format);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A amplitude = A(sigma) * (scale.has_value() ? small_vector<A>(*scale)[0] : A(1));
    const int64_t count = x.numel();
    parallel((count + 3) / 4, kTile / 4, [&](int64_t begin, int64_t end) {
      add_noise<T, A>(data<T>(from), mutable_data<T>(out), amplitude, seed, gaussian, begin, end, count);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("instance_noise", TORCH_BOX(&instance_noise_cpu)); }

}  // namespace gpk::cpu
