// Arithmetic of each op, shared by host and device. gpkernels/ops has the specification.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GPK_HD __host__ __device__ __forceinline__
#else
#define GPK_HD inline __attribute__((always_inline))  // a call would keep a loop from being vectorised
#endif
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
#define GPK_ON_DEVICE
#endif

namespace gpk {

// --- random numbers ---------------------------------------------------------------------------------------------

struct Words {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

// A lane is a word, or holds one in its low half; its upper half is never read.
template <typename Lane>
GPK_HD void philox_round(Lane& w0, Lane& w1, Lane& w2, Lane& w3, uint32_t k0, uint32_t k1) {
  constexpr uint32_t kBy0 = 0xD2511F53u, kBy2 = 0xCD9E8D57u;
  const Lane high0 = Lane(uint64_t(uint32_t(w0)) * kBy0 >> 32), low0 = Lane(uint32_t(w0)) * Lane(kBy0);
  const Lane high2 = Lane(uint64_t(uint32_t(w2)) * kBy2 >> 32), low2 = Lane(uint32_t(w2)) * Lane(kBy2);
  w0 = high2 ^ w1 ^ k0;
  w1 = low2;
  w2 = high0 ^ w3 ^ k1;
  w3 = low0;
}

// Philox-4x32-10 (Salmon et al. 2011); the counter fills the two low words.
GPK_HD Words philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t w0 = uint32_t(counter), w1 = uint32_t(counter >> 32), w2 = 0, w3 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(w0, w1, w2, w3, k0, k1);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return {{w0, w1, w2, w3}};
}

// 24 random bits as a number in [0, 1).
template <typename A>
GPK_HD A unit_interval(uint32_t word) {
  return A(word >> 8) * A(1.0 / 16777216.0);
}

// Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
template <typename A>
GPK_HD void gaussian_pair(uint32_t radius_word, uint32_t angle_word, A* pair) {
  const A radius = std::sqrt(A(-2) * std::log(A(1) - unit_interval<A>(radius_word)));
  const A angle = A(2 * 3.14159265358979323846) * unit_interval<A>(angle_word);
  pair[0] = radius * std::cos(angle);
  pair[1] = radius * std::sin(angle);
}

// The same by polynomials, for loops that vectorise: near minimax in the relative error, by Lawson's reweighted least
// squares at Chebyshev nodes, each coefficient rounded to float32 before the next is fitted. Range reduction is on the
// integer words, as integer operations are cheaper than float32 ones.

// -2 log(1 - u), within 1.3 ulp: of 2^24 - k, whose mantissa 1 + f lies in [sqrt(1/2), sqrt(2)). Odd and even
// powers of f are summed apart, which halves the dependency chain.
inline float minus_two_log(uint32_t word) {
  const int32_t bits = std::bit_cast<int32_t>(float((1 << 24) - int32_t(word >> 8)));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = std::bit_cast<float>(bits - exponent * (1 << 23)) - 1.f, square = f * f;
  float odd = -0.17481075f, even = 0.28619736f;
  odd = odd * square - 0.29833526f;
  even = even * square + 0.3314006f;
  odd = odd * square - 0.39924314f;
  even = even * square + 0.5000357f;
  odd = odd * square - 0.66667896f;
  even = even * square + 0.9999998f;
  return float(exponent - 24) * -1.3862944f + (square * (odd * f + even) - 2.f * f);
}

inline float with_sign_flipped_by(float x, uint32_t top_bit) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ (top_bit & (1u << 31)));
}

