// What tests/test_cpu_loops.py asks of the CPU's headers, which need nothing of PyTorch.
#include <cmath>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/formulas.h"

namespace {

double ulps(float got, double exact) {
  if (exact == 0) return got == 0 ? 0 : HUGE_VAL;
  return std::fabs(got - exact) / std::ldexp(1.0, std::ilogb(exact) - 23);
}

// Elements that write<kStreamed> leaves wrong, and elements beside its range that it touches, for every start within a
// line and a second result that starts as far into a line, or one element later.
template <typename T>
int64_t mistakes() {
  constexpr int64_t kRoom = 2048, kGuard = gpk::cpu::kLine / int64_t(sizeof(T));
  int64_t wrong = 0;
  std::vector<T> x(kRoom);
  for (int64_t i = 0; i < kRoom; ++i) x[i] = T(i % 1000 + 1);
  for (int64_t count : {0, 1, 15, 255, 256, 257, 700, 1023, 1024, 1500})
    for (int64_t start = kGuard; start < 2 * kGuard; ++start)
      for (int64_t apart : {0, 1}) {
        alignas(gpk::cpu::kLine) T plus[kRoom] = {}, minus[kRoom] = {};
        T* const shifted = minus + apart;
        gpk::cpu::write<true>(std::array<const T*, 1>{x.data()}, start, start + count,
                              gpk::cpu::Result{plus, [&](int64_t i) { return x[i]; }},
                              gpk::cpu::Result{shifted, [&](int64_t i) { return T(x[i] + 1); }});
        gpk::cpu::finish_streams();
        for (int64_t i = 0; i < kRoom - 1; ++i) {
          const bool inside = i >= start && i < start + count;
          wrong += plus[i] != (inside ? x[i] : T(0));
          wrong += shifted[i] != (inside ? T(x[i] + 1) : T(0));
        }
      }
  return wrong;
}

}  // namespace

extern "C" {

// Over every argument that noise can have, with low bits that do not count.
double worst_log() {
  double worst = 0;
  for (uint32_t k = 0; k < 1u << 24; ++k) {
    const double exact = -2 * std::log1p(-double(k) / (1 << 24));
    worst = std::max(worst, ulps(gpk::minus_two_log(k << 8 | k % 256), exact));
  }
  return worst;
}

double worst_cos_sin() {
  double worst = 0;
  for (int k = 0; k < 1 << 24; ++k) {
    // In eighths of a turn and what is over, so that the exact values are so near their zeros too.
    const int quarter = (k + (1 << 21)) >> 22;
    const double angle = 2 * M_PI * (double(k) / (1 << 24) - quarter / 4.0), c = std::cos(angle), s = std::sin(angle);
    const double cosines[] = {c, -s, -c, s}, sines[] = {s, c, -s, -c};
    float cosine, sine;
    gpk::cos_sin_of_turns(uint32_t(k) << 8 | uint32_t(k % 256), &cosine, &sine);
    worst = std::max({worst, ulps(cosine, cosines[quarter % 4]), ulps(sine, sines[quarter % 4])});
  }
  return worst;
}

int64_t write_mistakes(int bytes) {
  return bytes == 2 ? mistakes<uint16_t>() : bytes == 4 ? mistakes<float>() : mistakes<double>();
}
int64_t last_level_cache() { return gpk::cpu::last_level_cache(); }
}
