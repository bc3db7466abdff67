// MLX float modes: mxfp4 and mxfp8 (E8M0 scales, groups of 32) and nvfp4 (E4M3
// scales, groups of 16, an optional scale of the whole tensor).

#pragma once

#include "affine.h"
#include "floats.h"
#include "lanes.h"
#include "pack.h"

namespace {

constexpr float kE2M1Max = 6.0f, kE4M3Max = 448.0f;
constexpr float kE4M3MinNormal = 0x1p-6f;
constexpr float kNvfp4Max = kE2M1Max * kE4M3Max;  // the largest value under a global scale of one

// ---------------------------------------------------------------- float4_e2m1

// By halfway points: as MLX's table search, a tie goes toward zero and code 8
// (minus zero) is never produced. Exact below 2^23.
REQUANT_INLINE uint32_t encode_e2m1(float v) {
  const uint32_t u = bits_of(v);
  const uint32_t a = u & kAbs32;
  uint32_t code = 0;
  code += a > 0x3e800000u;  // .25
  code += a > 0x3f400000u;  // .75
  code += a > 0x3fa00000u;  // 1.25
  code += a > 0x3fe00000u;  // 1.75
  code += a > 0x40200000u;  // 2.5
  code += a > 0x40600000u;  // 3.5
  code += a > 0x40a00000u;  // 5
  return code | (code != 0 ? (u >> 28) & 8u : 0u);
}

// The same on magnitudes as stored: code = how many of seven ascending thresholds lie
// strictly below. One integer comparison each, in lanes as narrow as the dtype.
template <class T, int GROUP>
REQUANT_INLINE void count_thresholds(const typename T::Stored* REQUANT_RESTRICT w,
                                     const typename T::Key* REQUANT_RESTRICT thresholds,
                                     uint8_t* REQUANT_RESTRICT codes) {
  using Key = typename T::Key;
  constexpr int sign_shift = 8 * sizeof(Key) - 1;
  Key t[7];
  for (int k = 0; k < 7; k++) t[k] = thresholds[k];
  for (int i = 0; i < GROUP; i++) {
    const Key a = Key(w[i] & T::kAbs);
    Key code = 0;
    for (int k = 0; k < 7; k++) code = Key(code + Key(a > t[k]));
    const Key sign = Key(Key(Key(w[i]) >> sign_shift) & 8);
    codes[i] = uint8_t(code | (code != 0 ? sign : Key(0)));
  }
}

// E4M3 codes of x / 2^e on stored bits: normal numbers by rounding the mantissa to three
// bits, subnormal ones (below 2^-6) by counting halfway points. Ties go to the even code.
template <class T>
struct E4M3Thresholds {
  typename T::Key normal, halfway[8];