// cos(2 pi u) and sin(2 pi u), within 1.6 ulp: from the nearest quarter of a turn, which is exact.
inline void cos_sin_of_turns(uint32_t word, float* cosine, float* sine) {
  const uint32_t turns = word & 0xFFFFFF00u, quarter = turns + (1u << 29);  // in 2^-32; top two bits: the quarter
  const float r = float(int32_t(turns << 2)) * (1.f / (1ull << 34)), square = r * r;
  float c = 58.62105f, s = -76.740585f;
  c = c * square - 85.42452f;
  s = s * square + 81.624863f;
  c = c * square + 64.93915f;
  s = s * square - 41.34186f;
  c = c * square - 19.739208f;
  s = s * square + 6.2831855f;
  c = c * square + 1.f;
  s = s * r;
  const bool odd = quarter & (1u << 30);
  *cosine = with_sign_flipped_by(odd ? s : c, quarter + (1u << 30));
  *sine = with_sign_flipped_by(odd ? c : s, quarter);
}

inline void gaussian_pair_by_polynomials(uint32_t radius_word, uint32_t angle_word, float* pair) {
  const float radius = std::sqrt(minus_two_log(radius_word));
  float cosine, sine;
  cos_sin_of_turns(angle_word, &cosine, &sine);
  pair[0] = radius * cosine;
  pair[1] = radius * sine;
}

// The four numbers of one Philox call.
template <typename A>
GPK_HD void random_numbers(uint64_t key, uint64_t counter, bool gaussian, A* numbers) {
  const Words words = philox(key, counter);
  if (gaussian) {
    gaussian_pair(words.word[0], words.word[1], numbers);
    gaussian_pair(words.word[2], words.word[3], numbers + 2);
  } else {
    for (int i = 0; i < 4; ++i) numbers[i] = unit_interval<A>(words.word[i]);
  }
}

// --- interpolate ------------------------------------------------------------------------------------------------

template <typename A>
GPK_HD A interpolate(A real, A fake, A eps) {
  return eps * real + (A(1) - eps) * fake;
}

// --- gradient norm penalty --------------------------------------------------------------------------------------

template <typename A>
struct PenaltyRow {
  A value, coefficient;
};

template <typename A>
struct PenaltyOptions {
  A target;
  bool one_sided;
  A power;
};

// ||g| - target|^power from |g|^2, and the coefficient of g in its derivative, times `share`; 0 where |g| = 0. Most
// powers are 2: kernels for those have no code for others.
template <bool kSquare, typename A>
GPK_HD PenaltyRow<A> penalty_row(A squared, const PenaltyOptions<A>& o, A share) {
  if (kSquare && o.target == A(0)) return {squared, A(2) * share};
  const A norm = std::sqrt(squared);
  A excess = norm - o.target;
  if (o.one_sided && excess <= A(0)) excess = A(0);
  if (kSquare) return {excess * excess, squared == A(0) ? A(0) : A(2) * excess / norm * share};
  const A size = std::fabs(excess), below = o.power == A(1) ? A(1) : std::pow(size, o.power - A(1));
  const A slope = excess == A(0) ? A(0) : std::copysign(o.power * below, excess);
  return {size * below, squared == A(0) ? A(0) : slope / norm * share};
}

// --- consistency ------------------------------------------------------------------------------------------------

template <typename A>
struct ConsistencyRow {
  A value, a_coefficient, b_coefficient;
};

// max(0, scores + weight * features - margin) from squared distances.
template <typename A>
GPK_HD ConsistencyRow<A> consistency_row(A scores, A features, A margin, A weight, A share) {
  const A excess = scores + weight * features - margin;
  if (excess <= A(0)) return {A(0), A(0), A(0)};
  return {excess, A(2) * share, A(2) * share * weight};
}

// max(0, sqrt(scores / inputs) - margin) from squared distances; 0 where either distance is 0.
template <typename A>
GPK_HD ConsistencyRow<A> lipschitz_row(A scores, A inputs, A margin, A share) {
  if (scores == A(0) || inputs == A(0)) return {A(0), A(0), A(0)};
  const A ratio = std::sqrt(scores / inputs), excess = ratio - margin;
  if (excess <= A(0)) return {A(0), A(0), A(0)};
  return {excess, ratio * share / scores, -ratio * share / inputs};
}

// --- score losses -----------------------------------------------------------------------------------------------

