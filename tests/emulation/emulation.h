// CUDA's execution model on one host thread, as kernels see it; emulation.cpp runs them.
//
// It is strict: a barrier that not all threads reach, a shuffle whose lanes disagree on the mask or read a lane that
// does not take part, a launch past the hardware's limits: all throw. Shared memory starts as NaN.
// GPK_EMULATION_ORDER=forward|reverse|random:SEED permutes the threads of a block and the blocks of a grid.
// GPK_EMULATION_BUG=NUMBER makes a bug act that a test has put into a kernel, of several in one build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>

// --- the language -------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// --- what emulation.cpp does --------------------------------------------------------------------------------------

// A race detector must not take the emulation's own doings for the kernel's.
#define GPK_UNSEEN __attribute__((no_sanitize("thread")))

namespace emulation {

// Where the running thread is.
struct Here {
  uint3 thread, block;
  dim3 size, grid;
};
extern Here here;

void run(dim3 grid, dim3 size, const std::function<void()>& kernel);
void log(const void* kernel, dim3 grid, dim3 size, std::initializer_list<std::pair<const void*, size_t>> arguments);
void set_memory(void* at, int value, size_t count);
void sync_block();
uint64_t shuffle(unsigned mask, uint64_t bits, int flipped);
void fence();
unsigned add(unsigned* at, unsigned value);
unsigned next_place();
void* shared_at(unsigned place, size_t bytes);
bool seeded(int bug);

GPK_UNSEEN inline uint3 thread_id() { return here.thread; }
GPK_UNSEEN inline uint3 block_id() { return here.block; }
GPK_UNSEEN inline dim3 block_size() { return here.size; }
GPK_UNSEEN inline dim3 grid_size() { return here.grid; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, cudaStream_t, const Arguments&... arguments) {
  const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
  const auto logged = [&](const Parameters&... each) {
    log(reinterpret_cast<const void*>(kernel), grid, size, {{&each, sizeof(each)}...});
  };
  std::apply(logged, held);
  run(grid, size, [&] { std::apply(kernel, held); });
}

}  // namespace emulation

// --- the rest of the language -------------------------------------------------------------------------------------

#define threadIdx (emulation::thread_id())
#define blockIdx (emulation::block_id())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())
inline void __syncthreads() { emulation::sync_block(); }
inline void __threadfence() { emulation::fence(); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return emulation::add(at, value); }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
  emulation::set_memory(at, value, count);
  return cudaSuccess;
}
template <typename T>
GPK_UNSEEN T __shfl_xor_sync(unsigned mask, T value, int flipped) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle(mask, bits, flipped);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

#define GPK_SHARED(T, name, count)                                 \
  static const unsigned place_of_##name = emulation::next_place(); \
  T(&name)[count] = *static_cast<T(*)[count]>(emulation::shared_at(place_of_##name, sizeof(T) * (count)))
#define GPK_LAUNCH(kernel, grid, block, stream, ...) emulation::launch(kernel, grid, block, stream, __VA_ARGS__)