  E4M3Thresholds() : normal(typename T::Key(T::store(kE4M3MinNormal))) {
    // A code is passed by a strictly larger magnitude; odd ones let the tie pass.
    for (int k = 0; k < 8; k++)
      halfway[k] = typename T::Key(T::store((float(k) + 0.5f) * 0.001953125f) - uint32_t(k & 1));
  }
};

template <class T, int GROUP>
REQUANT_INLINE void e4m3_of_scaled(const typename T::Stored* REQUANT_RESTRICT w, int e, const E4M3Thresholds<T>& base,
                                   uint8_t* REQUANT_RESTRICT codes) {
  using Key = typename T::Key;
  using Stored = typename T::Stored;
  constexpr int drop = T::kMantissa - 3, to_sign = 8 * sizeof(Key) - 8;
  constexpr Stored below_half = Stored((1 << (drop - 1)) - 1);
  const Key shift = Key(Key(e) * T::kExponentStep);
  const Stored rebias = Stored((T::kBias + e - 7) * 8);
  const Key normal = Key(base.normal + shift);
  Key halfway[8];
  for (int k = 0; k < 8; k++) halfway[k] = Key(base.halfway[k] + shift);
  alignas(64) Stored wide[GROUP];
  for (int i = 0; i < GROUP; i++) {
    const Key a = Key(w[i] & T::kAbs);
    Stored small = 0;
    for (int k = 0; k < 8; k++) small = Stored(small + Stored(a > halfway[k]));
    const Stored odd = Stored(Stored(Stored(a) >> drop) & 1);
    const Stored rounded = Stored(Stored(Stored(a) + below_half) + odd);
    const Stored code = Stored(Stored(rounded >> drop) - rebias);
    const Stored sign = Stored(Stored(w[i] >> to_sign) & 0x80);
    wide[i] = Stored((a < normal ? small : code) | sign);
  }
  for (int i = 0; i < GROUP; i++) codes[i] = uint8_t(wide[i]);
}

// The same for a group without subnormal codes, of which zeros are none; false if there are others.
template <class T, int GROUP>
REQUANT_INLINE bool normal_e4m3_of_scaled(const typename T::Stored* REQUANT_RESTRICT w, int e,
                                          const E4M3Thresholds<T>& base, uint8_t* REQUANT_RESTRICT codes) {
  using Key = typename T::Key;
  using Stored = typename T::Stored;
  constexpr int drop = T::kMantissa - 3, to_sign = 8 * sizeof(Key) - 8;
  constexpr Stored below_half = Stored((1 << (drop - 1)) - 1);
  const Stored rebias = Stored((T::kBias + e - 7) * 8);
  const Key normal = Key(base.normal + Key(Key(e) * T::kExponentStep));
  alignas(64) Stored wide[GROUP];
  Stored subnormal = 0;
  for (int i = 0; i < GROUP; i++) {
    const Stored a = Stored(w[i] & T::kAbs);
    const Stored rounded = Stored(Stored(a + below_half) + Stored(Stored(a >> drop) & 1));
    const Stored code = Stored(Stored(rounded >> drop) - rebias);
    const bool small = Key(a) < normal;
    subnormal = Stored(subnormal | (small ? a : Stored(0)));
    wide[i] = Stored((small ? Stored(0) : code) | Stored(Stored(w[i] >> to_sign) & 0x80));
  }
  for (int i = 0; i < GROUP; i++) codes[i] = uint8_t(wide[i]);
  return subnormal == 0;
}

// E4M3 codes of x * inverse, for finite values of 16 bits.
template <class T, int GROUP>
REQUANT_INLINE void e4m3_quarters(const typename T::Stored* REQUANT_RESTRICT w, float inverse,
                                  uint8_t* REQUANT_RESTRICT codes) {
  for (int i = 0; i < GROUP; i += 4 * kLanes) {
    Mask a, b;
    load_deinterleaved(w + i, a, b);
    const Pair first = widen_pair<T>(a), last = widen_pair<T>(b);
    const auto code = [&](Lanes x) {
      const Lanes v = x * inverse;
      return nearest_bits<3, 7>(min(abs(v), broadcast(kE4M3Max))) | (Mask(Words(v) >> 24) & 0x80);
    };
    const Mask c = code(first.even) | code(first.odd) << 8 | code(last.even) << 16 | code(last.odd) << 24;
    const Mask bytes = natural_order(c);
    std::memcpy(codes + i, &bytes, sizeof bytes);
  }
}

// E2M1 codes of x / 2^e on stored bits: one bit of mantissa, ties toward zero; below 1 by the two
// halfway points there. quarter, three_quarters: as stored, times 2^e.
template <class T, int GROUP>
REQUANT_INLINE void e2m1_of_scaled(const typename T::Stored* REQUANT_RESTRICT w, int e, typename T::Key quarter,
                                   typename T::Key three_quarters, uint8_t* REQUANT_RESTRICT codes) {
  using Key = typename T::Key;
  using Stored = typename T::Stored;
  constexpr int drop = T::kMantissa - 1, to_sign = 8 * sizeof(Key) - 4;
  constexpr Stored below_half = Stored((1 << (drop - 1)) - 1);
  const Stored rebias = Stored((T::kBias + e - 1) * 2);
  for (int i = 0; i < GROUP; i++) {
    const Key a = Key(w[i] & T::kAbs);
    const Key is_half = Key(-Key(a > quarter)), is_one = Key(-Key(a > three_quarters));
    const Key small = Key(-Key(is_half + is_one));
    const Key wide = Key(Stored(Stored(Stored(a) + below_half) >> drop) - rebias);  // less than small below 1
    const Key sign = Key(Stored(w[i] >> to_sign) & 8 & is_half);                    // no minus zero
    codes[i] = uint8_t((wide > small ? wide : small) | sign);
  }
}

constexpr float kHalfways[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};

constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// MLX's own search: the first entry at the least distance. From 2^23 on the
// distances round, so an entry before the nearest can win; NaN gives 0.
REQUANT_INLINE uint32_t search_e2m1(float v) {
  float entries[16];
  std::memcpy(entries, kE2M1, sizeof entries);
  uint32_t best = 0;
  float least = float_of(bits_of(v - entries[0]) & kAbs32);
  for (uint32_t c = 1; c < 16; c++) {
    const float distance = float_of(bits_of(v - entries[c]) & kAbs32);
    if (distance < least) {
      least = distance;
      best = c;
    }
  }
  return best;
}

REQUANT_INLINE float decode_e2m1(uint32_t code) {
  const int32_t m = int32_t(code & 7u);
  int32_t doubled = 2 * m - 4 > m ? 2 * m - 4 : m;
  doubled = 4 * m - 16 > doubled ? 4 * m - 16 : doubled;
  return float_of(bits_of(float(doubled) * 0.5f) | (code & 8u) << 28);
}

template <class T>
REQUANT_INLINE typename T::Key largest_magnitude(const typename T::Stored* REQUANT_RESTRICT w, int count) {
  using Key = typename T::Key;
  Key top = 0;
  for (int i = 0; i < count; i++) {
    const Key key = Key(w[i] & T::kAbs);
    top = key > top ? key : top;
  }
  return top;
}

// ---------------------------------------------------------------- mxfp4, mxfp8

// Least E with 2^E >= s, for finite s > 0.
REQUANT_INLINE int ceil_log2(float s) {
  const uint32_t normal = bits_of(s), u = normal < 0x00800000u ? bits_of(s * 0x1p23f) : normal;
  return int((u + 0x7fffffu) >> 23) - (normal < 0x00800000u ? 150 : 127);
}

REQUANT_INLINE float power_of_two(int e) { return float_of(uint32_t(e + 127) << 23); }  // -126..127

// A group with infinities or NaN, as MLX computes it on x86-64. The divisor is 0;
// 0 / 0 is the negative NaN of that processor, and MLX's bfloat16 NaN has no sign.
template <class T, int BITS>
void mx_codes_nonfinite(const typename T::Stored* w, uint8_t* codes) {
  for (int i = 0; i < 32; i++) {
    const uint32_t u = bits_of(T::load(w[i]));
    const uint32_t a = u & kAbs32;
    const bool nan = a == 0 || a > kInf32;
    const bool negative = nan && T::kUnsignedNan ? false : a == 0 ? true : (u >> 31) != 0;
    codes[i] = BITS == 4 ? 0 : uint8_t(negative ? 0xfe : 0x7e);
  }
}

template <class T, int BITS>
size_t mx_quantize(const void* w_, size_t groups, uint32_t* words, uint8_t* scales) {
  using Stored = typename T::Stored;
  constexpr int group = 32;
  constexpr float largest = BITS == 4 ? kE2M1Max : kE4M3Max;
  constexpr size_t per_block = kBlock / group;
  const auto* w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);
  size_t flushed = 0;
  const E4M3Thresholds<T> e4m3;
  const auto quarter = typename T::Key(T::store(0.25f)), three_quarters = typename T::Key(T::store(0.75f));

