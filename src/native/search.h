// Affine scales and biases found by search instead of by a group's range.
//
// One lane a group: a block of groups is transposed, so that every sum over a group runs
// in the order of its values and no result depends on how many lanes there are.
// A group's objective is the sum of weight * (w - (code * scale + bias))^2 with scale and
// bias as stored. A group keeps MLX's rule unless the search beats it by more than what
// rounding in here can feign.

#pragma once

#include "affine.h"
#include "floats.h"
#include "minifloat.h"
#include "pack.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

REQUANT_INLINE Lanes all(float x) { return Lanes{} + x; }
// By integers, which order like floats that are not negative; NaN counts as either end.
REQUANT_INLINE Lanes clamped(Lanes x, float top) {
  const Mask zero = {}, most = zero + int32_t(bits_of(top));
  Mask k = Mask(x);
  k = k > zero ? k : zero;
  k = k < most ? k : most;
  return Lanes(k);
}
REQUANT_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
REQUANT_INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
REQUANT_INLINE Lanes magnitude(Lanes a) { return Lanes(Mask(a) & int32_t(kAbs32)); }

template <class T>
REQUANT_INLINE Lanes rounded(Lanes x) {
  if constexpr (!T::kRounds) return x;
  alignas(64) float out[kLanes];
  std::memcpy(out, &x, sizeof out);
  for (int l = 0; l < kLanes; l++) out[l] = T::round(out[l]);
  std::memcpy(&x, out, sizeof out);
  return x;
}

// A square of kLanes x kLanes transposed: each perfect shuffle turns the bits of the
// index by one, and half of them swap rows with columns.
REQUANT_INLINE void transpose_square(float* REQUANT_RESTRICT a, float* REQUANT_RESTRICT b) {
  constexpr int half = kLanes * kLanes / 2;
  constexpr int rounds = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  for (int round = 0; round < rounds; round++) {
    const float* REQUANT_RESTRICT in = round % 2 == 0 ? a : b;
    float* REQUANT_RESTRICT out = round % 2 == 0 ? b : a;
    for (int k = 0; k < half; k++) {
      out[2 * k] = in[k];
      out[2 * k + 1] = in[k + half];
    }
  }
}

template <class T>
REQUANT_INLINE typename T::Stored stored_at(const void* from) {
  typename T::Stored x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// T::load of kLanes stored values, as vectors: left to itself the compiler takes these loops apart.
template <class T>
REQUANT_INLINE Lanes load_lanes(const void* from) {
  if constexpr (sizeof(typename T::Stored) == 4) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
  } else {
    Halves stored;
    std::memcpy(&stored, from, sizeof stored);
    const Mask u = __builtin_convertvector(stored, Mask);
    if constexpr (__is_same(T, BF16)) return Lanes(u << 16);
    const Mask a = (u & 0x7fff) << 13, sign = (u & 0x8000) << 16;
    const Mask tiny = Mask(Lanes(a + 0x38800000) - float_of(0x38800000u));
    Mask x = a + 0x38000000;
    x = a >= 0x0f800000 ? (a | int32_t(kInf32)) : x;
    x = a < 0x00800000 ? tiny : x;
    return Lanes(x | sign);
  }
}

// Values of kLanes groups, value i of every group in out[i]. Lanes from count on repeat
// the last group; at(l) is the first value of group l.
template <class T, int GROUP, class At>
REQUANT_INLINE void gather_groups(int count, At at, Lanes* REQUANT_RESTRICT out) {
  alignas(64) float a[kLanes * kLanes], b[kLanes * kLanes];
  constexpr bool even = kLanes != 8;  // rounds of the shuffle
  for (int start = 0; start < GROUP; start += kLanes) {
    for (int l = 0; l < kLanes; l++) {
      const auto* from = at(l < count ? l : count - 1) + start;
      if constexpr (kLanes == 4 && !__is_same(T, F16)) {  // one by one is faster here
        for (int i = 0; i < kLanes; i++) a[l * kLanes + i] = T::load(stored_at<T>(from + i));
      } else {
        const Lanes values = load_lanes<T>(from);
        std::memcpy(a + l * kLanes, &values, sizeof values);
      }
    }
    transpose_square(a, b);
    std::memcpy(out + start, even ? a : b, sizeof a);
  }
}

