// The search of affine modes: w = code * scale + bias. search.h has the steps.

#pragma once

#include <type_traits>

#include "affine.h"
#include "floats.h"
#include "lanes.h"
#include "pack.h"
#include "search.h"

namespace {

// Sums over a group's values for a scale and a bias, in units of the scale:
// d = (w - bias) / scale - code.
struct FitSums {
  Lanes error;         // of d^2
  Lanes d, q, dq, qq;  // of d, code, their product, code^2
};

// ALL: all sums, else the error alone.
template <int GROUP, bool WEIGHTED, bool ALL>
REQUANT_INLINE FitSums accumulate_fit_sums(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h,
                                           Lanes scale, Lanes bias, float n) {
  const Lanes inverse = 1.0f / scale, zero = broadcast(0.0f);
  FitSums sums = {zero, zero, zero, zero, zero};
  for (int i = 0; i < GROUP; i++) {
    const Lanes t = (x[i] - bias) * inverse;
    const Lanes q = nearest_code(t, n);
    const Lanes d = t - q;
    const Lanes hd = WEIGHTED ? h[i] * d : d;
    sums.error += hd * d;
    if constexpr (ALL) {
      const Lanes hq = WEIGHTED ? h[i] * q : q;
      sums.d += hd;
      sums.q += hq;
      sums.dq += hd * q;
      sums.qq += hq * q;
    }
  }
  return sums;
}

// The same error for mx.quantize's rule, whose codes come from the scale and bias before rounding,
// and from a division: the product with the inverse would take some ties to the other side.
template <int GROUP, bool WEIGHTED>
REQUANT_INLINE Lanes mlx_affine_error(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes scale,
                                      Lanes bias, Lanes stored_scale, Lanes stored_bias, float n) {
  const Lanes stored_inverse = 1.0f / stored_scale;
  Lanes error = broadcast(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes q = nearest_code((x[i] - bias) / scale, n);
    const Lanes d = (x[i] - stored_bias) * stored_inverse - q;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

struct ScaleCandidate {
  Lanes scale, bias, error;  // error in squares of the group's unit
};

REQUANT_INLINE void keep_better(ScaleCandidate& current, const ScaleCandidate& other) {
  const Mask better = other.error < current.error;
  current.scale = better ? other.scale : current.scale;
  current.bias = better ? other.bias : current.bias;
  current.error = better ? other.error : current.error;
}

// The scale and bias with the least squares over the codes behind the sums, and the error that they
// predict while no code changes. square: of the scale in units of the group.
template <class T, int GROUP>
REQUANT_INLINE ScaleCandidate least_squares(const FitSums& sums, Lanes scale, Lanes bias, Lanes square) {
  const Lanes share = broadcast(1.0f / float(GROUP));  // the weights sum up to GROUP, too
  const Lanes zero = broadcast(0.0f);
  const Lanes variance = sums.qq - sums.q * sums.q * share, covariance = sums.dq - sums.d * sums.q * share;
  const Lanes slope = variance > zero ? covariance / variance : zero;
  const Lanes predicted_error = square * (sums.error - sums.d * sums.d * share - slope * covariance);
  const Lanes new_scale = rounded<T>(scale + scale * slope);
  const Lanes change = new_scale / scale - 1.0f;
  const Lanes new_bias = bias + scale * ((sums.d - change * sums.q) * share);
  return {new_scale, new_bias, predicted_error};
}

// How far the search goes: ranges shrunken by 0, 1, ... steps at each end (a single start
// takes one step at both), then alternations of codes and least squares. The steps were
// tuned on normal values; the numbers of passes keep to the speed that each level promises.
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
REQUANT_INLINE ScaleCandidate search_lanes(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes hi,
                                           Lanes lo, float n, const SearchPlan& plan) {
  const Mask low = abs(lo) < abs(hi);  // the edge near zero: its bfloat16 is the finer
  const Lanes anchor = low ? lo : hi, range = (low ? hi : lo) - anchor, unit = range / n, per_unit = 1.0f / unit;

  const Lanes infinite = broadcast(float_of(kInf32));
  ScaleCandidate current = {unit, anchor, infinite};
  ScaleCandidate next = current;  // its error is predicted

  // Keeps (scale, bias) if it is the best so far, and what least squares over its codes give as
  // the next candidate if that predicts less than the one at hand.
  const auto try_candidate = [&](Lanes scale, Lanes bias, auto is_last) __attribute__((always_inline)) {
    constexpr bool kLast = decltype(is_last)::value;
    scale = rounded<T>(scale);
    bias = rounded<T>(bias);
    const FitSums sums = accumulate_fit_sums<GROUP, WEIGHTED, !kLast>(x, h, scale, bias, n);
    const Lanes ratio = scale * per_unit, square = ratio * ratio;
    keep_better(current, {scale, bias, square * sums.error});
    if constexpr (!kLast) keep_better(next, least_squares<T, GROUP>(sums, scale, bias, square));
  };

  for (int a = 0; a < plan.starts; a++)
    for (int c = 0; c < plan.starts; c++) {
      const float from = plan.starts == 1 ? plan.step : float(a) * plan.step;
      const float to = plan.starts == 1 ? plan.step : float(c) * plan.step;
      try_candidate(unit * (1.0f - from - to), anchor + range * from, std::false_type());
    }
  for (int k = 1; k < plan.fits; k++) {
    next.error = infinite;
    try_candidate(next.scale, next.bias, std::false_type());
  }
  try_candidate(next.scale, next.bias, std::true_type());
  return current;
}

// As affine_codes, by the product with the inverse.
template <class T, int GROUP>
REQUANT_INLINE void fitted_codes(const typename T::Stored* REQUANT_RESTRICT w, float scale, float bias, float n,
                                 uint8_t* REQUANT_RESTRICT codes) {
  const float inverse = 1.0f / scale;
  for (int i = 0; i < GROUP; i++) {
    float t = (T::load(w[i]) - bias) * inverse;
    t = t > 0.0f ? t : 0.0f;
    t = t < n ? t : n;
    codes[i] = uint8_t(bits_of(t + kRoundMagic));
  }
}

// words, scales and biases as affine_quantize writes them.
template <class T, int GROUP, bool WEIGHTED>
void affine_search(const void* w_, size_t groups, size_t groups_per_row, int bits, const requant::Search& search,
                   uint32_t* words, void* scales_, void* biases_) {
  using Stored = typename T::Stored;
  const auto* all_w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  auto* scales = static_cast<Stored*>(scales_);
  auto* biases = static_cast<Stored*>(biases_);
  const float n = float((1 << bits) - 1);
  const SearchPlan plan = search_plan(bits, search.best);

  alignas(64) float hi[kLanes], lo[kLanes], scale[kLanes], bias[kLanes];
  alignas(64) float stored_scale[kLanes], stored_bias[kLanes];
  alignas(64) Lanes x[GROUP], columns[WEIGHTED ? GROUP : 1], own[WEIGHTED ? GROUP : 1];
  const Lanes* h = WEIGHTED && search.by_magnitude ? own : columns;
  alignas(64) int32_t is_improved[kLanes];
  alignas(64) uint8_t codes[kLanes * GROUP];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED)
      gather_weights<GROUP>(search.weights, column, block_size(groups - column), groups_per_row, columns);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      const Stored* w = all_w + first * GROUP;
      for (int j = 0; j < kLanes; j++)
        range_of<T, GROUP>(w + (j < count ? j : count - 1) * GROUP, bits == 1, hi[j], lo[j]);
      affine_parameters(hi, lo, kLanes, bits, scale, bias);
      for (int j = 0; j < kLanes; j++) stored_scale[j] = T::round(scale[j]);
      for (int j = 0; j < kLanes; j++) stored_bias[j] = T::round(bias[j]);
      gather_groups<T, GROUP>(count, [&](int l) { return w + l * GROUP; }, x);
      if constexpr (WEIGHTED)
        if (search.by_magnitude) weigh_by_magnitude<GROUP>(x, columns, own);

      const Lanes top = load_lanes(hi), bottom = load_lanes(lo);
      const Lanes mlx_scale = load_lanes(scale), mlx_bias = load_lanes(bias);
      const Lanes mlx_stored_scale = load_lanes(stored_scale), mlx_stored_bias = load_lanes(stored_bias);
      const Lanes mlx_error =
          mlx_affine_error<GROUP, WEIGHTED>(x, h, mlx_scale, mlx_bias, mlx_stored_scale, mlx_stored_bias, n);
      const ScaleCandidate found = search_lanes<T, GROUP, WEIGHTED>(x, h, top, bottom, n, plan);

      const Lanes unit = (top - bottom) / n, mlx_ratio = mlx_stored_scale / unit, ratio = found.scale / unit;
      const Mask valid = is_searchable(unit) & (ratio != broadcast(0.0f));
      const Mask improved = valid & improves_beyond_rounding<GROUP>(found.error, ratio,
                                                                    mlx_ratio * mlx_ratio * mlx_error, mlx_ratio, n);
      store_lanes(scale, improved ? found.scale : mlx_scale);
      store_lanes(bias, improved ? found.bias : mlx_bias);
      store_lanes(is_improved, improved);
      for (int j = 0; j < count; j++)
        if (is_improved[j] != 0)
          fitted_codes<T, GROUP>(w + j * GROUP, scale[j], bias[j], n, codes + j * GROUP);
        else
          affine_codes<T, GROUP>(w + j * GROUP, scale[j], bias[j], n, codes + j * GROUP);
      for (int j = 0; j < count; j++) scales[first + size_t(j)] = T::store(scale[j]);
      for (int j = 0; j < count; j++) biases[first + size_t(j)] = T::store(bias[j]);
      pack_codes(bits, codes, size_t(count) * GROUP, out + first * GROUP * size_t(bits) / 8);
    }
  }
}

}  // namespace
