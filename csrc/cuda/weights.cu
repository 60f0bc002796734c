// clip_weights_ and rmsprop_: hundreds of tensors of any sizes in one launch.
#include <limits>
#include <map>

#include "device.h"

namespace gpk::cuda {
namespace {

constexpr int64_t kChunk = 16 * kThreads;  // elements per block

// Addresses of tensors and their first blocks, passed as a kernel argument, of which a kernel may have 32764 bytes.
template <int kLists, int kTensors>
struct Table {
  void* data[kLists][kTensors];
  int64_t counts[kTensors];
  unsigned first_block[kTensors + 1];
  int tensors;
};

template <int kLists>
constexpr int kMost = 30000 / (8 * kLists + 8 + 4);

// Calls f(width as a constant, tensor, i) for each access of this block, i counting accesses of that width. Accesses
// are of 16 bytes where a tensor is aligned in every list, except for its last few elements.
template <typename T, typename Table, typename F>
__device__ __forceinline__ void for_elements(const Table& table, const F& f) {
  int low = 0, high = table.tensors - 1;
  while (low < high) {  // the last tensor whose first block is not beyond this one
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t begin = int64_t(blockIdx.x - table.first_block[low]) * kChunk;
  const int64_t end = begin + kChunk < table.counts[low] ? begin + kChunk : table.counts[low];
  uintptr_t addresses = 0;
  for (const auto& list : table.data) addresses |= uintptr_t(list[low]);
  const int64_t wide = addresses % 16 ? begin : begin + (end - begin) / kWide<T> * kWide<T>;
  for (int64_t i = begin / kWide<T> + threadIdx.x; i < wide / kWide<T>; i += kThreads)
    f(std::integral_constant<int, kWide<T>>{}, low, i);
  for (int64_t i = wide + threadIdx.x; i < end; i += kThreads) f(std::integral_constant<int, 1>{}, low, i);
}

template <typename T, typename A, typename Table>
__global__ void GPK_BOUNDS clip_kernel(const Table table, A c) {
  for_elements<T>(table, [&](auto width, int tensor, int64_t i) {
    constexpr int kWidth = decltype(width)::value;
    T* p = static_cast<T*>(table.data[0][tensor]);
    auto pack = load<T, kWidth>(p, i);
    for (int k = 0; k < kWidth; ++k) pack.at[k] = T(clip(A(pack.at[k]), c));
    store(p, i, pack);
  });
}

template <typename T, typename A, bool kCentered, bool kMomentum, bool kWeightDecay, typename Table>
__global__ void GPK_BOUNDS rmsprop_kernel(const Table table, RmspropOptions<A> options) {
  for_elements<T>(table, [&](auto width, int tensor, int64_t i) {
    constexpr int kWidth = decltype(width)::value;
    auto at = [&](int list) { return static_cast<T*>(table.data[list][tensor]); };
    auto p = load<T, kWidth>(at(0), i), square = load<T, kWidth>(at(2), i);
    const auto g = load<T, kWidth>(at(1), i);
    Pack<T, kWidth> average{}, buffer{};
    if (kCentered) average = load<T, kWidth>(at(3), i);
    if (kMomentum) buffer = load<T, kWidth>(at(4), i);
    for (int k = 0; k < kWidth; ++k) {
      A wide[4] = {A(p.at[k]), A(square.at[k]), A(average.at[k]), A(buffer.at[k])};
      gpk::rmsprop<kCentered, kMomentum, kWeightDecay>(wide[0], A(g.at[k]), wide[1], wide[2], wide[3], options);
      p.at[k] = T(wide[0]);
      square.at[k] = T(wide[1]);
      average.at[k] = T(wide[2]);
      buffer.at[k] = T(wide[3]);
    }
    store(at(0), i, p);
    store(at(2), i, square);
    if (kCentered) store(at(3), i, average);
    if (kMomentum) store(at(4), i, buffer);
  });
}

// Tensors that kernels may write through flat pointers: the originals where all of a parameter's tensors are dense in
// one order, otherwise copies that `store` writes back.
class Flat {
 public:
  explicit Flat(std::vector<std::vector<Tensor>> lists) : own_(std::move(lists)), flat_(own_) {
    for (size_t i = 0; i < own_[0].size(); ++i) {
      bool direct = is_dense(own_[0][i]);
      for (const auto& list : own_) direct = direct && (list.empty() || same_layout(list[i], own_[0][i]));
      for (auto& list : flat_)
        if (!direct && !list.empty()) list[i] = torch::stable::contiguous(list[i]);
    }
  }
  void store() {
    for (size_t k = 0; k < own_.size(); ++k)
      for (size_t i = 0; k != 1 && i < own_[k].size(); ++i)  // list 1 has the gradients, which are read-only
        if (own_[k][i].const_data_ptr() != flat_[k][i].const_data_ptr()) torch::stable::copy_(own_[k][i], flat_[k][i]);
  }

  // Calls launch(table, blocks) with all tensors of a dtype, split into full tables.
  template <int kLists, typename F>
  void for_tables(ScalarType dtype, const F& launch) const {
    Table<kLists, kMost<kLists>> table{};
    unsigned blocks = 0;
    auto flush = [&] {
      table.first_block[table.tensors] = blocks;
      if (table.tensors) launch(table, blocks);
      table.tensors = 0;
      blocks = 0;
    };
    for (size_t i = 0; i < flat_[0].size(); ++i) {
      const Tensor& p = flat_[0][i];
      if (p.scalar_type() != dtype || p.numel() == 0) continue;
      const int64_t more = ceil_div(p.numel(), kChunk);
      STD_TORCH_CHECK(more < 0x7FFFFFFF, "params: expected tensors of at most 2^43 elements, got shape ", text_of(p));
      if (table.tensors == kMost<kLists> || int64_t(blocks) + more > 0x7FFFFFFF) flush();
      for (int k = 0; k < kLists; ++k)
        table.data[k][table.tensors] = flat_[k].empty() ? nullptr : const_cast<void*>(flat_[k][i].const_data_ptr());
      table.counts[table.tensors] = p.numel();
      table.first_block[table.tensors++] = blocks;
      blocks += unsigned(more);
    }
    flush();
  }

 private:
  std::vector<std::vector<Tensor>> own_, flat_;
};

// Calls f(a zero of the dtype, the dtype) for each dtype among the parameters.
template <typename F>
void for_dtypes(const std::vector<Tensor>& params, const F& f) {
  std::map<ScalarType, Tensor> found;
  for (const Tensor& p : params) found.emplace(p.scalar_type(), p);
  for (const auto& [dtype, p] : found) dispatch(p, [&, dtype = dtype](auto zero) { f(zero, dtype); });
}

void clip_weights_cuda(std::vector<Tensor> params, double c) {
  check_writable("params", params);
  if (params.empty()) return;
  const Stream stream(params[0]);
  Flat flat({params});
  for_dtypes(params, [&](auto zero, ScalarType dtype) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    flat.template for_tables<1>(dtype, [&](const auto& table, unsigned blocks) {
      auto kernel = clip_kernel<T, A, std::decay_t<decltype(table)>>;
      GPK_LAUNCH(kernel, dim3(blocks), dim3(kThreads), stream, table, A(c));
    });
  });
  check_launch();
  flat.store();
}

void rmsprop_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> square_avgs,
                  std::vector<Tensor> grad_avgs, std::vector<Tensor> momentum_buffers, double lr, double alpha,
                  double eps, double weight_decay, double momentum, bool maximize, std::optional<double> c) {
  check_rmsprop(params, grads, square_avgs, grad_avgs, momentum_buffers);
  if (params.empty()) return;
  const bool centered = !grad_avgs.empty(), with_momentum = !momentum_buffers.empty(), decay = weight_decay != 0;
  const Stream stream(params[0]);
  Flat flat({params, grads, square_avgs, grad_avgs, momentum_buffers});
  for_dtypes(params, [&](auto zero, ScalarType dtype) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const RmspropOptions<A> options{
        A(lr),           A(alpha),    A(1 - alpha),         A(eps),
        A(weight_decay), A(momentum), A(maximize ? -1 : 1), A(c.value_or(std::numeric_limits<double>::infinity()))};
    flat.template for_tables<5>(dtype, [&](const auto& table, unsigned blocks) {
      using Arguments = std::decay_t<decltype(table)>;
      using Kernel = void (*)(const Arguments, RmspropOptions<A>);
      static constexpr Kernel kernels[2][2][2] = {
          {{&rmsprop_kernel<T, A, false, false, false, Arguments>,
            &rmsprop_kernel<T, A, false, false, true, Arguments>},
           {&rmsprop_kernel<T, A, false, true, false, Arguments>, &rmsprop_kernel<T, A, false, true, true, Arguments>}},
          {{&rmsprop_kernel<T, A, true, false, false, Arguments>, &rmsprop_kernel<T, A, true, false, true, Arguments>},
           {&rmsprop_kernel<T, A, true, true, false, Arguments>, &rmsprop_kernel<T, A, true, true, true, Arguments>}}};
      auto kernel = kernels[centered][with_momentum][decay];
      GPK_LAUNCH(kernel, dim3(blocks), dim3(kThreads), stream, table, options);
    });
  });
  check_launch();
  flat.store();
}

}  // namespace

GPK_REGISTER(m) {
  m.impl("clip_weights_", TORCH_BOX(&clip_weights_cuda));
  m.impl("rmsprop_", TORCH_BOX(&rmsprop_cuda));
}

}  // namespace gpk::cuda
