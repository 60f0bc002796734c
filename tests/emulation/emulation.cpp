// Runs a grid: a fiber for each thread of a block, blocks one after the other.
//
// Built for a race detector (GPK_EMULATION_RACES) it tells ThreadSanitizer which fiber runs and what a barrier, a
// shuffle and a fence order; everything else is unordered, whatever order it ran in. Built to count
// (GPK_EMULATION_TRAFFIC) it takes the place of the detector's library and adds up the bytes that kernels read and
// write in global memory.
#include "emulation.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iomanip>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(GPK_EMULATION_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

namespace emulation {

Here here;

namespace {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- what the tools are told --------------------------------------------------------------------------------------

#if defined(GPK_EMULATION_RACES)
constexpr bool kRaces = true;
constexpr unsigned kUnordered = 1;
void order_after(void* what) { __tsan_acquire(what); }
void order_before(void* what) { __tsan_release(what); }
#else
constexpr bool kRaces = false;
void order_after(void*) {}
void order_before(void*) {}
#endif

// --- fibers -------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kLanes = 32;

#if !defined(__x86_64__)
#error "the emulation switches stacks by hand, for x86-64"
#endif
// Saves the callee's registers and the stack pointer at *save, and goes on where `to` was saved.
extern "C" void emulation_switch(void** save, void* to);
__asm__(
    ".text\n.type emulation_switch,@function\nemulation_switch:\n"
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
  void* known_as = nullptr;           // to the race detector
  const unsigned* awaited = nullptr;  // runs again when *awaited != seen
  unsigned seen = 0;
  const char* where = "";
  bool fenced = false;       // since its last atomic
  void* heard_at = nullptr;  // where that was
  unsigned accesses = 0;     // to global memory, where those are counted
  bool done = false;
};

// A block's threads, its memory, and what they wait for.
class Block {
 public:
  Block(uint3 id, dim3 size, const std::function<void()>& kernel);
  ~Block();
  Block(const Block&) = delete;
  void run(const std::vector<unsigned>& order);
  void to_scheduler();
  bool owns(uintptr_t at) const;

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::pair<std::unique_ptr<unsigned char[]>, size_t>> shared;
  const std::function<void()>& kernel;
  Fiber* running = nullptr;
  std::exception_ptr error;
  std::set<std::tuple<const Warp*, unsigned, uintptr_t>> seen;  // accesses of warps, where those are counted
  unsigned barrier = 0, at_barrier = 0, alive;

 private:
  void resume(Fiber& fiber);

