// Arithmetic of each op, shared by host and device. gpkernels/ops has the specification.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GPK_HD __host__ __device__ __forceinline__
#else
#define GPK_HD inline
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

template <typename A>
GPK_HD A softplus(A x) {
  return (x > A(0) ? x : A(0)) + std::log1p(std::exp(-std::fabs(x)));
}

template <typename A>
GPK_HD A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
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