  alignas(64) uint8_t codes[kBlock];
  alignas(64) typename T::Key top[per_block];
  alignas(64) int32_t exponent[per_block];
  while (groups > 0) {
    const int count = int(groups < per_block ? groups : per_block);
    for (int j = 0; j < count; j++) top[j] = largest_magnitude<T>(w + j * group, group);
    for (int j = 0; j < count; j++) {
      const float s = T::round(T::load(Stored(top[j])) / largest);
      exponent[j] = s == 0.0f ? 0 : ceil_log2(s);
    }
    for (int j = 0; j < count; j++) {
      const Stored* x = w + j * group;
      uint8_t* c = codes + j * group;
      const int e = exponent[j];
      if (__builtin_expect(top[j] >= T::kInf, 0)) {
        scales[j] = sizeof(Stored) == 4 ? 128 : 0;
        mx_codes_nonfinite<T, BITS>(x, c);
        continue;
      }
      if (__builtin_expect(e < -127, 0)) {
        // MLX's byte would wrap around and blow the group up.
        scales[j] = 127;
        std::memset(c, 0, group);
        flushed++;
        continue;
      }
      scales[j] = uint8_t(e + 127);
      if constexpr (BITS == 4) {
        if (e - 2 >= T::kMinExponent) {  // scaled by a power of two, the thresholds are exact
          const auto shift = typename T::Key(e) * T::kExponentStep;
          e2m1_of_scaled<T, group>(x, e, typename T::Key(quarter + shift), typename T::Key(three_quarters + shift), c);
          continue;
        }
      } else if (e - 10 >= T::kMinExponent) {
        if (!normal_e4m3_of_scaled<T, group>(x, e, e4m3, c)) e4m3_of_scaled<T, group>(x, e, e4m3, c);
        continue;
      }
      if constexpr (BITS == 8 && sizeof *x == 2 && group % (4 * kLanes) == 0) {
        e4m3_quarters<T, group>(x, power_of_two(-e), c);
        continue;
      }
      const float inverse = power_of_two(-e);  // e <= 126; the product is exact where it matters
      for (int i = 0; i < group; i++) {
        const float v = T::load(x[i]) * inverse;
        c[i] = uint8_t(BITS == 4 ? encode_e2m1(v) : encode_e4m3(v));
      }
    }
    pack_codes<BITS>(codes, size_t(count) * group, out);
    w += count * group;
    out += size_t(count) * group * BITS / 8;
    scales += count;
    groups -= count;
  }
  return flushed;
}