  uint3 id_;
  char* stacks_;
  void* scheduler_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
 public:
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

Block* current = nullptr;
char grid_begins, grid_ends;          // what a race detector orders launches by
const void* launched_from = nullptr;  // the stack there
unsigned launched = 0, set = 0;
std::pair<char*, size_t> spare_stacks;  // of the last block

void await(const unsigned& value, unsigned seen, const char* where) {
  Fiber& fiber = *current->running;
  while (value == seen) {
    fiber.awaited = &value;
    fiber.seen = seen;
    fiber.where = where;
    current->to_scheduler();
  }
  fiber.awaited = nullptr;
}

void release(Warp& warp, unsigned mask) {
  const unsigned needed = mask & ~warp.gone;
  if ((warp.arrived & needed) != needed) return;
  warp.arrived &= ~mask;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) ++warp.generations[lane];
}

// Where a fiber starts.
void entry() {
  Block& block = *current;
  Fiber& fiber = *block.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  order_after(&grid_begins);
  try {
    block.kernel();
    if (block.at_barrier) throw Error("a thread returned while others wait in __syncthreads");
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  order_before(&grid_ends);
  fiber.done = true;
  --block.alive;
  fiber.warp->gone |= 1u << fiber.index % kLanes;
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (fiber.warp->arrived >> lane & 1) release(*fiber.warp, fiber.warp->masks[lane]);
  block.to_scheduler();
  std::abort();
}

Block::Block(uint3 id, dim3 size, const std::function<void()>& kernel)
    : fibers(size.x * size.y * size.z),
      warps((fibers.size() + kLanes - 1) / kLanes),
      kernel(kernel),
      alive(unsigned(fibers.size())),
      id_(id) {
  const size_t bytes = fibers.size() * kStack;
  if (spare_stacks.second == bytes) {
    stacks_ = std::exchange(spare_stacks, {}).first;
  } else {
    void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw Error("no memory for the stacks");
    stacks_ = static_cast<char*>(made);
  }
  if (fibers.size() % kLanes) warps.back().gone = ~0u << fibers.size() % kLanes;
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.id = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.warp = &warps[i / kLanes];
#if defined(GPK_EMULATION_RACES)
    fiber.known_as = __tsan_create_fiber(0);
#endif
    void** top = reinterpret_cast<void**>(stacks_ + size_t(i + 1) * kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

Block::~Block() {
#if defined(GPK_EMULATION_RACES)
  for (const Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.known_as);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks_, fibers.size() * kStack);  // fibers end without leaving their frames
#endif
  const size_t bytes = fibers.size() * kStack;
  if (kRaces || spare_stacks.first)
    munmap(stacks_, bytes);
  else
    spare_stacks = {stacks_, bytes};
}

void Block::to_scheduler() {
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

void Block::resume(Fiber& fiber) {
  running = &fiber;
  here.thread = fiber.id;
#if defined(__SANITIZE_ADDRESS__)
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(&kept, stacks_ + size_t(fiber.index) * kStack, kStack);
#endif
#if defined(GPK_EMULATION_RACES)
  void* scheduler = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.known_as, kUnordered);
#endif
  emulation_switch(&scheduler_, fiber.stack_pointer);
#if defined(GPK_EMULATION_RACES)
  __tsan_switch_to_fiber(scheduler, kUnordered);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
}

void Block::run(const std::vector<unsigned>& order) {
  here.block = id_;
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

bool Block::owns(uintptr_t at) const {
  auto inside = [&](const void* begin, size_t bytes) { return at - uintptr_t(begin) < bytes; };
  return inside(stacks_, fibers.size() * kStack) ||
         std::any_of(shared.begin(), shared.end(), [&](const auto& s) { return inside(s.first.get(), s.second); });
}

// --- the order of threads and blocks ------------------------------------------------------------------------------

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

}  // namespace

// --- what kernels call --------------------------------------------------------------------------------------------

void run(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  if (current) throw Error("a kernel was launched by a kernel");
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64) throw Error("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid past the limits");
  ++launched;
  launched_from = __builtin_frame_address(0);
  here.grid = grid;
  here.size = size;
  struct Restore {
    ~Restore() { current = nullptr; }
  } restore;
  static Order order;
  std::vector<std::unique_ptr<Block>> kept;  // memory that another block had would look shared to a race detector
  order_before(&grid_begins);
  for (unsigned i : order.of(size_t(grid.x) * grid.y * grid.z)) {
    auto block = std::make_unique<Block>(uint3{i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}, size, kernel);
    current = block.get();
    block->run(order.of(threads));
    if (kRaces) kept.push_back(std::move(block));
  }
  order_after(&grid_ends);
}

void set_memory(void* at, int value, size_t count) {
  ++set;
  std::memset(at, value, count);
}

void sync_block() {
  Block& block = *current;
  if (block.alive != block.fibers.size()) throw Error("__syncthreads after a thread of the block has returned");
  order_before(&block.barrier);
  const unsigned seen = block.barrier;
  if (++block.at_barrier == block.fibers.size()) {
    block.at_barrier = 0;
    ++block.barrier;
  } else {
    await(block.barrier, seen, "__syncthreads");
  }
  order_after(&block.barrier);
}

static void sync_warp(unsigned mask) {
  Fiber& fiber = *current->running;
  Warp& warp = *fiber.warp;
  const unsigned lane = fiber.index % kLanes;
  if (!(mask >> lane & 1)) throw Error("a lane is not in its own mask");
  order_before(&warp);
  warp.masks[lane] = mask;
  warp.arrived |= 1u << lane;
  for (unsigned other = 0; other < kLanes; ++other)
    if ((warp.arrived & mask) >> other & 1 && warp.masks[other] != mask) throw Error("lanes disagree on their mask");
  const unsigned seen = warp.generations[lane];
  release(warp, mask);
  await(warp.generations[lane], seen, "a warp's barrier");
  order_after(&warp);
}

uint64_t shuffle(unsigned mask, uint64_t bits, int flipped) {
  Fiber& fiber = *current->running;
  Warp& warp = *fiber.warp;
  const unsigned lane = fiber.index % kLanes, from = lane ^ unsigned(flipped);
  warp.slots[lane] = bits;
  sync_warp(mask);
  if (!(mask >> from & 1) || (warp.gone >> from & 1)) throw Error("a shuffle reads a lane that does not take part");
  bits = warp.slots[from];
  sync_warp(mask);
  return bits;
}

// What a thread did before a fence and an atomic after it is seen by those that fence after an atomic there.
void fence() {
  Fiber& fiber = *current->running;
  fiber.fenced = true;
  if (fiber.heard_at) order_after(fiber.heard_at);
}

unsigned add(unsigned* at, unsigned value) {
  Fiber& fiber = *current->running;
  if (std::exchange(fiber.fenced, false)) order_before(at);
  fiber.heard_at = at;
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

unsigned next_place() {
  static unsigned places = 0;
  return places++;
}

// One allocation for each declaration and block, so that a sanitizer sees its ends; all ones is NaN.
void* shared_at(unsigned place, size_t bytes) {
  auto& shared = current->shared;
  if (shared.size() <= place) shared.resize(place + 1);
  if (!shared[place].first) {
    shared[place] = {std::make_unique<unsigned char[]>(bytes), bytes};
    std::memset(shared[place].first.get(), 0xFF, bytes);
    order_before(shared[place].first.get());
  }
  order_after(shared[place].first.get());  // the detector takes an allocation for a write
  return shared[place].first.get();
}

namespace {
std::ofstream logged;
}

// Writes a line: where the kernel is in this library, grid, block, and the bytes of each argument.
void log(const void* kernel, dim3 grid, dim3 size, std::initializer_list<std::pair<const void*, size_t>> arguments) {
  if (!logged.is_open()) return;
  Dl_info image;
  dladdr(kernel, &image);
  logged << std::hex << uintptr_t(kernel) - uintptr_t(image.dli_fbase) << std::dec;
  for (const dim3& d : {grid, size}) logged << ' ' << d.x << ',' << d.y << ',' << d.z;
  logged << std::hex << std::setfill('0');
  for (const auto& [at, bytes] : arguments) {
    logged << ' ';
    for (size_t i = 0; i < bytes; ++i) logged << std::setw(2) << int(static_cast<const unsigned char*>(at)[i]);
  }
  logged << std::dec << std::endl;
}

bool seeded(int bug) {
  static const char* const wanted = std::getenv("GPK_EMULATION_BUG");
  static const int number = wanted ? std::atoi(wanted) : 0;
  return number == bug;
}

}  // namespace emulation

extern "C" unsigned emulated_launches() { return emulation::launched; }
extern "C" unsigned emulated_memory_sets() { return emulation::set; }
extern "C" void emulated_log(const char* path) {
  emulation::logged.close();
  if (path) emulation::logged.open(path);
}

// --- counting bytes -----------------------------------------------------------------------------------------------

#if defined(GPK_EMULATION_TRAFFIC)
namespace {

uint64_t moved[2];  // read, written

// Whether an address is of this library itself, as the places of shared memory are.
bool own_image(uintptr_t at) {
  struct Image {
    uintptr_t begin = 0, end = 0;
  };
  static const Image image = [] {
    Image found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          uintptr_t end = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_LOAD)
              end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
          const uintptr_t mine = uintptr_t(&moved);
          if (mine < info->dlpi_addr || mine >= end) return 0;
          *static_cast<Image*>(data) = {info->dlpi_addr, end};
          return 1;
        },
        &found);
    return found;
  }();
  return at >= image.begin && at < image.end;
}

void count(const void* address, size_t bytes, int written) {
  using emulation::current;
  if (!current || !current->running) return;
  const uintptr_t at = uintptr_t(address);
  // The launch's arguments lie on the stack that kernels are launched from, above this block's pointer to it.
  const uintptr_t stack = uintptr_t(emulation::launched_from);
  if (current->owns(at) || own_image(at) || (at >= stack && at - stack < 8 << 20)) return;
  // Lanes that ask for the same place in the same access share one transaction.
  emulation::Fiber& fiber = *current->running;
  if (current->seen.emplace(fiber.warp, fiber.accesses++, at).second) moved[written] += bytes;
}

}  // namespace

extern "C" {
uint64_t emulated_bytes(int written) { return moved[written]; }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, size_t bytes) { count(at, bytes, 0); }
void __tsan_write_range(void* at, size_t bytes) { count(at, bytes, 1); }
#define GPK_COUNTED(bytes)                                             \
  void __tsan_read##bytes(void* at) { count(at, bytes, 0); }           \
  void __tsan_write##bytes(void* at) { count(at, bytes, 1); }          \
  void __tsan_unaligned_read##bytes(void* at) { count(at, bytes, 0); } \
  void __tsan_unaligned_write##bytes(void* at) { count(at, bytes, 1); }
// Atomics of the host's side, of reference counts and guards: one thread runs it.
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) { return std::exchange(*at, *at + value); }
char __tsan_atomic8_load(const volatile char* at, int) { return *at; }
GPK_COUNTED(1)
GPK_COUNTED(2)
GPK_COUNTED(4)
GPK_COUNTED(8)
GPK_COUNTED(16)
}
#endif