// Weights of each group brought to a mean of one; a group without any counts them alike.
template <int GROUP>
REQUANT_INLINE void level_weights(Lanes* h) {
  Lanes total = all(0.0f);
  for (int i = 0; i < GROUP; i++) total += h[i];
  const Mask usable = (total > all(1e-30f)) & (total < all(1e30f));
  const Lanes factor = float(GROUP) / total;
  for (int i = 0; i < GROUP; i++) h[i] = usable ? h[i] * factor : all(1.0f);
}

template <int GROUP>
REQUANT_INLINE void gather_weights(const float* weights, size_t first, int count, size_t groups_per_row, Lanes* h) {
  gather_groups<F32, GROUP>(
      count, [&](int l) { return weights + (first + size_t(l)) % groups_per_row * GROUP; }, h);
  level_weights<GROUP>(h);
}

// Groups between a block and the next one with its weights. Where rows are whole blocks,
// that is the one below, and they are done one after the other.
template <bool WEIGHTED>
REQUANT_INLINE size_t block_stride(size_t groups, size_t groups_per_row) {
  return WEIGHTED && groups_per_row % kLanes == 0 ? groups_per_row : groups;
}

REQUANT_INLINE int block_size(size_t left) { return int(left < size_t(kLanes) ? left : kLanes); }

// What one walk over a group's values finds for a scale and a bias, in units of the
// scale: d = (w - bias) / scale - code.
struct Found {
  Lanes error;              // sum of d^2
  Lanes d, q, dq, qq;       // sums of d, code, their product, code^2
};

template <int GROUP, bool WEIGHTED, bool SUMS>
REQUANT_INLINE Found walk(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes scale, Lanes bias,
                          float n) {
  const Lanes inverse = 1.0f / scale, zero = all(0.0f);
  Found f = {zero, zero, zero, zero, zero};
  for (int i = 0; i < GROUP; i++) {
    const Lanes t = (x[i] - bias) * inverse;
    const Lanes q = (clamped(t, n) + 8388608.0f) - 8388608.0f;
    const Lanes d = t - q;
    const Lanes hd = WEIGHTED ? h[i] * d : d;
    f.error += hd * d;
    if constexpr (SUMS) {
      const Lanes hq = WEIGHTED ? h[i] * q : q;
      f.d += hd;
      f.q += hq;
      f.dq += hd * q;
      f.qq += hq * q;
    }
  }
  return f;
}