// 2^(byte - 127); byte 255 gives inf.
REQUANT_INLINE float decode_e8m0(uint8_t byte) {
  return float_of(byte == 0 ? 0x00400000u : uint32_t(byte) << 23);
}

// The values of all codes of E2M1 for each scale byte, each computed and rounded as a single one is.
template <class Out>
struct E2M1Tables {
  Table of[256];

  template <class Scale>
  explicit E2M1Tables(Scale scale) {
    for (int byte = 0; byte < 256; byte++) {
      uint16_t entries[16];
      for (int c = 0; c < 16; c++) entries[c] = uint16_t(Out::store(decode_e2m1(uint32_t(c)) * scale(uint8_t(byte))));
      of[byte] = Table::of(entries);
    }
  }
};

template <class Out>
constexpr bool kHasTables = kHasLookup && sizeof(typename Out::Stored) == 2;

template <class Out, int GROUP>
void e2m1_lookup(const E2M1Tables<Out>& tables, const uint32_t* words, const uint8_t* scales, size_t groups,
                 uint16_t* out) {
  constexpr size_t per_block = kBlock / GROUP;
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const size_t count = groups < per_block ? groups : per_block;
    unpack_codes<4>(in, count * GROUP, codes);
    for (size_t j = 0; j < count; j++) {
      const Table table = tables.of[scales[j]];
      for (size_t i = j * GROUP; i < (j + 1) * GROUP; i += 16) table.get(codes + i, out + i);
    }
    in += count * GROUP / 2;
    scales += count;
    out += count * GROUP;
    groups -= count;
  }
}

