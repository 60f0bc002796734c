// Loops at the speed of memory: sums over what is read, and results that are written past the cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#include <unistd.h>
#endif

// One binary, several instruction sets: the loader picks the clone that the machine can run.
#ifdef GPK_TARGET_CLONES
#define GPK_SIMD __attribute__((target_clones(GPK_TARGET_CLONES)))
#else
#define GPK_SIMD
#endif

// For what a GPK_SIMD function calls, which takes its instruction set only when inlined.
#define GPK_INLINE __attribute__((always_inline))

namespace gpk::cpu {

constexpr int64_t kLine = 64;     // bytes of a cache line
constexpr int64_t kAhead = 1024;  // bytes; the hardware looks ahead too, but only to the end of a page

template <typename T>
GPK_INLINE inline void fetch_ahead(const T* x, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(x) + kAhead;
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kLine) __builtin_prefetch(bytes + i);
}

// The sum of term(i) over [begin, end), which reads `from`. One core reads four places in turn faster than one place
// after another. The order depends on the count alone.
template <typename T, size_t kIn, typename F>
GPK_INLINE inline double sum_of(std::array<const T*, kIn> from, int64_t begin, int64_t end, const F& term) {
  constexpr int64_t kLanes = 32, kParts = 4;
  const int64_t part = (end - begin) / (kLanes * kParts) * kLanes, rest = begin + (end - begin) / kLanes * kLanes;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = rest; i < end; ++i) sum += term(i);
  if (rest == begin) return sum;
  double lanes[kLanes] = {};
  const auto add = [&](int64_t first) GPK_INLINE {
    for (const T* x : from) fetch_ahead(x + first, kLanes);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += term(first + i);
  };
  for (int64_t i = begin; i < begin + part; i += kLanes)
    for (int64_t k = 0; k < kParts; ++k) add(i + k * part);
  for (int64_t i = begin + kParts * part; i < rest; i += kLanes) add(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return sum + lanes[0];
}

// Whether a result is larger than the last-level cache, so that writing past it saves reading its lines first.
inline bool past_cache(int64_t bytes) {
#if defined(__SSE2__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return cache > 0 && bytes > cache;
#else
  return false;
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// to[i] = value(i)
template <typename T, typename F>
struct Result {
  T* to;
  F value;
};
template <typename T, typename F>
Result(T*, F) -> Result<T, F>;

// One line from element `begin`, which starts it, past the cache.
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

// Fills results over [begin, end) from what lies in `from`; `streamed` writes whole lines past the cache.
template <typename T, size_t kIn, typename... F>
GPK_INLINE inline void write(bool streamed, std::array<const T*, kIn> from, int64_t begin, int64_t end,
                             const Result<T, F>&... results) {
  constexpr int64_t kCount = kLine / sizeof(T);
  const auto plain = [&](int64_t first, int64_t last) GPK_INLINE {
    for (int64_t i = first; i < last; ++i) ((results.to[i] = results.value(i)), ...);
  };
  const auto past_line = [](const T* x) GPK_INLINE { return int64_t(reinterpret_cast<uintptr_t>(x) % kLine); };
  int64_t i = begin;
  if (streamed) {
    const int64_t past = std::max({past_line(results.to + begin)...});
    i = std::min(end, begin + (kLine - past) % kLine / int64_t(sizeof(T)));
    plain(begin, i);
    const bool aligned = ((past_line(results.to + i) == 0) && ...);
    for (; aligned && i + kCount <= end; i += kCount) {
      for (const T* x : from) fetch_ahead(x + i, kCount);
      (stream_line(results, i), ...);
    }
  }
  plain(i, end);
}

}  // namespace gpk::cpu