// The same error for MLX's rule, whose codes come from the scale and bias before rounding,
// and from a division: the product with the inverse would take some ties to the other side.
template <int GROUP, bool WEIGHTED>
REQUANT_INLINE Lanes rule_error(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes scale,
                                Lanes bias, Lanes stored_scale, Lanes stored_bias, float n) {
  const Lanes stored_inverse = 1.0f / stored_scale;
  Lanes error = all(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes q = (clamped((x[i] - bias) / scale, n) + 8388608.0f) - 8388608.0f;
    const Lanes d = (x[i] - stored_bias) * stored_inverse - q;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

struct No { static constexpr bool value = false; };
struct Yes { static constexpr bool value = true; };

struct Fit {
  Lanes scale, bias, error;  // error in units of the group's reference scale
};

// How far the search goes: ranges shrunken by 0, 1, ... steps at each end (a single start
// takes one step at both), then alternations of codes and least squares. The steps were
// tuned on normal values; the numbers of walks keep to the speed that each level promises.
struct SearchPlan {
  int starts;  // at each end
  float step;  // of the range
  int fits;
};

constexpr SearchPlan search_plan(int bits, bool best) {
  constexpr float fast_steps[9] = {0, 0.25f, 0.16f, 0.055f, 0.018f, 0.005f, 0.001f, 0, 0};
  constexpr float best_steps[9] = {0, 0.25f, 0.09f, 0.042f, 0.0225f, 0.0105f, 0.005f, 0, 0.0015f};
  return best ? SearchPlan{bits <= 3 ? 4 : 3, best_steps[bits], bits <= 3 ? 2 : 4}
              : SearchPlan{1, fast_steps[bits], 1};
}

template <class T, int GROUP, bool WEIGHTED>
REQUANT_INLINE Fit search_lanes(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes hi, Lanes lo,
                                float n, const SearchPlan& plan) {
  const Mask low = magnitude(lo) < magnitude(hi);  // the edge near zero: its bfloat16 is the finer
  const Lanes near = low ? lo : hi, span = (low ? hi : lo) - near, unit = span / n, per_unit = 1.0f / unit;
  const Lanes share = all(1.0f / float(GROUP));  // the weights sum up to GROUP, too

  const Lanes infinite = all(float_of(kInf32)), zero = all(0.0f);
  Fit best = {unit, near, infinite};
  Lanes next_scale = unit, next_bias = near, promise = infinite;

  // Takes (scale, bias) if it is the best so far. The least squares over its codes become
  // the next guess if they promise more than the guess at hand.
  const auto consider = [&](Lanes scale, Lanes bias, auto last) __attribute__((always_inline)) {
    scale = rounded<T>(scale);
    bias = rounded<T>(bias);
    const Found f = walk<GROUP, WEIGHTED, !decltype(last)::value>(x, h, scale, bias, n);
    const Lanes ratio = scale * per_unit, square = ratio * ratio;
    const Lanes error = square * f.error;
    const Mask better = error < best.error;
    best.scale = better ? scale : best.scale;
    best.bias = better ? bias : best.bias;
    best.error = better ? error : best.error;

    if constexpr (decltype(last)::value) return;
    const Lanes variance = f.qq - f.q * f.q * share, covariance = f.dq - f.d * f.q * share;
    const Lanes slope = variance > zero ? covariance / variance : zero;
    const Lanes left = square * (f.error - f.d * f.d * share - slope * covariance);
    const Lanes new_scale = rounded<T>(scale + scale * slope);
    const Lanes change = new_scale / scale - 1.0f;
    const Lanes new_bias = bias + scale * ((f.d - change * f.q) * share);
    const Mask take = left < promise;
    promise = take ? left : promise;
    next_scale = take ? new_scale : next_scale;
    next_bias = take ? new_bias : next_bias;
  };

  for (int a = 0; a < plan.starts; a++)
    for (int c = 0; c < plan.starts; c++) {
      const float from = plan.starts == 1 ? plan.step : float(a) * plan.step;
      const float to = plan.starts == 1 ? plan.step : float(c) * plan.step;
      consider(unit * (1.0f - from - to), near + span * from, No());
    }
  for (int k = 1; k < plan.fits; k++) {
    promise = infinite;
    consider(next_scale, next_bias, No());
  }
  consider(next_scale, next_bias, Yes());
  return best;
}

// As affine_codes, by the product with the inverse.
template <class T, int GROUP>
REQUANT_INLINE void fitted_codes(const typename T::Stored* REQUANT_RESTRICT w, float scale, float beta, float n,
                                 uint8_t* REQUANT_RESTRICT codes) {
  const float inverse = 1.0f / scale;
  for (int i = 0; i < GROUP; i++) {
    float t = (T::load(w[i]) - beta) * inverse;
    t = t > 0.0f ? t : 0.0f;
    t = t < n ? t : n;
    codes[i] = uint8_t(bits_of(t + 8388608.0f));
  }
}

// words, scales and biases as affine_quantize writes them. weights: one a column, or null.
template <class T, int GROUP, bool WEIGHTED>
void affine_search(const void* w_, size_t groups, size_t groups_per_row, int bits, const float* weights, bool best,
                   uint32_t* words, void* scales_, void* biases_) {
  using Stored = typename T::Stored;
  const auto* all_w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  auto* scales = static_cast<Stored*>(scales_);
  auto* biases = static_cast<Stored*>(biases_);
  const float n = float((1 << bits) - 1);
  const SearchPlan plan = search_plan(bits, best);
  // Rounding in walk() moves d by at most blur; half of d^2's change falls to each term.
  const float blur = n * 4.76837158e-7f, floor = 1000.0f * float(GROUP) * blur * blur;

  alignas(64) float hi[kLanes], lo[kLanes], scale[kLanes], beta[kLanes];
  alignas(64) float stored_scale[kLanes], stored_beta[kLanes];
  alignas(64) Lanes x[GROUP], h[WEIGHTED ? GROUP : 1];
  alignas(64) uint8_t codes[kLanes * GROUP];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED) gather_weights<GROUP>(weights, column, block_size(groups - column), groups_per_row, h);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      const Stored* w = all_w + first * GROUP;
      for (int j = 0; j < kLanes; j++)
        range_of<T, GROUP>(w + (j < count ? j : count - 1) * GROUP, bits == 1, hi[j], lo[j]);
      affine_parameters(hi, lo, kLanes, bits, scale, beta);
      for (int j = 0; j < kLanes; j++) stored_scale[j] = T::round(scale[j]);
      for (int j = 0; j < kLanes; j++) stored_beta[j] = T::round(beta[j]);
      gather_groups<T, GROUP>(count, [&](int l) { return w + l * GROUP; }, x);

      Lanes high, least, rule_scale, rule_beta, kept_scale, kept_beta;
      std::memcpy(&high, hi, sizeof high);
      std::memcpy(&least, lo, sizeof least);
      std::memcpy(&rule_scale, scale, sizeof rule_scale);
      std::memcpy(&rule_beta, beta, sizeof rule_beta);
      std::memcpy(&kept_scale, stored_scale, sizeof kept_scale);
      std::memcpy(&kept_beta, stored_beta, sizeof kept_beta);
      const Lanes rule = rule_error<GROUP, WEIGHTED>(x, h, rule_scale, rule_beta, kept_scale, kept_beta, n);
      const Fit fit = search_lanes<T, GROUP, WEIGHTED>(x, h, high, least, n, plan);

      const Lanes unit = (high - least) / n, rule_ratio = kept_scale / unit, fit_ratio = fit.scale / unit;
      const Mask sound = (unit > all(1e-30f)) & (unit < all(1e30f)) & (fit_ratio != all(0.0f));
      const Lanes slack = floor * (rule_ratio * rule_ratio + fit_ratio * fit_ratio);
      const Mask taken = sound & (fit.error * 1.005f + slack < rule_ratio * rule_ratio * rule);
      const Lanes final_scale = taken ? fit.scale : rule_scale, final_beta = taken ? fit.bias : rule_beta;
      std::memcpy(scale, &final_scale, sizeof scale);
      std::memcpy(beta, &final_beta, sizeof beta);

      alignas(64) int32_t fitted[kLanes];
      std::memcpy(fitted, &taken, sizeof fitted);
      for (int j = 0; j < count; j++)
        if (fitted[j] != 0)
          fitted_codes<T, GROUP>(w + j * GROUP, scale[j], beta[j], n, codes + j * GROUP);
        else
          affine_codes<T, GROUP>(w + j * GROUP, scale[j], beta[j], n, codes + j * GROUP);
      for (int j = 0; j < count; j++) scales[first + size_t(j)] = T::store(scale[j]);
      for (int j = 0; j < count; j++) biases[first + size_t(j)] = T::store(beta[j]);
      pack_codes(bits, codes, size_t(count) * GROUP, out + first * GROUP * size_t(bits) / 8);
    }
  }
}

