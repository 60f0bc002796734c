// One row between two, for the kernels that interpolate.
#pragma once

#include "device.h"

namespace gpk::cuda {

// A row's eps: given, or drawn where there is a key.
template <typename A>
__device__ __forceinline__ A eps_of(const A* eps, const int64_t* key, int64_t row) {
  return key ? row_eps<A>(uint64_t(*key), row) : eps[row];
}

template <typename T, typename A, int kWidth>
__device__ __forceinline__ void mix_row(const T* real, const T* fake, T* out, A eps, int64_t row, int64_t packs) {
  for_packs(packs, [&](int64_t i) {
    const auto r = load<T, kWidth>(real, row * packs + i), f = load<T, kWidth>(fake, row * packs + i);
    Pack<T, kWidth> o;
    for (int k = 0; k < kWidth; ++k) o.at[k] = T(gpk::interpolate(A(r.at[k]), A(f.at[k]), eps));
    store(out, row * packs + i, o);
  });
}

}  // namespace gpk::cuda
