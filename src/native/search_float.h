// The search of float modes: the few scales near mx.quantize's. search.h has the steps.

#pragma once

#include "floats.h"
#include "lanes.h"
#include "minifloat.h"
#include "pack.h"
#include "search.h"

namespace {

// Added to and taken off a magnitude between 2^e and 2^(e + 1), 2^e times these leave one bit of
// mantissa and three.
constexpr int32_t kE2M1RoundExponent = 22 << 23;  // of 2^22: added to the exponent's bits
constexpr float kE4M3RoundMagic = 0x1p20f;

// The nearest element's magnitude to a magnitude; beyond the largest, the largest.
template <int BITS>
REQUANT_INLINE Lanes nearest_element(Lanes a) {
  if constexpr (BITS == 4) {
    a = min(a, broadcast(kE2M1Max));
    const Lanes power = Lanes(Mask(max(a, broadcast(1.0f))) & int32_t(kInf32));
    const Lanes magic = Lanes(Mask(power) + kE2M1RoundExponent);
    return (a + magic) - magic;
  } else {
    a = min(a, broadcast(kE4M3Max));
    const Lanes power = Lanes(Mask(max(a, broadcast(kE4M3MinNormal))) & int32_t(kInf32));
    const Lanes magic = power * kE4M3RoundMagic;
    return (a + magic) - magic;
  }
}

// Nearest elements' codes of one group for a scale.
template <class T, int GROUP, int BITS>
REQUANT_INLINE void element_codes(const typename T::Stored* x, float scale, uint8_t* REQUANT_RESTRICT codes) {
  const float inverse = 1.0f / scale;
  alignas(64) float v[GROUP];
  for (int i = 0; i < GROUP; i++) v[i] = T::load(x[i]) * inverse;
  for (int i = 0; i < GROUP; i++) codes[i] = uint8_t(BITS == 4 ? encode_e2m1(v[i]) : encode_e4m3(v[i]));
}

// ---------------------------------------------------------------- mxfp4, mxfp8

// Sum of weight * (|x| - element * scale)^2, in squares of 1 / per_unit.
template <int GROUP, int BITS, bool WEIGHTED>
REQUANT_INLINE Lanes element_error(const Lanes* REQUANT_RESTRICT x, const Lanes* REQUANT_RESTRICT h, Lanes scale,
                                   Lanes per_unit) {
  const Lanes inverse = 1.0f / scale, ratio = scale * per_unit;
  Lanes error = broadcast(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes a = abs(x[i]);
    const Lanes product = nearest_element<BITS>(a * inverse) * ratio;
    const Lanes d = a * per_unit - product;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

// E8M0 bytes of the scales from 2^-120 to 2^120; a group beyond keeps the rule's.
constexpr int kFirstSearchedE8M0 = 7, kLastSearchedE8M0 = 247;

// The exponents next to the rule's.
template <class T, int BITS, bool WEIGHTED>
size_t mx_search(const void* w_, size_t groups, size_t groups_per_row, const requant::Search& search,
                 uint32_t* words, uint8_t* scales) {
  constexpr int group = 32;
  constexpr float largest = BITS == 4 ? kE2M1Max : kE4M3Max;
  const auto* w = static_cast<const typename T::Stored*>(w_);
  const size_t flushed = mx_quantize<T, BITS>(w_, groups, words, scales);
  auto* out = reinterpret_cast<uint8_t*>(words);

  alignas(64) Lanes x[group], columns[WEIGHTED ? group : 1], own[WEIGHTED ? group : 1];
  const Lanes* h = WEIGHTED && search.by_magnitude ? own : columns;
  alignas(64) float scale[kLanes], chosen[kLanes];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED)
      gather_weights<group>(search.weights, column, block_size(groups - column), groups_per_row, columns);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      gather_groups<T, group>(count, [&](int l) { return w + (first + size_t(l)) * group; }, x);
      if constexpr (WEIGHTED)
        if (search.by_magnitude) weigh_by_magnitude<group>(x, columns, own);
      for (int l = 0; l < kLanes; l++) {
        const int byte = l < count ? scales[first + size_t(l)] : 0;
        scale[l] = byte < kFirstSearchedE8M0 || byte > kLastSearchedE8M0 ? 0.0f : decode_e8m0(uint8_t(byte));
      }
      const Lanes mlx_scale = load_lanes(scale);
      const Lanes per_unit = 1.0f / mlx_scale, one = broadcast(1.0f);
      const Lanes mlx_error = element_error<group, BITS, WEIGHTED>(x, h, mlx_scale, per_unit);
      Lanes current = mlx_scale, least_error = mlx_error;
      const auto try_candidate = [&](float factor) {
        const Lanes error = element_error<group, BITS, WEIGHTED>(x, h, mlx_scale * factor, per_unit);
        const Mask improved = (error < least_error) &
                              improves_beyond_rounding<group>(error, broadcast(factor), mlx_error, one, largest);
        current = improved ? mlx_scale * factor : current;
        least_error = improved ? error : least_error;
      };
      try_candidate(0.5f);
      if (search.best || BITS == 8) try_candidate(2.0f);
      if (search.best) try_candidate(0.25f);
      store_lanes(chosen, current);
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

// ---------------------------------------------------------------- nvfp4

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
  const Lanes inverse = ratio > broadcast(kSmallestUnit) ? 1.0f / ratio : broadcast(0.0f);
  Lanes error = broadcast(0.0f);
  for (int i = 0; i < GROUP; i++) {
    const Lanes product = nearest_element<4>(y[i] * inverse) * ratio;
    const Lanes d = y[i] - product;
    error += (WEIGHTED ? h[i] * d : d) * d;
  }
  return error;
}

constexpr int kBestByteSteps[] = {-3, -2, -1, 1, 2, 3, 4, 5, 6};  // from the rule's scale byte
constexpr int kLargestE4M3 = 126;                                 // the byte of 448; 127 is NaN

// nvfp4: scale bytes around the rule's, which puts the largest value at element 6, up to
// those that put it at element 4 (whose neighbour 3 lies nearer to it than 4 to 6). The
// rule's codes are not made first: a group is encoded once, for the byte that it ends with.
template <class T, bool WEIGHTED>
void nvfp4_search(const void* w_, size_t groups, size_t groups_per_row, const requant::Search& search,
                  uint32_t* words, uint8_t* scales, const float* global_scale) {
  using Stored = typename T::Stored;
  static const Nvfp4SearchThresholds<T> thresholds;
  constexpr int group = 16;
  const float enc = global_scale != nullptr ? kNvfp4Max / *global_scale : 1.0f;
  const float dec = global_scale != nullptr ? *global_scale / kNvfp4Max : 1.0f;
  const auto* all_w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  const int tries = search.best ? int(sizeof kBestByteSteps / sizeof *kBestByteSteps) : 1;

  alignas(64) Lanes x[group], columns[WEIGHTED ? group : 1], own[WEIGHTED ? group : 1];
  const Lanes* h = WEIGHTED && search.by_magnitude ? own : columns;
  alignas(64) float scale[kLanes], tops[kLanes];
  alignas(64) int32_t byte[kLanes], four[kLanes], chosen[kLanes];
  alignas(64) uint8_t codes[kLanes * group];
  const size_t stride = block_stride<WEIGHTED>(groups, groups_per_row);
  for (size_t column = 0; column < stride; column += kLanes) {
    if constexpr (WEIGHTED)
      gather_weights<group>(search.weights, column, block_size(groups - column), groups_per_row, columns);
    for (size_t first = column; first < groups; first += stride) {
      const int count = block_size(groups - first);
      const Stored* w = all_w + first * group;
      gather_groups<T, group>(count, [&](int l) { return w + l * group; }, x);
      if constexpr (WEIGHTED)
        if (search.by_magnitude) weigh_by_magnitude<group>(x, columns, own);
      Mask highest = {};  // by integers: NaN is the largest
      for (int i = 0; i < group; i++) {
        x[i] = abs(x[i]);
        highest = Mask(x[i]) > highest ? Mask(x[i]) : highest;
      }
      const Lanes top = Lanes(highest);
      store_lanes(tops, top);
      for (int l = 0; l < kLanes; l++) byte[l] = int32_t(encode_e4m3(T::round(tops[l] / kE2M1Max) * enc));
      for (int l = 0; l < kLanes; l++) four[l] = int32_t(encode_e4m3(tops[l] * 0.25f / dec));
      for (int l = 0; l < kLanes; l++) scale[l] = decode_e4m3(uint32_t(byte[l])) * dec;
      const Lanes per_unit = kE2M1Max / top, mlx_ratio = load_lanes(scale) * per_unit;
      const Mask valid = is_searchable(top);
      for (int i = 0; i < group; i++) x[i] *= per_unit;
      const Lanes mlx_error = e2m1_error<group, WEIGHTED>(x, h, mlx_ratio);
      Lanes least_error = mlx_error;
      Mask current = load_lanes(byte);
      for (int k = 0; k < tries; k++) {
        for (int l = 0; l < kLanes; l++) {
          const int other = search.best ? byte[l] + kBestByteSteps[k] : four[l];
          chosen[l] = other < 1 || other > kLargestE4M3 ? byte[l] : other;
          scale[l] = decode_e4m3(uint32_t(chosen[l])) * dec;
        }
        const Lanes ratio = load_lanes(scale) * per_unit;
        const Lanes error = e2m1_error<group, WEIGHTED>(x, h, ratio);
        const Mask improved = valid & (error < least_error) &
                              improves_beyond_rounding<group>(error, ratio, mlx_error, mlx_ratio, kE2M1Max);
        current = improved ? load_lanes(chosen) : current;
        least_error = improved ? error : least_error;
      }
      store_lanes(chosen, current);
      for (int j = 0; j < count; j++) {
        const bool moved = chosen[j] != byte[j];
        scales[first + size_t(j)] = uint8_t(chosen[j]);
        if (global_scale == nullptr && (moved || byte[j] != kLargestE4M3))
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