// ---------------------------------------------------------------- float modes

// The nearest element's magnitude to a magnitude; beyond the largest, the largest.
template <int BITS>
REQUANT_INLINE Lanes nearest_element(Lanes a) {
  if constexpr (BITS == 4) {
    a = smaller(a, all(6.0f));
    const Lanes power = Lanes(Mask(larger(a, all(1.0f))) & int32_t(kInf32));
    const Lanes magic = Lanes(Mask(power) + (22 << 23));
    return (a + magic) - magic;
  } else {
    a = smaller(a, all(448.0f));
    const Lanes power = Lanes(Mask(larger(a, all(0.015625f))) & int32_t(kInf32));
    const Lanes magic = power * 1048576.0f;
    return (a + magic) - magic;
  }
}

// Sum of weight * (|x| - element * scale)^2, all in units of `unit`.
template <int GROUP, int BITS, bool WEIGHTED>
REQUANT_INLINE Lanes element_error(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes scale,
                                   Lanes per_unit) {
  const Lanes inverse = 1.0f / scale, ratio = scale * per_unit;
  Lanes error = all(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes a = magnitude(x[i]);
    const Lanes product = nearest_element<BITS>(a * inverse) * ratio;
    const Lanes d = a * per_unit - product;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

// Of two errors that differ by less, rounding may be the reason.
template <int GROUP>
REQUANT_INLINE Mask clearly_less(Lanes error, Lanes ratio, Lanes rule, Lanes rule_ratio, float largest) {
  const float blur = largest * 4.76837158e-7f;
  const Lanes slack = 1000.0f * float(GROUP) * blur * blur * (ratio * ratio + rule_ratio * rule_ratio);
  return error * 1.005f + slack < rule;
}

// Nearest elements' codes of one group for a scale.
template <class T, int GROUP, int BITS>
REQUANT_INLINE void element_codes(const typename T::Stored* x, float scale, uint8_t* REQUANT_RESTRICT codes) {
  const float inverse = 1.0f / scale;
  alignas(64) float v[GROUP];
  for (int i = 0; i < GROUP; i++) v[i] = T::load(x[i]) * inverse;
  for (int i = 0; i < GROUP; i++) codes[i] = uint8_t(BITS == 4 ? encode_e2m1(v[i]) : encode_e4m3(v[i]));
}

// mxfp4, mxfp8: the exponents beside the rule's.
template <class T, int BITS, bool WEIGHTED>
size_t mx_search(const void* w_, size_t groups, size_t groups_per_row, const float* weights, bool best,
                 uint32_t* words, uint8_t* scales) {
  constexpr int group = 32;
  const auto* w = static_cast<const typename T::Stored*>(w_);
  const size_t flushed = mx_quantize<T, BITS>(w_, groups, words, scales);
  auto* out = reinterpret_cast<uint8_t*>(words);

  alignas(64) Lanes x[group], h[WEIGHTED ? group : 1];
  alignas(64) float scale[kLanes], chosen[kLanes];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED) gather_weights<group>(weights, column, block_size(groups - column), groups_per_row, h);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      gather_groups<T, group>(count, [&](int l) { return w + (first + size_t(l)) * group; }, x);
      // Scales from 2^-120 to 2^120; a group beyond keeps the rule's.
      for (int l = 0; l < kLanes; l++) {
        const int byte = l < count ? scales[first + size_t(l)] : 0;
        scale[l] = byte < 7 || byte > 247 ? 0.0f : decode_e8m0(uint8_t(byte));
      }
      Lanes rule_scale, kept;
      std::memcpy(&rule_scale, scale, sizeof rule_scale);
      const Lanes per_unit = 1.0f / rule_scale, one = all(1.0f);
      const Lanes rule = element_error<group, BITS, WEIGHTED>(x, h, rule_scale, per_unit);
      Lanes least = rule;
      kept = rule_scale;
      const auto consider = [&](float factor) {
        const Lanes error = element_error<group, BITS, WEIGHTED>(x, h, rule_scale * factor, per_unit);
        const Mask clear = clearly_less<group>(error, all(factor), rule, one, BITS == 4 ? 6.0f : 448.0f);
        const Mask take = (error < least) & clear;
        kept = take ? rule_scale * factor : kept;
        least = take ? error : least;
      };
      consider(0.5f);
      if (best || BITS == 8) consider(2.0f);
      if (best) consider(0.25f);
      std::memcpy(chosen, &kept, sizeof chosen);
      for (int l = 0; l < count; l++) {
        if (chosen[l] == scale[l]) continue;
        const size_t at = first + size_t(l);
        scales[at] = uint8_t(bits_of(chosen[l]) >> 23);
        alignas(64) uint8_t codes[group];
        element_codes<T, group, BITS>(w + at * group, chosen[l], codes);
        pack_codes<BITS>(codes, group, out + at * (group * BITS / 8));
      }
    }
  }
  return flushed;
}

