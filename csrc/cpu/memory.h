// Loops at memory bandwidth: sums, and results with non-temporal stores.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

// One binary for several instruction sets: the loader selects the clone that the machine supports.
#ifdef GPK_TARGET_CLONES
#define GPK_SIMD __attribute__((target_clones(GPK_TARGET_CLONES)))
#else
#define GPK_SIMD
#endif

// For functions that a GPK_SIMD function calls: only when inlined do they use its instruction set.
#define GPK_INLINE __attribute__((always_inline))

namespace gpk::cpu {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Prefetches a line of the next four pages for each line of x that is read, from each page in turn. The hardware
// prefetcher stops at the end of a page, and one core reads four pages concurrently faster than sequentially.
template <typename T>
GPK_INLINE inline void fetch_ahead(const T* x, int64_t count) {
  constexpr uintptr_t kPage = 4096, kPages = 4, kBlock = kPages * kPage;
  for (uintptr_t byte = 0; byte < count * sizeof(T); byte += kLine) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(x) + byte, line = at % kBlock / kLine;
    const uintptr_t next = at - at % kBlock + kBlock;
    __builtin_prefetch(reinterpret_cast<const void*>(next + line % kPages * kPage + line / kPages * kLine));
  }
}

// Whether loops that only read so many bytes in all should prefetch. Within the second-level cache it costs more than
// it gains. Past it Intel's cores gain; AMD's prefetcher crosses pages, and reads are a third slower with these
// prefetches.
inline bool reads_ahead_by_hand(int64_t bytes) {
#if defined(__SSE2__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t near = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes > near && __builtin_cpu_is("intel");
#else
  (void)bytes;
  return false;
#endif
}

// The sum of term(i) over [begin, end), which reads `from`, `ahead` if prefetches pay; its order depends on the count
// alone. kByFours: four terms are added in their own type before they are widened, for sums of terms so cheap that
// widening each would take longer than reading it.
template <bool kByFours = false, typename T, size_t kIn, typename F>
GPK_INLINE inline double sum_of(std::array<const T*, kIn> from, bool ahead, int64_t begin, int64_t end, const F& term) {
  constexpr int64_t kLanes = 32, kStep = kByFours ? 4 * kLanes : kLanes, kWorthwhile = 256;
  const auto terms = [&](int64_t i) GPK_INLINE {
    if constexpr (kByFours)
      return (term(i) + term(i + kLanes)) + (term(i + 2 * kLanes) + term(i + 3 * kLanes));
    else
      return term(i);
  };
  double sum = 0;
  int64_t i = begin;
  if (end - begin >= kWorthwhile) {
    double lanes[kLanes] = {};
    for (; i + kStep <= end; i += kStep) {
      if (ahead)
        for (const T* x : from) fetch_ahead(x + i, kStep);
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += double(terms(i + k));
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t k = i; k < end; ++k) sum += double(term(k));
  return sum;
}

// Bytes of the last-level cache; 0 where it is unknown, or without non-temporal stores.
inline int64_t last_level_cache() {
#if defined(__SSE2__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  return bytes;
#else
  return 0;
#endif
}

// Whether results exceed the last-level cache, so that non-temporal stores save reading their lines first.
inline bool past_cache(int64_t bytes) { return last_level_cache() > 0 && bytes > last_level_cache(); }

// Requests huge pages for results so large that the C library maps their memory anew each time: the fault of a small
// page costs more than writing it. Without effect where the system has none.
inline void advise_large_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kFresh = 32 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (at + kPage - 1) / kPage * kPage, last = (at + uintptr_t(bytes)) / kPage * kPage;
  if (bytes >= kFresh) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline bool starts_line(const void* x) { return reinterpret_cast<uintptr_t>(x) % kLine == 0; }

// to[i] = value(i)
template <typename T, typename F>
struct Result {
  T* to;
  F value;
};
template <typename T, typename F>
Result(T*, F) -> Result<T, F>;

// Writes one aligned line from element `begin` with non-temporal stores.
template <typename T, typename F>
GPK_INLINE inline void stream_line(const Result<T, F>& result, int64_t begin) {
  constexpr int64_t kCount = kLine / sizeof(T);
  alignas(kLine) T line[kCount];
#pragma omp simd
  for (int64_t i = 0; i < kCount; ++i) line[i] = result.value(begin + i);
#if defined(__SSE2__)
  for (int64_t i = 0; i < kLine / 16; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(result.to + begin) + i, reinterpret_cast<const __m128i*>(line)[i]);
#else
  std::copy_n(line, kCount, result.to + begin);
#endif
}

// Computes results over [begin, end) from `from`; kStreamed: whole lines by non-temporal stores.
template <bool kStreamed, typename T, size_t kIn, typename... F>
GPK_INLINE inline void write(std::array<const T*, kIn> from, int64_t begin, int64_t end,
                             const Result<T, F>&... results) {
  constexpr int64_t kCount = kLine / sizeof(T), kWorthwhile = 16 * kCount;
  const auto put = [&](int64_t i) GPK_INLINE {
    const auto store = [&](auto... values) GPK_INLINE { ((results.to[i] = values), ...); };
    store(results.value(i)...);  // every value before any store, as results may alias inputs
  };
  int64_t i = begin;
  if (kStreamed && end - begin >= kWorthwhile) {
    while (!(starts_line(results.to + i) || ...)) put(i++);
    const bool together = (starts_line(results.to + i) && ...);
    for (; together && i + kCount <= end; i += kCount) {
      for (const T* x : from) fetch_ahead(x + i, kCount);
      (stream_line(results, i), ...);
    }
  }
  for (; i < end; ++i) put(i);
}

}  // namespace gpk::cpu
