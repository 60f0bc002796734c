// CUDA's execution model on one host thread: a fiber for each thread of a block, blocks one after the other.
//
// It is strict: a barrier that not all threads reach, a shuffle whose lanes disagree on the mask or read a lane that
// does not take part, a launch past the hardware's limits: all throw. Shared memory starts as NaN.
// GPK_EMULATION_ORDER=forward|reverse|random:SEED permutes the threads of a block and the blocks of a grid.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// --- the language
// -------------------------------------------------------------------------------------------------------

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
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
  std::memset(at, value, count);
  return cudaSuccess;
}

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- fibers
// -------------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kLanes = 32;

#if !defined(__x86_64__)
#error "the emulation switches stacks by hand, for x86-64"
#endif
// Saves the callee's registers and the stack pointer at *save, and goes on where `to` was saved.
extern "C" void emulation_switch(void** save, void* to);
__asm__(
    ".text\n.weak emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size emulation_switch,.-emulation_switch\n");

struct Warp {
  uint64_t slots[kLanes];
  unsigned masks[kLanes];
  unsigned generations[kLanes] = {};
  unsigned arrived = 0, gone = 0;  // lanes that wait; lanes that have returned or never were
};

struct Fiber {
  void* stack_pointer;
  uint3 id;
  unsigned index;
  Warp* warp;
  const unsigned* awaited = nullptr;  // runs again when *awaited != seen
  unsigned seen = 0;
  const char* where = "";
  bool done = false;
};