enum class ScoreLoss : int64_t {
  identity,
  negative,
  softplus,
  softplus_negative,
  negative_softplus,
  hinge,
  hinge_negative,
  least_squares
};

// A device computes exp and log1p in a few instructions of its own. On the host, calls of the C library would keep
// loops from being vectorised, so both are polynomials there, near minimax, without branches.

template <typename A>
GPK_HD A polynomial(A, A constant) {
  return constant;
}

template <typename A, typename... Higher>
GPK_HD A polynomial(A x, A constant, Higher... higher) {
  return constant + x * polynomial(x, higher...);
}

template <typename A>
struct Exponential;

// least: below it exp is 0, also rounded to nearest. round: adding it rounds to an integer, which is in its low bits.
// high + low: log 2, with few bits in `high`, so that its product with any exponent is exact.
template <>
struct Exponential<float> {
  using Word = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLeast = -104.f, kRound = 0x1.8p23f, kPerLog2 = 1.44269504f;
  static constexpr float kHigh = 0x1.63p-1f, kLow = -2.12194440e-4f;
  static GPK_HD float second_order(float r) {
    return polynomial(r, 0.49999994f, 0.16666521f, 0.04166839f, 0.008368717f, 0.0013814599f);
  }
};

template <>
struct Exponential<double> {
  using Word = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLeast = -746., kRound = 0x1.8p52, kPerLog2 = 1.4426950408889634;
  static constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
  static GPK_HD double second_order(double r) {
    return polynomial(r, 0.5000000000000011, 0.16666666666666413, 0.04166666666653016, 0.008333333333494465,
                      0.0013888888943628986, 0.00019841269506569803, 2.480149309993476e-05, 2.755758638388378e-06,
                      2.763024804860104e-07, 2.5000057903964448e-08);
  }
};

// exp(x) of x <= 0, subnormal results included: 2^-n exp(r), where |r| <= log(2) / 2.
template <typename A>
GPK_HD A exp_of_nonpositive(A x) {
#ifdef GPK_ON_DEVICE
  return std::exp(x);
#else
  using E = Exponential<A>;
  using Word = typename E::Word;
  const A t = x < E::kLeast ? E::kLeast : x;  // NaN stays
  const A rounded = E::kRound - t * E::kPerLog2, count = rounded - E::kRound;
  const A r = (t + count * E::kHigh) + count * E::kLow;
  const Word n = std::bit_cast<Word>(rounded) - std::bit_cast<Word>(E::kRound), half = n >> 1;
  const auto power = [](Word down) { return std::bit_cast<A>((Word(E::kBias) - down) << E::kMantissa); };
  // In two steps, of which only the second may round to a subnormal number.
  return (A(1) + (r + r * r * E::second_order(r))) * power(half) * power(n - half);
#endif
}

GPK_HD float log1p_tail(float z) { return polynomial(z, 0.66666412f, 0.40021697f, 0.2799916f, 0.28024384f); }

GPK_HD double log1p_tail(double z) {
  return polynomial(z, 0.6666666666666631, 0.4000000000015717, 0.2857142854786121, 0.22222223969340693,
                    0.18181743937045683, 0.15386559691202026, 0.1330097635943171, 0.12106066043229068,
                    0.08340183595800602, 0.17018432848314677);
}

// log(1 + x) of x in [0, 1], with every digit of a small x: 2 atanh(s), s = x / (2 + x), as 2 s = x - s x.
template <typename A>
GPK_HD A log1p_of_unit(A x) {
#ifdef GPK_ON_DEVICE
  return std::log1p(x);
#else
  const A s = x / (A(2) + x), z = s * s, half = A(0.5) * x * x;
  return x - (half - s * (half + z * log1p_tail(z)));
#endif
}

template <typename A>
GPK_HD A softplus(A x) {
  return (x > A(0) ? x : A(0)) + log1p_of_unit(exp_of_nonpositive(-std::fabs(x)));
}

