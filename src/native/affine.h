// MLX affine mode: w = code * scale + bias, one scale and bias a group.

#pragma once

#include "floats.h"
#include "lanes.h"
#include "pack.h"

namespace {

constexpr size_t kBlock = 2048;  // values worked on at a time; every group size divides it
constexpr float kEps = 1e-7f;

REQUANT_INLINE bool finite(float x) { return (bits_of(x) & kAbs32) < kInf32; }
REQUANT_INLINE float magnitude(float x) { return float_of(bits_of(x) & kAbs32); }

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
REQUANT_NOINLINE bool range_by_keys(const typename T::Stored* REQUANT_RESTRICT w, bool signed_zero, float& hi,
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
  const bool is_finite = top < T::kInf && bottom > Key(~T::kInf);
  if (__builtin_expect(top > T::kInf || bottom < Key(~T::kInf) ||
                           (signed_zero && (bottom == 0 || bottom == -1)),
                       0)) {
    range_in_order<T>(w, GROUP, hi, lo);
    return is_finite;
  }
  hi = T::load(Stored(top ^ (Key(top >> sign_shift) & T::kAbs)));
  lo = T::load(Stored(bottom ^ (Key(bottom >> sign_shift) & T::kAbs)));
  return is_finite;
}

// The same by integers, which order like floats of one sign: the largest signed one is the greatest positive
// value, the largest unsigned one the least negative. True if all values are finite.
template <class T, int GROUP>
REQUANT_INLINE bool range_of(const typename T::Stored* REQUANT_RESTRICT w, bool signed_zero, float& hi,
                             float& lo) {
  using Key = typename T::Key;
  using Stored = typename T::Stored;
  Key top = Key(~T::kAbs);
  Stored bottom = 0;
  for (int i = 0; i < GROUP; i++) {
    top = Key(w[i]) > top ? Key(w[i]) : top;
    bottom = w[i] > bottom ? w[i] : bottom;
  }
  constexpr Stored sign = Stored(T::kAbs + Stored(1));
  if (__builtin_expect(top >= 0 && top < T::kInf && bottom > sign && bottom < Stored(sign + Stored(T::kInf)), 1)) {
    hi = T::load(Stored(top));
    lo = T::load(bottom);
    return true;
  }
  return range_by_keys<T, GROUP>(w, signed_zero, hi, lo);
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

constexpr float kLargestPlainScale = 0x1p100f;  // a code more is finite
constexpr float kCodeMagic = 0x1.8p23f;         // as kRoundMagic, for negative numbers too

// As affine_codes for a group of finite 16-bit values and a scale up to kLargestPlainScale, packed: each of
// the GROUP / 8 integers has eight codes in its low 8 * BITS bits.
template <class T, int GROUP, int BITS>
REQUANT_INLINE void affine_eights(const typename T::Stored* REQUANT_RESTRICT w, float scale, float bias,
                                  uint64_t* REQUANT_RESTRICT x) {
  static_assert(GROUP % (4 * kLanes) == 0, "whole quarters");
  for (int i = 0; i < GROUP; i += 4 * kLanes) {
    Mask a, b;
    load_deinterleaved(w + i, a, b);
    const Pair first = widen_pair<T>(a), last = widen_pair<T>(b);
    // Nearest codes, and those below 0 and above the last one, in the low 16 bits.
    const auto code = [&](Lanes value) { return Mask((value - bias) / scale + kCodeMagic); };
    const auto both = [&](Mask low, Mask high) {
      constexpr auto most = int16_t((1 << BITS) - 1);
      MaskHalves c = MaskHalves(join_halves(low, high << 16));
      c = c > int16_t(0) ? c : MaskHalves{};
      return Mask(c < most ? c : MaskHalves{} + most);
    };
    const Mask even = both(code(first.even), code(last.even)), odd = both(code(first.odd), code(last.odd));
    Mask four = even | odd << BITS;
    if constexpr (BITS < 8) four = (four & 0xffff) | Mask(Words(four & int32_t(0xffff0000u)) >> (16 - 2 * BITS));
    four = natural_order(four);
    Eights eight = Eights(four);
    if constexpr (BITS < 8) eight = (eight & 0xffffffffu) | (eight & ~uint64_t(0xffffffffu)) >> (32 - 4 * BITS);
    std::memcpy(x + i / 8, &eight, sizeof eight);
  }
}

// The scales and biases of a block of groups, before they are rounded.
template <int GROUP>
struct AffineBlock {
  static constexpr int kGroups = int(kBlock) / GROUP;
  alignas(64) float scale[kGroups], bias[kGroups];
  bool is_finite[kGroups];  // all values are
};

// Codes of count groups, packed.
template <class T, int GROUP, int BITS>
REQUANT_NOINLINE void affine_block(const typename T::Stored* w, int count, const AffineBlock<GROUP>& block,
                                   uint8_t* out) {
  alignas(64) uint64_t x[kBlock / 8];
  for (int j = 0; j < count; j++) {
    uint64_t* eights = x + j * (GROUP / 8);
    if constexpr (sizeof *w == 2 && GROUP % (4 * kLanes) == 0) {
      if (__builtin_expect(block.is_finite[j] && magnitude(block.scale[j]) < kLargestPlainScale, 1)) {
        affine_eights<T, GROUP, BITS>(w + j * GROUP, block.scale[j], block.bias[j], eights);
        continue;
      }
    }
    alignas(64) uint8_t codes[GROUP];
    affine_codes<T, GROUP>(w + j * GROUP, block.scale[j], block.bias[j], float((1 << BITS) - 1), codes);
    squeeze_eights<BITS>(codes, GROUP / 8, eights);
  }
  store_eights<BITS>(x, size_t(count) * (GROUP / 8), out);
}

template <class T, int GROUP>
void affine_quantize(const void* w_, size_t groups, int bits, uint32_t* words, void* scales_, void* biases_) {
  using Stored = typename T::Stored;
  constexpr int per_block = AffineBlock<GROUP>::kGroups;
  const auto* w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  auto* scales = static_cast<Stored*>(scales_);
  auto* biases = static_cast<Stored*>(biases_);

  alignas(64) float hi[per_block], lo[per_block];
  AffineBlock<GROUP> block;
  while (groups > 0) {
    const int count = groups < size_t(per_block) ? int(groups) : per_block;
    for (int j = 0; j < count; j++)
      block.is_finite[j] = range_of<T, GROUP>(w + j * GROUP, bits == 1, hi[j], lo[j]);
    affine_parameters(hi, lo, count, bits, block.scale, block.bias);
    for (int j = 0; j < count; j++) scales[j] = T::store(block.scale[j]);
    for (int j = 0; j < count; j++) biases[j] = T::store(block.bias[j]);
    with_bits(bits, [&](auto b) { affine_block<T, GROUP, decltype(b)::value>(w, count, block, out); });
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

// Whether no code up to n has a product that T (16 bits) rounds as a subnormal number, or a product or
// value that it rounds to infinity.
template <class T>
REQUANT_INLINE bool is_plain_scale(float scale, float bias, float n) {
  const float a = magnitude(scale);
  return a >= T::kLeastNormal && n * a + magnitude(bias) < T::kBelowInfinity;
}

// Values of a pair of codes, as affine_values has them, for a scale and a bias of T that are plain.
template <class T>
REQUANT_INLINE Mask affine_pair(Lanes even, Lanes odd, float scale, float bias) {
  return narrow_pair<T>({round_normal<T>(even * scale) + bias, round_normal<T>(odd * scale) + bias});
}

template <class T, int GROUP, int BITS>
REQUANT_INLINE void affine_pairs(const uint64_t* REQUANT_RESTRICT x, float scale, float bias,
                                 typename T::Stored* REQUANT_RESTRICT out) {
  constexpr uint32_t mask = (1u << BITS) - 1;
  for (int i = 0; i < GROUP; i += 4 * kLanes) {
    Eights eight = load_as<Eights>(x + i / 8);
    constexpr uint64_t low = 0xffffffffu;
    if constexpr (BITS < 8) eight = (eight & low) | (eight << (32 - 4 * BITS) & ~low);
    const Words four = Words(eight);
    const auto quarter = [&](int k) {
      Words q = four >> (k * BITS);
      if (BITS < 8 || k < 3) q &= mask;
      return __builtin_convertvector(Mask(q), Lanes);
    };
    store_interleaved(affine_pair<T>(quarter(0), quarter(1), scale, bias),
                      affine_pair<T>(quarter(2), quarter(3), scale, bias), out + i);
  }
}

// The same by a table of the values of all codes, at most sixteen.
template <class T, int GROUP>
REQUANT_INLINE void affine_lookup(const uint8_t* REQUANT_RESTRICT codes, float scale, float bias,
                                  typename T::Stored* REQUANT_RESTRICT out) {
  alignas(64) static constexpr float even[16] = {0, 2, 4, 6, 8, 10, 12, 14}, odd[16] = {1, 3, 5, 7, 9, 11, 13, 15};
  alignas(64) uint16_t entries[32];
  for (int i = 0; i < 8; i += kLanes) {
    const Mask pair = affine_pair<T>(load_lanes(even + i), load_lanes(odd + i), scale, bias);
    std::memcpy(entries + 2 * i, &pair, sizeof pair);
  }
  const Table table = Table::of(entries);
  for (int i = 0; i < GROUP; i += 16) table.get(codes + i, out + i);
}

// Values of one dtype with their scales and biases.
template <class T, int GROUP, int BITS>
REQUANT_NOINLINE void affine_block_values(const uint8_t* in, int count, const typename T::Stored* scales,
                                          const typename T::Stored* biases, typename T::Stored* out) {
  constexpr bool by_table = sizeof *out == 2 && kHasLookup && BITS <= 4;
  constexpr bool by_pairs = sizeof *out == 2 && !by_table && GROUP % (4 * kLanes) == 0;

  alignas(64) uint8_t codes[kBlock];
  alignas(64) uint64_t x[kBlock / 8];
  if constexpr (by_pairs)
    load_eights<BITS>(in, size_t(count) * (GROUP / 8), x);
  else
    unpack_codes<BITS>(in, size_t(count) * GROUP, codes);
  for (int j = 0; j < count; j++, out += GROUP) {
    const float scale = T::load(scales[j]), bias = T::load(biases[j]);
    uint8_t* c = codes + j * GROUP;
    if constexpr (by_pairs || by_table) {
      if (__builtin_expect(is_plain_scale<T>(scale, bias, float((1 << BITS) - 1)), 1)) {
        if constexpr (by_table)
          affine_lookup<T, GROUP>(c, scale, bias, out);
        else
          affine_pairs<T, GROUP, BITS>(x + j * (GROUP / 8), scale, bias, out);
        continue;
      }
      if constexpr (by_pairs) unpack_codes<BITS>(in + j * (GROUP * BITS / 8), GROUP, c);
    }
    if (__builtin_expect(finite(scale) && finite(bias), 1))
      affine_values<T, T, T, GROUP, true>(c, scale, bias, out);
    else
      affine_values<T, T, T, GROUP, false>(c, scale, bias, out);
  }
}

template <class S, class B, class P, class Out, int GROUP>
void affine_dequantize(const uint32_t* words, const void* scales_, const void* biases_, size_t groups, int bits,
                       void* out_) {
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  const auto* scales = static_cast<const typename S::Stored*>(scales_);
  const auto* biases = static_cast<const typename B::Stored*>(biases_);
  auto* out = static_cast<typename Out::Stored*>(out_);
  constexpr int per_block = int(kBlock) / GROUP;

  while (groups > 0) {
    const int count = groups < size_t(per_block) ? int(groups) : per_block;
    if constexpr (__is_same(S, B) && __is_same(S, Out)) {
      with_bits(bits, [&](auto b) {
        affine_block_values<S, GROUP, decltype(b)::value>(in, count, scales, biases, out);
      });
    } else {
      alignas(64) uint8_t codes[kBlock];
      unpack_codes(bits, in, size_t(count) * GROUP, codes);
      for (int j = 0; j < count; j++) {
        const float scale = S::load(scales[j]), bias = B::load(biases[j]);
        if (__builtin_expect(finite(scale) && finite(bias), 1))
          affine_values<S, P, Out, GROUP, true>(codes + j * GROUP, scale, bias, out + j * GROUP);
        else
          affine_values<S, P, Out, GROUP, false>(codes + j * GROUP, scale, bias, out + j * GROUP);
      }
    }
    in += size_t(count) * GROUP * bits / 8;
    scales += count;
    biases += count;
    out += count * GROUP;
    groups -= size_t(count);
  }
}

}  // namespace