class Block {
 public:
  dim3 grid, size;
  uint3 id{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  std::function<void()> kernel;
  Fiber* running = nullptr;
  std::exception_ptr error;
  unsigned barrier = 0, at_barrier = 0, alive = 0;

  Block(dim3 grid, dim3 size, std::function<void()> kernel)
      : grid(grid), size(size), kernel(std::move(kernel)), count_(size.x * size.y * size.z) {
    stacks_ = static_cast<char*>(
        mmap(nullptr, count_ * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw Error("no memory for the stacks");
  }
  ~Block() {
    forget_frames();
    munmap(stacks_, count_ * kStack);
  }

  void run(uint3 block_id, const std::vector<unsigned>& order);
  void to_scheduler();

 private:
  // Fibers end without leaving their frames, whose ends a sanitizer has marked.
  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks_, count_ * kStack);
#endif
  }
  void prepare();
  void resume(Fiber& fiber);

  unsigned count_;
  char* stacks_;
  void* scheduler_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
 public:
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

inline thread_local Block* current = nullptr;

inline void Block::to_scheduler() {
  Fiber& fiber = *running;
#if defined(__SANITIZE_ADDRESS__)
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &kept, scheduler_bottom, scheduler_size);
#endif
  emulation_switch(&fiber.stack_pointer, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
}

inline void Block::resume(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(&kept, stacks_ + size_t(fiber.index) * kStack, kStack);
#endif
  emulation_switch(&scheduler_, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
}

inline void await(const unsigned& value, unsigned seen, const char* where) {
  Fiber& fiber = *current->running;
  while (value == seen) {
    fiber.awaited = &value;
    fiber.seen = seen;
    fiber.where = where;
    current->to_scheduler();
  }
  fiber.awaited = nullptr;
}

inline void release(Warp& warp, unsigned mask) {
  const unsigned needed = mask & ~warp.gone;
  if ((warp.arrived & needed) != needed) return;
  warp.arrived &= ~mask;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) ++warp.generations[lane];
}

// Where a fiber starts.
inline void entry() {
  Block& block = *current;
  Fiber& fiber = *block.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  try {
    block.kernel();
    if (block.at_barrier) throw Error("a thread returned while others wait in __syncthreads");
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  fiber.done = true;
  --block.alive;
  fiber.warp->gone |= 1u << fiber.index % kLanes;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (fiber.warp->arrived >> lane & 1) release(*fiber.warp, fiber.warp->masks[lane]);
  block.to_scheduler();
  std::abort();
}

inline void Block::prepare() {
  forget_frames();
  fibers.assign(count_, Fiber{});
  warps.assign((count_ + kLanes - 1) / kLanes, Warp{});
  if (count_ % kLanes) warps.back().gone = ~0u << count_ % kLanes;
  shared.clear();
  barrier = at_barrier = 0;
  alive = count_;
  for (unsigned i = 0; i < count_; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.id = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.warp = &warps[i / kLanes];
    void** top = reinterpret_cast<void**>(stacks_ + size_t(i + 1) * kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

inline void Block::run(uint3 block_id, const std::vector<unsigned>& order) {
  id = block_id;
  prepare();
  while (alive && !error) {
    bool progress = false;
    for (unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.awaited && *fiber.awaited == fiber.seen)) continue;
      progress = true;
      resume(fiber);
      if (error) break;
    }
    if (progress) continue;
    std::string message = "deadlock:";
    for (const Fiber& fiber : fibers)
      if (!fiber.done && message.size() < 200)
        message += " thread " + std::to_string(fiber.index) + " waits in " + fiber.where + ";";
    throw Error(message);
  }
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
}

// --- launching
// ----------------------------------------------------------------------------------------------------------

class Order {
 public:
  Order() {
    const char* wanted = std::getenv("GPK_EMULATION_ORDER");
    const std::string name = wanted ? wanted : "forward";
    reverse_ = name == "reverse";
    random_ = name.rfind("random:", 0) == 0;
    if (random_) generator_.seed(unsigned(std::stoul(name.substr(7))));
  }
  std::vector<unsigned> of(size_t count) {
    std::vector<unsigned> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = unsigned(reverse_ ? count - 1 - i : i);
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
    return order;
  }

 private:
  bool reverse_, random_;
  std::mt19937 generator_;
};

inline unsigned& launches() {
  static unsigned count = 0;
  return count;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, cudaStream_t, const Arguments&... arguments) {
  if (current) throw Error("a kernel was launched by a kernel");
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64) throw Error("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid past the limits");
  ++launches();
  const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
  Block block(grid, size, [&] { std::apply(kernel, held); });
  struct Restore {
    ~Restore() { current = nullptr; }
  } restore;
  current = &block;
  static Order order;
  for (unsigned i : order.of(size_t(grid.x) * grid.y * grid.z))
    block.run({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}, order.of(threads));
}

// --- shared memory
// ------------------------------------------------------------------------------------------------------

inline unsigned next_place() {
  static unsigned places = 0;
  return places++;
}

// One allocation for each declaration and block, so that a sanitizer sees its ends; all ones is NaN.
inline void* shared_at(unsigned place, size_t bytes) {
  auto& shared = current->shared;
  if (shared.size() <= place) shared.resize(place + 1);
  if (!shared[place]) {
    shared[place] = std::make_unique<unsigned char[]>(bytes);
    std::memset(shared[place].get(), 0xFF, bytes);
  }
  return shared[place].get();
}

// --- barriers and shuffles
// ----------------------------------------------------------------------------------------------

inline void sync_block() {
  Block& block = *current;
  if (block.alive != block.fibers.size()) throw Error("__syncthreads after a thread of the block has returned");
  const unsigned seen = block.barrier;
  if (++block.at_barrier == block.fibers.size()) {
    block.at_barrier = 0;
    ++block.barrier;
  } else {
    await(block.barrier, seen, "__syncthreads");
  }
}

inline void sync_warp(unsigned mask) {
  Fiber& fiber = *current->running;
  Warp& warp = *fiber.warp;
  const unsigned lane = fiber.index % kLanes;
  if (!(mask >> lane & 1)) throw Error("a lane is not in its own mask");
  warp.masks[lane] = mask;
  warp.arrived |= 1u << lane;
  for (unsigned other = 0; other < kLanes; ++other)
    if ((warp.arrived & mask) >> other & 1 && warp.masks[other] != mask) throw Error("lanes disagree on their mask");
  const unsigned seen = warp.generations[lane];
  release(warp, mask);
  await(warp.generations[lane], seen, "a warp's barrier");
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Fiber& fiber = *current->running;
  Warp& warp = *fiber.warp;
  std::memcpy(&warp.slots[fiber.index % kLanes], &value, sizeof(T));
  sync_warp(mask);
  if (!(mask >> from & 1) || (warp.gone >> from & 1)) throw Error("a shuffle reads a lane that does not take part");
  std::memcpy(&value, &warp.slots[from], sizeof(T));
  sync_warp(mask);
  return value;
}

inline unsigned lane() { return current->running->index % kLanes; }

}  // namespace emulation

#define threadIdx (emulation::current->running->id)
#define blockIdx (emulation::current->id)
#define blockDim (emulation::current->size)
#define gridDim (emulation::current->grid)
inline void __syncthreads() { emulation::sync_block(); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::shuffle(mask, value, emulation::lane() ^ unsigned(bits));
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {  // one host thread: nothing can come between
  const unsigned before = *at;
  *at = before + value;
  return before;
}

#define GPK_SHARED(T, name, count)                                 \
  static const unsigned place_of_##name = emulation::next_place(); \
  T(&name)[count] = *static_cast<T(*)[count]>(emulation::shared_at(place_of_##name, sizeof(T) * (count)))
#define GPK_LAUNCH(kernel, grid, block, stream, ...) emulation::launch(kernel, grid, block, stream, __VA_ARGS__)
