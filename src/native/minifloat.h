// MLX float modes: mxfp4 and mxfp8 (E8M0 scales, groups of 32) and nvfp4 (E4M3
// scales, groups of 16, an optional scale of the whole tensor).

#pragma once

#include "affine.h"
#include "floats.h"
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
  uint32_t u = bits_of(s);
  int shift = 0;
  if (u < 0x00800000u) {
    u = bits_of(s * 0x1p23f);
    shift = 23;
  }
  return int((u + 0x7fffffu) >> 23) - 127 - shift;
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
  typename T::Key halfways[7];
  for (int k = 0; k < 7; k++) halfways[k] = typename T::Key(T::store(kHalfways[k]));

  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const int count = int(groups < per_block ? groups : per_block);
    for (int j = 0; j < count; j++) {
      const Stored* x = w + j * group;
      uint8_t* c = codes + j * group;
      const auto top = largest_magnitude<T>(x, group);
      if (top >= T::kInf) {
        scales[j] = sizeof(Stored) == 4 ? 128 : 0;
        mx_codes_nonfinite<T, BITS>(x, c);
        continue;
      }
      const float s = T::round(T::load(Stored(top)) / largest);
      const int e = s == 0.0f ? 0 : ceil_log2(s);
      if (e < -127) {
        // MLX's byte would wrap around and blow the group up.
        scales[j] = 127;
        std::memset(c, 0, group);
        flushed++;
        continue;
      }
      scales[j] = uint8_t(e + 127);
      if constexpr (BITS == 4) {
        if (e - 2 >= T::kMinExponent) {  // scaled by a power of two, the thresholds are exact
          typename T::Key thresholds[7];
          for (int k = 0; k < 7; k++)
            thresholds[k] = typename T::Key(halfways[k] + typename T::Key(e) * T::kExponentStep);
          count_thresholds<T, group>(x, thresholds, c);
          continue;
        }
      } else if (e - 10 >= T::kMinExponent) {
        e4m3_of_scaled<T, group>(x, e, e4m3, c);
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

template <class Out, int BITS>
void mx_dequantize(const uint32_t* words, const uint8_t* scales, size_t groups, void* out_) {
  constexpr int group = 32;
  constexpr size_t per_block = kBlock / group;
  const auto* in = reinterpret_cast<const uint8_t*>(words);
  auto* out = static_cast<typename Out::Stored*>(out_);

  alignas(64) uint8_t codes[kBlock];
  while (groups > 0) {
    const size_t count = groups < per_block ? groups : per_block;
    unpack_codes<BITS>(in, count * group, codes);
    for (size_t j = 0; j < count; j++) {
      const float scale = Out::round(decode_e8m0(scales[j]));
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
