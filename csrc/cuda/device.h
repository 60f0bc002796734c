// Shared parts of the CUDA ops. Host: streams, grids, workspace. Device: wide accesses, reductions, tickets.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../formulas.h"
#include "../tensors.h"
#include "portable.h"

#ifdef GPK_HOST_EMULATION
#define GPK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(gpkernels_emulated, CPU, m)
#else
#define GPK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(gpkernels, CUDA, m)
#endif

namespace gpk::cuda {

constexpr int kThreads = 256, kWarp = 32;

// Launch bounds of every kernel: for more blocks per multiprocessor the compiler spills registers in divisions.
#define GPK_BOUNDS __launch_bounds__(gpk::cuda::kThreads, 3)

// --- host: where and how to launch --------------------------------------------------------------------------------

// Device of a tensor and PyTorch's current stream there.
class Stream {
 public:
#ifdef GPK_HOST_EMULATION
  explicit Stream(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
#else
  explicit Stream(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  operator cudaStream_t() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a kernel could not be launched: ", cudaGetErrorString(error));
}

template <typename A>
constexpr ScalarType scalar_type_of() {
  return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
}

// Casts an eps, coefficient or cotangent to the accumulation dtype, contiguous; a no-op where it is so already.
template <typename A>
Tensor in_accumulation(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  return dense.scalar_type() == scalar_type_of<A>() ? dense : torch::stable::to(dense, scalar_type_of<A>());
}

inline Tensor empty(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>{count}, dtype);
}

template <typename A>
Tensor empty_scalar(const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>{}, scalar_type_of<A>());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grid with one thread per item, up to a maximum; kernels use grid-stride loops.
inline dim3 flat_grid(int64_t count) {
  return dim3(unsigned(std::clamp<int64_t>(ceil_div(count, kThreads), 1, 1 << 20)));
}

// Grid over rows of `width` accesses: several rows per block where rows are short, several blocks per long row.
struct RowGrid {
  dim3 grid, block;
};

inline RowGrid row_grid(int64_t rows, int64_t width) {
  unsigned x = 1;
  while (x < kThreads && x < width) x *= 2;
  const unsigned y = kThreads / x;
  const int64_t across = std::clamp<int64_t>(ceil_div(width, x), 1, 1 << 16);
  return {dim3(unsigned(across), unsigned(std::clamp<int64_t>(ceil_div(rows, y), 1, 65535))), dim3(x, y)};
}

template <typename T>
constexpr int kWide = int(16 / sizeof(T));

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return uintptr_t(p) % 16 == 0; });
}

// Calls launch(width as a constant, accesses per row), with 16-byte accesses where every row is aligned for them.
template <typename T, typename F>
void with_width(int64_t cols, std::initializer_list<const void*> pointers, const F& launch) {
  if (cols % kWide<T> == 0 && aligned(pointers))
    launch(std::integral_constant<int, kWide<T>>{}, cols / kWide<T>);
  else
    launch(std::integral_constant<int, 1>{}, cols);
}

// --- device: wide accesses ----------------------------------------------------------------------------------------

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// Grid-stride loops of a row_grid: for_rows calls f(row), and for_packs calls f(i) for each pack of the row.
template <typename F>
__device__ __forceinline__ void for_rows(int64_t rows, const F& f) {
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.y) * blockDim.y)
    f(row);
}

template <typename F>
__device__ __forceinline__ void for_packs(int64_t packs, const F& f) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += int64_t(gridDim.x) * blockDim.x)
    f(i);
}

template <typename T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> load(const T* x, int64_t i) {
  return reinterpret_cast<const Pack<T, kWidth>*>(x)[i];
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* x, int64_t i, const Pack<T, kWidth>& pack) {
  reinterpret_cast<Pack<T, kWidth>*>(x)[i] = pack;
}

__device__ __forceinline__ int64_t flat_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t flat_threads() { return int64_t(gridDim.x) * blockDim.x; }

// --- device: sums -------------------------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  return value;
}

// Sum over a block of kThreads, returned to every thread. May be called repeatedly.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
  GPK_SHARED(A, sums, kThreads / kWarp);
  value = warp_sum(value);
  __syncthreads();  // sums of the previous call have been read
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = A(0);
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value += sums[warp];
  return value;
}

// Sum over kLanes neighbouring lanes, returned to each; the other lanes of the warp may diverge.
template <int kLanes, typename A>
__device__ __forceinline__ A lanes_sum(A value) {
  const unsigned mask = (0xFFFFFFFFu >> (kWarp - kLanes)) << (threadIdx.x % kWarp / kLanes * kLanes);
  for (int bits = kLanes / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(mask, value, bits);
  return value;
}

// Whether this block is the last of `blocks` to arrive; it then sees the others' earlier writes.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks) {
  GPK_SHARED(bool, last, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

// Calls f(sum of all threads' values) in one thread of the grid; the sums of the blocks, along x, are added in a fixed
// order. A single block needs no workspace.
template <typename F>
__device__ __forceinline__ void grid_sum(double value, double* totals, unsigned* ticket, const F& f) {
  value = block_sum(value);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) totals[blockIdx.x] = value;
    if (!last_block(ticket, gridDim.x)) return;
    value = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) value += totals[block];
    value = block_sum(value);
  }
  if (threadIdx.x == 0) f(value);
}

inline void reset(unsigned* tickets, int64_t count, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(tickets, 0, size_t(count) * sizeof(unsigned), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "workspace: ", cudaGetErrorString(error));
}

inline unsigned* ticket_of(const Tensor& x) { return static_cast<unsigned*>(x.mutable_data_ptr()); }

// Zero-initialised tickets.
inline Tensor tickets(const Tensor& like, int64_t count, cudaStream_t stream) {
  const Tensor made = empty(like, count, ScalarType::Int);
  reset(ticket_of(made), count, stream);
  return made;
}

// Partial sums of blocks and a ticket that is zero, in one tensor.
template <typename A>
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t sums, cudaStream_t stream)
      : made_(empty(like, sums + 1, scalar_type_of<A>())), sums_(sums) {
    reset(ticket(), 1, stream);
  }
  A* sums() const { return static_cast<A*>(made_.mutable_data_ptr()); }
  unsigned* ticket() const { return reinterpret_cast<unsigned*>(sums() + sums_); }

 private:
  Tensor made_;
  int64_t sums_;
};

}  // namespace gpk::cuda
