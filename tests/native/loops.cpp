// What tests/test_cpu_loops.py asks of the CPU's headers, which need nothing of PyTorch.
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/formulas.h"

namespace {

double ulps(float got, double exact) {
  if (exact == 0) return got == 0 ? 0 : HUGE_VAL;
  return std::fabs(got - exact) / std::ldexp(1.0, std::ilogb(exact) - 23);
}

// Errors in units of the last place of an exact result, which may be subnormal.
template <typename A>
double ulps_of(A got, long double exact) {
  if (std::isinf(got) || std::isnan(got)) return HUGE_VAL;
  const int least = std::numeric_limits<A>::min_exponent - 1;
  const int exponent = exact == 0 ? least : std::max(least, std::ilogb(exact));
  return double(std::fabs((long double)got - exact) /
                std::ldexp(1.0L, exponent - (std::numeric_limits<A>::digits - 1)));
}

// The worst error of `got` against `exact` over numbers of both signs: the smallest, all magnitudes up to 2^11, and
// neighbours of each place where the argument's reduction or scaling steps.
template <typename A, typename F, typename G>
double worst_over_numbers(const F& got, const G& exact) {
  double worst = 0;
  const auto check = [&](A x) {
    for (A signed_x : {x, -x}) worst = std::max(worst, ulps_of<A>(got(signed_x), exact((long double)signed_x)));
  };
  for (A x : {A(0), std::numeric_limits<A>::denorm_min(), std::numeric_limits<A>::min()}) check(x);
  for (A x = std::ldexp(A(1), -60); x < A(2048); x *= A(1) + std::ldexp(A(1), -14)) check(x);
  for (int half = 1; half < 2 * 1080; ++half) {
    A x = A(half * 0.34657359027997264L);  // log(2) / 2
    for (int k = 0; k < 20; ++k) x = std::nextafter(x, A(0));
    for (int k = 0; k < 40; ++k, x = std::nextafter(x, A(HUGE_VAL))) check(x);
  }
  return worst;
}

template <typename A>
double worst_softplus() {
  return worst_over_numbers<A>([](A x) { return gpk::softplus(x); },
                               [](long double x) { return std::max(x, 0.0L) + std::log1p(std::exp(-std::fabs(x))); });
}

template <typename A>
double worst_sigmoid() {
  const auto exact = [](long double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); };
  return worst_over_numbers<A>([](A x) { return gpk::sigmoid(x); }, exact);
}

// Whether infinities and NaN come out as they should.
template <typename A>
bool keeps_special_numbers() {
  const A infinity = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  return gpk::softplus(infinity) == infinity && gpk::softplus(-infinity) == 0 && gpk::sigmoid(infinity) == 1 &&
         gpk::sigmoid(-infinity) == 0 && std::isnan(gpk::softplus(nan)) && std::isnan(gpk::softplus(-nan)) &&
         std::isnan(gpk::sigmoid(nan)) && std::isnan(gpk::sigmoid(-nan)) &&
         gpk::softplus(std::numeric_limits<A>::max()) == std::numeric_limits<A>::max() &&
         gpk::softplus(-std::numeric_limits<A>::max()) == 0;
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

double worst_softplus_of(int bytes) { return bytes == 4 ? worst_softplus<float>() : worst_softplus<double>(); }
double worst_sigmoid_of(int bytes) { return bytes == 4 ? worst_sigmoid<float>() : worst_sigmoid<double>(); }
bool special_numbers_stay(int bytes) {
  return bytes == 4 ? keeps_special_numbers<float>() : keeps_special_numbers<double>();
}

int64_t write_mistakes(int bytes) {
  return bytes == 2 ? mistakes<uint16_t>() : bytes == 4 ? mistakes<float>() : mistakes<double>();
}
int64_t last_level_cache() { return gpk::cpu::last_level_cache(); }
}
