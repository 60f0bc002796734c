// instance_noise: x + sigma * scale * xi, four random numbers per Philox call.
#include "../formulas.h"
#include "loops.h"

namespace gpk::cpu {
namespace {

constexpr int64_t kGroup = 32, kBlock = 256;  // counters per vector loop; numbers generated before they are added

// Philox of counters first, first + 1, ..., one per lane.
template <typename Lane>
GPK_INLINE inline void philox_lanes(uint64_t key, uint64_t first, uint32_t (&words)[4][kGroup]) {
  Lane lanes[4][kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    lanes[0][i] = Lane(first + uint64_t(i));
    lanes[1][i] = Lane((first + uint64_t(i)) >> 32);
    lanes[2][i] = lanes[3][i] = 0;
  }
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t i = 0; i < kGroup; ++i) philox_round(lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i], k0, k1);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  for (int k = 0; k < 4; ++k)
    for (int64_t i = 0; i < kGroup; ++i) words[k][i] = uint32_t(lanes[k][i]);
}

// Lanes of 64 bits need no shuffles, but a vector multiplication of 64-bit integers.
inline bool multiplies_wide_lanes() {
#ifdef GPK_TARGET_CLONES
  return __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// Random numbers of kGroup Philox calls, in the order of random_numbers.
template <typename Lane, typename A>
GPK_INLINE inline void random_group(uint64_t key, uint64_t first, bool gaussian, A* numbers) {
  uint32_t words[4][kGroup];
  philox_lanes<Lane>(key, first, words);
  if (!gaussian) {
    for (int64_t i = 0; i < kGroup; ++i)
      for (int k = 0; k < 4; ++k) numbers[4 * i + k] = unit_interval<A>(words[k][i]);
    return;
  }
  for (int64_t i = 0; i < kGroup; ++i)
    for (int k = 0; k < 4; k += 2) {
      A pair[2];
      if constexpr (std::is_same_v<A, float>)
        gaussian_pair_by_polynomials(words[k][i], words[k + 1][i], pair);
      else
        gaussian_pair(words[k][i], words[k + 1][i], pair);
      numbers[4 * i + k] = pair[0];
      numbers[4 * i + k + 1] = pair[1];
    }
}

template <bool kStreamed, typename Lane, typename T, typename A>
GPK_SIMD void add_noise(const T* x, T* out, A amplitude, uint64_t key, bool gaussian, int64_t begin, int64_t end,
                        int64_t count) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, last = std::min(first + kBlock, count);
    A numbers[kBlock];
    for (int64_t i = first; i < last; i += 4 * kGroup)
      random_group<Lane>(key, uint64_t(i / 4), gaussian, numbers + (i - first));
    const auto noisy = [&](int64_t i) GPK_INLINE { return T(A(x[i]) + amplitude * numbers[i - first]); };
    write<kStreamed>(std::array{x}, first, last, Result{out, noisy});
  }
}

Tensor instance_noise_cpu(Tensor x, double sigma, std::optional<Tensor> scale, Tensor key, bool gaussian) {
  check_instance_noise(scale, key);
  const uint64_t seed = uint64_t(*data<int64_t>(key));
  const MemoryFormat format = common_format({&x});
  const Tensor from = in_format(x, format), out = result_like(x, format);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A amplitude = A(sigma) * (scale.has_value() ? small_vector<A>(*scale)[0] : A(1));
    const int64_t count = x.numel();
    const bool streamed = past_cache(count * sizeof(T));
    const auto kernel = multiplies_wide_lanes()
                            ? (streamed ? &add_noise<true, uint64_t, T, A> : &add_noise<false, uint64_t, T, A>)
                            : (streamed ? &add_noise<true, uint32_t, T, A> : &add_noise<false, uint32_t, T, A>);
    parallel((count + kBlock - 1) / kBlock, kTile / kBlock, [&](int64_t begin, int64_t end) {
      kernel(data<T>(from), mutable_data<T>(out), amplitude, seed, gaussian, begin, end, count);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpkernels, CPU, m) { m.impl("instance_noise", TORCH_BOX(&instance_noise_cpu)); }

}  // namespace gpk::cpu
