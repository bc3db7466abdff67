// MLX affine mode: w = code * scale + bias, one scale and bias a group.

#pragma once

#include "floats.h"
#include "pack.h"

namespace {

constexpr size_t kBlock = 2048;  // values worked on at a time; every group size divides it
constexpr float kEps = 1e-7f;

// Least and greatest element, skipping NaN; of equal zeros the first counts.
template <class T>
void range_in_order(const typename T::Stored* w, int count, float& hi, float& lo) {
  hi = float_of(kInf32 | ~kAbs32);
  lo = float_of(kInf32);
  for (int i = 0; i < count; i++) {
    const float x = T::load(w[i]);
    hi = x > hi ? x : hi;
    lo = x < lo ? x : lo;
  }
}

// The same by integer keys, which order like the floats. NaN lies outside the
// keys of the infinities; it and the sign of zero send us to the slow walk.
template <class T, int GROUP>
REQUANT_INLINE void range_of(const typename T::Stored* REQUANT_RESTRICT w, bool signed_zero, float& hi,
                             float& lo) {
  using Key = typename T::Key;
  using Stored = typename T::Stored;
  constexpr int sign_shift = 8 * sizeof(Key) - 1;
  Key top = Key(~T::kAbs), bottom = T::kAbs;
  for (int i = 0; i < GROUP; i++) {
    Key key = Key(w[i]);
    key = Key(key ^ (Key(key >> sign_shift) & T::kAbs));
    top = key > top ? key : top;
    bottom = key < bottom ? key : bottom;
  }
  if (__builtin_expect(top > T::kInf || bottom < Key(~T::kInf) ||
                           (signed_zero && (bottom == 0 || bottom == -1)),
                       0))
    return range_in_order<T>(w, GROUP, hi, lo);
  hi = T::load(Stored(top ^ (Key(top >> sign_shift) & T::kAbs)));
  lo = T::load(Stored(bottom ^ (Key(bottom >> sign_shift) & T::kAbs)));
}

// Scale and bias of each group from its range.
REQUANT_INLINE void affine_parameters(const float* REQUANT_RESTRICT hi, const float* REQUANT_RESTRICT lo,
                                      int count, int bits, float* REQUANT_RESTRICT scale,
                                      float* REQUANT_RESTRICT bias) {
  if (bits == 1) {
    for (int i = 0; i < count; i++) {
      const float s = hi[i] - lo[i];
      scale[i] = s < kEps ? kEps : s;
      bias[i] = lo[i];
    }
    return;
  }
  const float n = float((1 << bits) - 1);
  for (int i = 0; i < count; i++) {
    float s = (hi[i] - lo[i]) / n;
    s = s < kEps ? kEps : s;
    const bool low = float_of(bits_of(lo[i]) & kAbs32) > float_of(bits_of(hi[i]) & kAbs32);
    const float edge = low ? lo[i] : hi[i];
    s = low ? s : -s;
    const float k = round_even(edge / s);
    const float fitted = edge / k;
    scale[i] = k != 0.0f ? fitted : s;
    bias[i] = k != 0.0f ? edge : 0.0f;
  }
}

template <class T, int GROUP>
REQUANT_INLINE void affine_codes(const typename T::Stored* REQUANT_RESTRICT w, float scale, float bias, float n,
                                 uint8_t* REQUANT_RESTRICT codes) {
  for (int i = 0; i < GROUP; i++) {
    float t = (T::load(w[i]) - bias) / scale;
    t = t > 0.0f ? t : 0.0f;  // NaN too
    t = t < n ? t : n;
    codes[i] = uint8_t(bits_of(t + kRoundMagic));  // the sum rounds to nearest even
  }
}

template <class T, int GROUP>
void affine_quantize(const void* w_, size_t groups, int bits, uint32_t* words, void* scales_, void* biases_) {
  using Stored = typename T::Stored;
  constexpr size_t per_block = kBlock / GROUP;
  const auto* w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  auto* scales = static_cast<Stored*>(scales_);
  auto* biases = static_cast<Stored*>(biases_);
  const float n = float((1 << bits) - 1);

  alignas(64) float hi[per_block], lo[per_block], scale[per_block], bias[per_block];
  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const int count = int(groups < per_block ? groups : per_block);
    for (int j = 0; j < count; j++) range_of<T, GROUP>(w + j * GROUP, bits == 1, hi[j], lo[j]);
    affine_parameters(hi, lo, count, bits, scale, bias);
    for (int j = 0; j < count; j++)
      affine_codes<T, GROUP>(w + j * GROUP, scale[j], bias[j], n, codes + j * GROUP);
    for (int j = 0; j < count; j++) scales[j] = T::store(scale[j]);
    for (int j = 0; j < count; j++) biases[j] = T::store(bias[j]);
    pack_codes(bits, codes, size_t(count) * GROUP, out);
    w += count * GROUP;
    out += size_t(count) * GROUP * bits / 8;
    scales += count;
    biases += count;
    groups -= count;
  }
}

// v = P(S(code * scale) + bias): the product is rounded to the dtype S of the scales, the
// sum to the promoted dtype P. FINITE: scale and bias are, so no NaN can arise.
template <class S, class P, class Out, int GROUP, bool FINITE>
REQUANT_INLINE void affine_values(const uint8_t* REQUANT_RESTRICT codes, float scale, float bias,
                                  typename Out::Stored* REQUANT_RESTRICT out) {
  if constexpr (S::kRounds) {  // the rounding is between product and sum
    for (int i = 0; i < GROUP; i++) {
      const float product = S::template round_known<FINITE>(float(codes[i]) * scale);
      out[i] = Out::store(P::template round_known<FINITE>(product + bias));
    }
  } else {
    alignas(64) float product[GROUP];
    for (int i = 0; i < GROUP; i++) product[i] = float(codes[i]) * scale;
    prevent_fma(product);
    for (int i = 0; i < GROUP; i++) out[i] = Out::store(P::template round_known<FINITE>(product[i] + bias));
  }
}

REQUANT_INLINE bool finite(float x) { return (bits_of(x) & kAbs32) < kInf32; }

template <class S, class B, class P, class Out, int GROUP>
void affine_dequantize(const uint32_t* words, const void* scales_, const void* biases_, size_t groups, int bits,
                       void* out_) {
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  const auto* scales = static_cast<const typename S::Stored*>(scales_);
  const auto* biases = static_cast<const typename B::Stored*>(biases_);
  auto* out = static_cast<typename Out::Stored*>(out_);
  constexpr size_t per_block = kBlock / GROUP;

  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const size_t count = groups < per_block ? groups : per_block;
    unpack_codes(bits, in, count * GROUP, codes);
    for (size_t j = 0; j < count; j++) {
      const float scale = S::load(scales[j]), bias = B::load(biases[j]);
      if (__builtin_expect(finite(scale) && finite(bias), 1))
        affine_values<S, P, Out, GROUP, true>(codes + j * GROUP, scale, bias, out + j * GROUP);
      else
        affine_values<S, P, Out, GROUP, false>(codes + j * GROUP, scale, bias, out + j * GROUP);
    }
    in += count * GROUP * bits / 8;
    scales += count;
    biases += count;
    out += count * GROUP;
    groups -= count;
  }
}

}  // namespace
