// Scales (and biases) found by search instead of by a group's range.
//
// A group's error is the sum of weight * (w - value)^2, with the value that its code, scale
// and bias as stored represent. For every group, one lane each (lanes.h):
//
//   1. The scale, bias and error of mx.quantize's rule: where a search starts, and what it
//      has to beat.
//   2. A grid of starts around it: for affine modes the group's range shrunken at either end
//      (search_plan), for float modes scales near the rule's.
//   3. Each candidate's scale and bias are rounded to the dtype that stores them, every value
//      is given the nearest code, and the error follows; the best candidate is kept.
//   4. Affine modes only: for the codes of a candidate, least squares give the best scale and
//      bias. The pair that predicts the least error is the next candidate; the plan says how
//      often codes and least squares alternate.
//   5. The best candidate is taken if its error is less than the rule's by more than rounding
//      in here can explain (improves_beyond_rounding); else the group is mx.quantize's.
//
// Float modes have few scales: they try those and no least squares (search_float.h). Steps 2
// to 4 of affine modes are search_lanes in search_affine.h.

#pragma once

#include "floats.h"
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr float kCodeRounding = 4.0f * kEpsilon32;  // relative rounding of a code before it is an integer
constexpr float kToleranceFactor = 1000.0f;         // times the squared rounding of a group's values
constexpr float kMinRelativeGain = 1.005f;          // an improvement is larger than half a percent
// Units of a group (about a scale) whose inverse and square are floats; outside, nothing is searched.
constexpr float kSmallestUnit = 1e-30f, kLargestUnit = 1e30f;

REQUANT_INLINE Mask is_searchable(Lanes unit) {
  return (unit > broadcast(kSmallestUnit)) & (unit < broadcast(kLargestUnit));
}

// Whether a candidate's error is less than mlx_error by more than rounding can explain. Both are in
// squares of a unit, the ratios are the two scales in units, largest is the largest code or element.
// Rounding moves a code by at most rounding_error, and half of its square's change falls to each.
template <int GROUP>
REQUANT_INLINE Mask improves_beyond_rounding(Lanes error, Lanes ratio, Lanes mlx_error, Lanes mlx_ratio,
                                             float largest) {
  const float rounding_error = largest * kCodeRounding;
  const float min_gain = kToleranceFactor * float(GROUP) * rounding_error * rounding_error;
  const Lanes tolerance = min_gain * (ratio * ratio + mlx_ratio * mlx_ratio);
  return error * kMinRelativeGain + tolerance < mlx_error;
}

// ---------------------------------------------------------------- weights and blocks

// Weights of each group brought to a mean of one; a group without any counts them alike.
template <int GROUP>
REQUANT_INLINE void normalize_weights(Lanes* h) {
  Lanes total = broadcast(0.0f);
  for (int i = 0; i < GROUP; i++) total += h[i];
  const Mask usable = is_searchable(total);
  const Lanes factor = float(GROUP) / total;
  for (int i = 0; i < GROUP; i++) h[i] = usable ? h[i] * factor : broadcast(1.0f);
}

template <int GROUP>
REQUANT_INLINE void gather_weights(const float* weights, size_t first, int count, size_t groups_per_row, Lanes* h) {
  if (weights == nullptr) {
    for (int i = 0; i < GROUP; i++) h[i] = broadcast(1.0f);
    return;
  }
  gather_groups<F32, GROUP>(
      count, [&](int l) { return weights + (first + size_t(l)) % groups_per_row * GROUP; }, h);
  normalize_weights<GROUP>(h);
}

// Added to a value's magnitude, in means of the magnitudes of its group: what a value near zero counts.
constexpr float kMagnitudeFloor = 0.375f;

// Weights of values x from the weights of their columns: weight * (|x| + floor * mean of |x|).
template <int GROUP>
REQUANT_INLINE void weigh_by_magnitude(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT columns,
                                       Lanes* REQUANT_RESTRICT h) {
  Lanes total = broadcast(0.0f);
  for (int i = 0; i < GROUP; i++) total += abs(x[i]);
  const Mask usable = is_searchable(total);
  const Lanes per_mean = usable ? float(GROUP) / total : broadcast(0.0f);
  const Lanes floor = usable ? broadcast(kMagnitudeFloor) : broadcast(1.0f);
  for (int i = 0; i < GROUP; i++) h[i] = columns[i] * (abs(x[i]) * per_mean + floor);
  normalize_weights<GROUP>(h);
}

// Groups between a block and the next one with its weights. Where rows are whole blocks,
// that is the one below, and they are done one after the other.
template <bool WEIGHTED>
REQUANT_INLINE size_t block_stride(size_t groups, size_t groups_per_row) {
  return WEIGHTED && groups_per_row % kLanes == 0 ? groups_per_row : groups;
}

REQUANT_INLINE int block_size(size_t left) { return int(left < size_t(kLanes) ? left : kLanes); }

}  // namespace