// Thresholds of nvfp4 codes for each scale byte: [0] of MLX's rule, whose quotients are
// rounded to T; [1] the halfway points themselves, for a nearest element.
template <class T>
struct Nvfp4SearchThresholds {
  typename T::Key of[2][127][7];

  Nvfp4SearchThresholds() {
    const Nvfp4Thresholds<T> rule;
    std::memcpy(of[0], rule.of, sizeof of[0]);
    // Eight bits hold a product of the two; every dtype's mantissa has them.
    for (int byte = 0; byte < 127; byte++)
      for (int k = 0; k < 7; k++)
        of[1][byte][k] = typename T::Key(T::store(kHalfways[k] * decode_e4m3(uint32_t(byte))));
  }
};

// Sum of weight * (y - element * ratio)^2; y holds magnitudes.
template <int GROUP, bool WEIGHTED>
REQUANT_INLINE Lanes e2m1_error(const Lanes* REQUANT_RESTRICT y, const Lanes* REQUANT_RESTRICT h, Lanes ratio) {
  const Lanes inverse = ratio > all(1e-30f) ? 1.0f / ratio : all(0.0f);
  Lanes error = all(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes product = nearest_element<4>(y[i] * inverse) * ratio;
    const Lanes d = y[i] - product;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

// nvfp4: scale bytes around the rule's, which puts the largest value at element 6, up to
// those that put it at element 4 (whose neighbour 3 lies nearer to it than 4 to 6). The
// rule's codes are not made first: a group is encoded once, for the byte that it ends with.
template <class T, bool WEIGHTED>
void nvfp4_search(const void* w_, size_t groups, size_t groups_per_row, const float* weights, bool best,
                  uint32_t* words, uint8_t* scales, const float* global_scale) {
  using Stored = typename T::Stored;
  static const Nvfp4SearchThresholds<T> thresholds;
  constexpr int group = 16;
  const float enc = global_scale != nullptr ? 2688.0f / *global_scale : 1.0f;
  const float dec = global_scale != nullptr ? *global_scale / 2688.0f : 1.0f;
  const auto* all_w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  constexpr int many[] = {-3, -2, -1, 1, 2, 3, 4, 5, 6};  // steps from the rule's byte
  constexpr int tries = int(sizeof many / sizeof *many);

  alignas(64) Lanes x[group], h[WEIGHTED ? group : 1];
  alignas(64) float scale[kLanes], tops[kLanes];
  alignas(64) int32_t byte[kLanes], four[kLanes], chosen[kLanes];
  alignas(64) uint8_t codes[kLanes * group];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED) gather_weights<group>(weights, column, block_size(groups - column), groups_per_row, h);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      const Stored* w = all_w + first * group;
      gather_groups<T, group>(count, [&](int l) { return w + l * group; }, x);
      Mask highest = {};  // by integers: NaN is the largest
      for (int i = 0; i < group; i++) {
        x[i] = magnitude(x[i]);
        highest = Mask(x[i]) > highest ? Mask(x[i]) : highest;
      }
      const Lanes top = Lanes(highest);
      std::memcpy(tops, &top, sizeof tops);
      for (int l = 0; l < kLanes; l++) byte[l] = int32_t(encode_e4m3(T::round(tops[l] / 6.0f) * enc));
      for (int l = 0; l < kLanes; l++) four[l] = int32_t(encode_e4m3(tops[l] * 0.25f / dec));
      for (int l = 0; l < kLanes; l++) scale[l] = decode_e4m3(uint32_t(byte[l])) * dec;
      Lanes rule_scale;
      Mask rule_byte;
      std::memcpy(&rule_scale, scale, sizeof rule_scale);
      std::memcpy(&rule_byte, byte, sizeof rule_byte);
      const Lanes per_unit = 6.0f / top, rule_ratio = rule_scale * per_unit;
      const Mask sound = (top > all(1e-30f)) & (top < all(1e30f));
      for (int i = 0; i < group; i++) x[i] *= per_unit;
      const Lanes rule = e2m1_error<group, WEIGHTED>(x, h, rule_ratio);
      Lanes least = rule;
      Mask kept = rule_byte;
      for (int k = 0; k < (best ? tries : 1); k++) {
        for (int l = 0; l < kLanes; l++) {
          const int other = best ? byte[l] + many[k] : four[l];
          chosen[l] = other < 1 || other > 126 ? byte[l] : other;
          scale[l] = decode_e4m3(uint32_t(chosen[l])) * dec;
        }
        Lanes other_scale;
        Mask other_byte;
        std::memcpy(&other_scale, scale, sizeof other_scale);
        std::memcpy(&other_byte, chosen, sizeof other_byte);
        const Lanes ratio = other_scale * per_unit;
        const Lanes error = e2m1_error<group, WEIGHTED>(x, h, ratio);
        const Mask take = sound & (error < least) & clearly_less<group>(error, ratio, rule, rule_ratio, 6.0f);
        kept = take ? other_byte : kept;
        least = take ? error : least;
      }
      std::memcpy(chosen, &kept, sizeof chosen);
      for (int j = 0; j < count; j++) {
        const bool moved = chosen[j] != byte[j];
        scales[first + size_t(j)] = uint8_t(chosen[j]);
        if (global_scale == nullptr && (moved || byte[j] != 0x7e))
          count_thresholds<T, group>(w + j * group, thresholds.of[moved][chosen[j]], codes + j * group);
        else if (moved)
          element_codes<T, group, 4>(w + j * group, decode_e4m3(uint32_t(chosen[j])) * dec, codes + j * group);
        else
          nvfp4_codes<T>(w + j * group, tops[j], decode_e4m3(uint32_t(byte[j])), enc, codes + j * group);
      }
      pack_codes<4>(codes, size_t(count) * group, out + first * (group / 2));
    }
  }
}

}  // namespace
