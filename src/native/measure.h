// Encoding and its error in one pass: a block of groups is encoded, decoded and compared while it is in
// the first-level cache.

#pragma once

#include "affine.h"
#include "floats.h"
#include "kernels.h"
#include "minifloat.h"
#include "values.h"

namespace {

// Counts the values of a block that are not finite; false if there are any.
template <class T>
REQUANT_INLINE bool is_finite_block(const typename T::Stored* w, size_t count, requant::EncodingError& error) {
  const size_t found = count_nonfinite<T>(w, count);
  if (__builtin_expect(found != 0, 0)) {
    if (error.nonfinite == 0) error.first_nonfinite = error.values + size_t(first_nonfinite<T>(w, count));
    error.nonfinite += found;
  }
  error.values += count;
  return found == 0;
}

// encode(first, count): makes the codes of groups; decode(first, count, values): their values;
// step(group): the size of a scale, not positive or NaN if errors have no unit there.
template <class T, int GROUP, class Encode, class Decode, class Step>
REQUANT_INLINE void measure_blocks(const typename T::Stored* w, size_t groups, requant::EncodingError& error,
                                   Encode encode, Decode decode, Step step) {
  constexpr size_t per_block = kBlock / GROUP;
  alignas(64) typename T::Stored values[kBlock];
  alignas(64) float group_max[per_block];
  for (size_t first = 0; first < groups; first += per_block) {
    const size_t count = groups - first < per_block ? groups - first : per_block;
    const auto* x = w + first * GROUP;
    if (!is_finite_block<T>(x, count * GROUP, error)) continue;
    encode(first, count);
    decode(first, count, values);
    add_group_errors<T, T, GROUP>(x, values, count, group_max, error.sums);
    for (size_t j = 0; j < count; j++) {
      const float unit = step(first + j), ratio = group_max[j] / unit, most = error.max_steps;
      if (unit > 0.0f && (ratio > most || ratio != ratio)) error.max_steps = ratio;  // NaN stays
    }
  }
}

// ENCODE: makes the codes first, else they are read.
template <class T, int GROUP, bool ENCODE>
void measure_affine(const void* w_, size_t groups, int bits, requant::Encoded codes, requant::EncodingError& error) {
  using Stored = typename T::Stored;
  const auto* w = static_cast<const Stored*>(w_);
  auto* scales = static_cast<Stored*>(codes.scales);
  auto* biases = static_cast<Stored*>(codes.biases);
  const auto words = [&](size_t group) { return codes.words + group * size_t(GROUP * bits / 32); };
  measure_blocks<T, GROUP>(
      w, groups, error,
      [&](size_t first, size_t count) {
        if constexpr (ENCODE)
          affine_quantize<T, GROUP>(w + first * GROUP, count, bits, words(first), scales + first, biases + first);
      },
      [&](size_t first, size_t count, Stored* values) {
        affine_dequantize<T, T, T, T, GROUP>(words(first), scales + first, biases + first, count, bits, values);
      },
      [&](size_t group) { return magnitude(T::load(scales[group])); });
}

template <class T, int BITS, bool ENCODE>
void measure_mx(const void* w_, size_t groups, requant::Encoded codes, requant::EncodingError& error) {
  constexpr int group = 32;
  const auto* w = static_cast<const typename T::Stored*>(w_);
  auto* scales = static_cast<uint8_t*>(codes.scales);
  const auto words = [&](size_t g) { return codes.words + g * size_t(group * BITS / 32); };
  measure_blocks<T, group>(
      w, groups, error,
      [&](size_t first, size_t count) {
        if constexpr (ENCODE)
          error.flushed += mx_quantize<T, BITS>(w + first * group, count, words(first), scales + first);
      },
      [&](size_t first, size_t count, typename T::Stored* values) {
        mx_dequantize<T, BITS>(words(first), scales + first, count, values);
      },
      [&](size_t g) { return scales[g] == 255 ? 0.0f : decode_e8m0(scales[g]); });
}

template <class T, bool ENCODE>
void measure_nvfp4(const void* w_, size_t groups, requant::Encoded codes, requant::EncodingError& error) {
  constexpr int group = 16;
  const auto* w = static_cast<const typename T::Stored*>(w_);
  auto* scales = static_cast<uint8_t*>(codes.scales);
  const auto words = [&](size_t g) { return codes.words + g * 2; };
  measure_blocks<T, group>(
      w, groups, error,
      [&](size_t first, size_t count) {
        if constexpr (ENCODE) nvfp4_quantize<T>(w + first * group, count, words(first), scales + first, nullptr);
      },
      [&](size_t first, size_t count, typename T::Stored* values) {
        nvfp4_dequantize<T>(words(first), scales + first, count, 1.0f, values);
      },
      [&](size_t g) { return magnitude(decode_e4m3(scales[g])); });
}

}  // namespace