// Values of E4M3 codes, none of them NaN, times a scale: no product is infinite, and a bfloat16 one is exact.
template <class Out, int GROUP>
REQUANT_INLINE void e4m3_values(const uint8_t* REQUANT_RESTRICT codes, float scale, uint16_t* REQUANT_RESTRICT out) {
  for (int i = 0; i < GROUP; i += 4 * kLanes) {
    const Mask w = load_as<Mask>(codes + i);
    // Its magnitude as the last bits of exponent and the first of mantissa, as widen_f16 does it.
    const auto value = [&](Mask a, Mask sign) {
      const Lanes y = Lanes((a & 0x07f00000) + 0x3c000000), least = min(y, (y + y) - kE4M3MinNormal);
      return Lanes(Mask(least) | (sign & int32_t(0x80000000u))) * scale;
    };
    const Lanes x[4] = {value(w << 20, w << 24), value(w << 12, w << 16), value(w << 4, w << 8), value(w >> 4, w)};
    const auto pair = [&](Lanes even, Lanes odd) {
      if constexpr (__is_same(Out, BF16)) return join_halves(Mask(Words(even) >> 16), Mask(odd));
      return narrow_pair<Out>({even, odd});
    };
    store_interleaved(pair(x[0], x[1]), pair(x[2], x[3]), out + i);
  }
}

template <class Out>
REQUANT_INLINE bool is_plain_e8m0(uint8_t byte) {
  return __is_same(Out, BF16) ? byte >= 20 && byte <= 240 : byte <= 127 + 7;
}

template <class Out, int BITS>
void mx_dequantize(const uint32_t* words, const uint8_t* scales, size_t groups, void* out_) {
  constexpr int group = 32;
  constexpr size_t per_block = kBlock / group;
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  auto* out = static_cast<typename Out::Stored*>(out_);
  if constexpr (BITS == 4 && kHasTables<Out>) {
    static const E2M1Tables<Out> tables([](uint8_t byte) { return Out::round(decode_e8m0(byte)); });
    return e2m1_lookup<Out, group>(tables, words, scales, groups, out);
  }
  constexpr bool quarters = BITS == 8 && sizeof *out == 2 && group % (4 * kLanes) == 0;

  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const size_t count = groups < per_block ? groups : per_block;
    unpack_codes<BITS>(in, count * group, codes);
    bool has_nan = false;
    if constexpr (quarters) {
      uint8_t found = 0;
      for (size_t i = 0; i < count * group; i++) found = uint8_t(found | uint8_t((codes[i] & 0x7f) == 0x7f));
      has_nan = found != 0;
    }
    for (size_t j = 0; j < count; j++) {
      const float scale = Out::round(decode_e8m0(scales[j]));
      if constexpr (quarters) {
        if (__builtin_expect(!has_nan && is_plain_e8m0<Out>(scales[j]), 1)) {
          e4m3_values<Out, group>(codes + j * group, scale, out + j * group);
          continue;
        }
      }
      for (int i = 0; i < group; i++) {
        const uint32_t c = codes[j * group + i];
        out[j * group + i] = Out::store((BITS == 4 ? decode_e2m1(c) : decode_e4m3(c)) * scale);
      }
    }
    in += count * group * BITS / 8;
    scales += count;
    out += count * group;
    groups -= count;
  }
}

// ---------------------------------------------------------------- nvfp4

// For each scale byte the largest magnitude that still falls below each halfway point:
// T(x / d) grows with x, so a division and a comparison become a comparison. Byte 0 is
// for d = 0, where every quotient is infinite or NaN and MLX's search gives code 0.
template <class T>
struct Nvfp4Thresholds {
  typename T::Key of[127][7];

