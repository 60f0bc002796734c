// instance_noise: x + sigma * scale * xi, four random numbers per Philox call.
#include "device.h"

namespace gpk::cuda {
namespace {

template <typename T, typename A>
__global__ void GPK_BOUNDS noise_kernel(const T* x, T* out, A sigma, const A* scale, const int64_t* key, bool gaussian,
                                        bool wide, int64_t count) {
  const A amplitude = scale ? sigma * *scale : sigma;
  const uint64_t seed = uint64_t(*key);
  for (int64_t group = flat_thread(); group * 4 < count; group += flat_threads()) {
    A numbers[4];
    random_numbers(seed, uint64_t(group), gaussian, numbers);
    if (wide && group * 4 + 4 <= count) {
      auto pack = load<T, 4>(x, group);
      for (int k = 0; k < 4; ++k) pack.at[k] = T(A(pack.at[k]) + amplitude * numbers[k]);
      store<T, 4>(out, group, pack);
    } else {
      for (int k = 0; k < 4 && group * 4 + k < count; ++k)
        out[group * 4 + k] = T(A(x[group * 4 + k]) + amplitude * numbers[k]);
    }
  }
}

Tensor instance_noise_cuda(Tensor x, double sigma, std::optional<Tensor> scale, Tensor key, bool gaussian) {
  check_instance_noise(scale, key);
  const MemoryFormat format = common_format({&x});
  const Tensor from = in_format(x, format), out = empty_like(x, format);
  if (x.numel() == 0) return out;
  const Stream stream(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Tensor factor = scale.has_value() ? in_accumulation<A>(*scale) : Tensor();
    const uintptr_t places = uintptr_t(data<T>(from)) | uintptr_t(data<T>(out));
    auto kernel = noise_kernel<T, A>;
    GPK_LAUNCH(kernel, flat_grid(ceil_div(x.numel(), 4)), dim3(kThreads), stream, data<T>(from), mutable_data<T>(out),
               A(sigma), scale.has_value() ? data<A>(factor) : nullptr, data<int64_t>(key), gaussian,
               places % sizeof(Pack<T, 4>) == 0, x.numel());
  });
  check_launch();
  return out;
}

}  // namespace

GPK_REGISTER(m) { m.impl("instance_noise", TORCH_BOX(&instance_noise_cuda)); }

}  // namespace gpk::cuda