template <typename A>
GPK_HD A sigmoid(A x) {
  const A below = exp_of_nonpositive(-std::fabs(x));
  return (x < A(0) ? below : A(1)) / (A(1) + below);
}

// max(0, x), and its slope, 0 at 0; NaN stays NaN.
template <typename A>
GPK_HD A relu(A x) {
  return x <= A(0) ? A(0) : x;
}

template <typename A>
GPK_HD A relu_slope(A x) {
  return x <= A(0) ? A(0) : A(1);
}

template <typename A>
GPK_HD A score_value(ScoreLoss kind, A s, A target) {
  switch (kind) {
    case ScoreLoss::identity: return s;
    case ScoreLoss::negative: return -s;
    case ScoreLoss::softplus: return softplus(s);
    case ScoreLoss::softplus_negative: return softplus(-s);
    case ScoreLoss::negative_softplus: return -softplus(s);
    case ScoreLoss::hinge: return relu(A(1) + s);
    case ScoreLoss::hinge_negative: return relu(A(1) - s);
    default: return (s - target) * (s - target);
  }
}

template <typename A>
GPK_HD A score_slope(ScoreLoss kind, A s, A target) {
  switch (kind) {
    case ScoreLoss::identity: return A(1);
    case ScoreLoss::negative: return A(-1);
    case ScoreLoss::softplus: return sigmoid(s);
    case ScoreLoss::softplus_negative: return -sigmoid(-s);
    case ScoreLoss::negative_softplus: return -sigmoid(s);
    case ScoreLoss::hinge: return relu_slope(A(1) + s);
    case ScoreLoss::hinge_negative: return -relu_slope(A(1) - s);
    default: return A(2) * (s - target);
  }
}

// --- normalisation ----------------------------------------------------------------------------------------------

template <typename A>
struct Curvature {
  A by_n, by_t, by_d, constant;
};

// Coefficients of n, t and d in the curvature of a normalisation, from means over a group; r is 1 / deviation.
template <typename A>
GPK_HD Curvature<A> normalise_curvature(A nt, A nd, A td, A t, A d, A r, bool centred) {
  const A scale = r * r, a = centred ? td - t * d : td;
  const A constant = centred ? scale * (nd * t + nt * d) : A(0);
  return {scale * (A(3) * nt * nd - a), -scale * nd, -scale * nt, constant};
}

// --- weights ----------------------------------------------------------------------------------------------------

// NaN stays NaN, as in torch.clamp; a minimum, then a maximum, which map to vector instructions.
template <typename A>
GPK_HD A clip(A x, A c) {
  const A below = x > c ? c : x;
  return below < -c ? -c : below;
}

template <typename A>
struct RmspropOptions {
  A lr, alpha, one_minus_alpha, eps, weight_decay, momentum, sign, clip;
};

// Update of torch.optim.RMSprop, with its order of operations and its fused multiply-adds: bitwise equal wherever
// torch's own kernels fuse (AVX2 and up, arm64).
template <bool kCentered, bool kMomentum, bool kWeightDecay, typename A>
GPK_HD void rmsprop(A& p, A g, A& square, A& average, A& buffer, const RmspropOptions<A>& o) {
  g = g * o.sign;
  if (kWeightDecay) g = std::fma(o.weight_decay, p, g);
  square = std::fma(o.one_minus_alpha * g, g, square * o.alpha);
  A variance = square;
  if (kCentered) {
    const A gap = g - average;
    const bool near = o.one_minus_alpha < A(0.5);  // as torch.lerp, which starts from the nearer end
    average = std::fma(near ? o.one_minus_alpha : o.one_minus_alpha - A(1), gap, near ? average : g);
    variance = std::fma(-average, average, square);
  }
  const A step = std::sqrt(variance) + o.eps;
  if (kMomentum) {
    buffer = buffer * o.momentum + g / step;
    p = std::fma(-o.lr, buffer, p);
  } else {
    p = p + (-o.lr) * g / step;
  }
  p = clip(p, o.clip);
}

}  // namespace gpk