  Nvfp4Thresholds() {
    using Key = typename T::Key;
    using Stored = typename T::Stored;
    for (int byte = 0; byte < 127; byte++) {
      const float d = decode_e4m3(uint32_t(byte));
      for (int k = 0; k < 7; k++) {
        Key below = 0, above = T::kInf;  // T(below / d) <= halfway; the answer is less than above
        while (byte != 0 && above - below > 1) {
          const Key middle = Key(below + (above - below) / 2);
          if (T::round(T::load(Stored(middle)) / d) <= kHalfways[k])
            below = middle;
          else
            above = middle;
        }
        of[byte][k] = byte == 0 ? T::kAbs : below;
      }
    }
  }
};

// Codes of a group by MLX's own steps; enc = 2688 / global scale, or 1.
template <class T>
void nvfp4_codes(const typename T::Stored* REQUANT_RESTRICT x, float top, float d, float enc,
                 uint8_t* REQUANT_RESTRICT c) {
  constexpr int group = 16;
  alignas(64) float scaled[group];
  const float most = float_of(bits_of(T::round(top / d) * enc) & kAbs32);
  for (int i = 0; i < group; i++) scaled[i] = T::round(T::load(x[i]) / d) * enc;
  prevent_fma(scaled);
  if (most < kRoundMagic)
    for (int i = 0; i < group; i++) c[i] = uint8_t(encode_e2m1(scaled[i]));
  else
    for (int i = 0; i < group; i++) c[i] = uint8_t(search_e2m1(scaled[i]));
}

template <class T>
void nvfp4_quantize(const void* w_, size_t groups, uint32_t* words, uint8_t* scales, const float* global_scale) {
  using Stored = typename T::Stored;
  static const Nvfp4Thresholds<T> thresholds;
  constexpr int group = 16;
  constexpr int per_block = int(kBlock) / group;
  const float enc = global_scale != nullptr ? kNvfp4Max / *global_scale : 1.0f;
  const auto* w = static_cast<const Stored*>(w_);
  auto* out = reinterpret_cast<uint8_t*>(words);

  alignas(64) uint8_t codes[kBlock];
  alignas(64) float top[per_block];
  while (groups > 0) {
    const int count = groups < size_t(per_block) ? int(groups) : per_block;
    for (int j = 0; j < count; j++) top[j] = T::load(Stored(largest_magnitude<T>(w + j * group, group)));
    for (int j = 0; j < count; j++) scales[j] = uint8_t(encode_e4m3(T::round(top[j] / kE2M1Max) * enc));
    for (int j = 0; j < count; j++) {
      const Stored* x = w + j * group;
      // Byte 0x7e may be saturated, where quotients grow without bound.
      if (global_scale == nullptr && scales[j] != 0x7e)
        count_thresholds<T, group>(x, thresholds.of[scales[j]], codes + j * group);
      else
        nvfp4_codes<T>(x, top[j], decode_e4m3(scales[j]), enc, codes + j * group);
    }
    pack_codes<4>(codes, size_t(count) * group, out);
    w += count * group;
    out += size_t(count) * group / 2;
    scales += count;
    groups -= count;
  }
}

// dec = global scale / 2688, or 1.
template <class Out>
void nvfp4_dequantize(const uint32_t* words, const uint8_t* scales, size_t groups, float dec, void* out_) {
  constexpr int group = 16;
  constexpr size_t per_block = kBlock / group;
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  auto* out = static_cast<typename Out::Stored*>(out_);
  if constexpr (kHasTables<Out>) {
    static const E2M1Tables<Out> tables([](uint8_t byte) { return decode_e4m3(byte); });
    if (dec == 1.0f) return e2m1_lookup<Out, group>(tables, words, scales, groups, out);
  }

  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const size_t count = groups < per_block ? groups : per_block;
    unpack_codes<4>(in, count * group, codes);
    for (size_t j = 0; j < count; j++) {
      const float scale = decode_e4m3(scales[j]) * dec;
      for (int i = 0; i < group; i++)
        out[j * group + i] = Out::store(decode_e2m1(codes[j * group + i]) * scale);
    }
    in += count * group / 2;
    scales += count;
    out += count * group;
    groups -= count;
  }
}

}  // namespace
