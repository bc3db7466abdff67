// Number formats as bits: float32, float16, bfloat16, float8_e4m3fn, and the
// loads and roundings between them.
//
// Every helper is branch-free integer or single-operation float code, so that
// loops over it vectorize, and every compiler gives the same bits. Where a
// product must be rounded before it is added to, prevent_fma() separates the two:
// no compiler, whatever its flags, may then fuse them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define REQUANT_INLINE inline __attribute__((always_inline))
#define REQUANT_NOINLINE __attribute__((noinline))
#define REQUANT_RESTRICT __restrict__

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed words are little-endian");

REQUANT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

REQUANT_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// What is in the buffer before this point is stored, rounded, and read back.
REQUANT_INLINE void prevent_fma(const void* buffer) { __asm__ volatile("" : : "r"(buffer) : "memory"); }

constexpr uint32_t kAbs32 = 0x7fffffffu;
constexpr uint32_t kInf32 = 0x7f800000u;
constexpr float kEpsilon32 = 0x1p-23f;  // from 1 to the next float
// From here on every float is an integer: added to a smaller magnitude and taken off again,
// it rounds to the nearest integer, ties to even; after the sum alone the integer is the low bits.
constexpr float kRoundMagic = 0x1p23f;

// ---------------------------------------------------------------- storage types

struct F32 {
  using Stored = uint32_t;
  using Key = int32_t;
  static constexpr Key kAbs = 0x7fffffff;
  static constexpr Key kInf = 0x7f800000;
  static constexpr Key kExponentStep = 0x00800000;  // twice the value
  static constexpr int kMinExponent = -126;         // of normal numbers
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr bool kUnsignedNan = false;

  static REQUANT_INLINE float load(Stored u) { return float_of(u); }
  static REQUANT_INLINE Stored store(float x) { return bits_of(x); }
  static constexpr bool kRounds = false;
  static REQUANT_INLINE float round(float x) { return x; }
  template <bool>
  static REQUANT_INLINE float round_known(float x) {
    return x;
  }
};

struct BF16 {
  using Stored = uint16_t;
  using Key = int16_t;
  static constexpr Key kAbs = 0x7fff;
  static constexpr Key kInf = 0x7f80;
  static constexpr Key kExponentStep = 0x0080;
  static constexpr int kMinExponent = -126;
  static constexpr int kMantissa = 7, kBias = 127;
  static constexpr float kLeastNormal = 0x1p-126f;
  static constexpr float kBelowInfinity = 0x1p127f;  // what is less rounds to less than infinity
  static constexpr bool kUnsignedNan = true;

  static REQUANT_INLINE float load(Stored u) { return float_of(uint32_t(u) << 16); }
  static REQUANT_INLINE uint32_t rounded_bits(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t even = u + 0x7fffu + ((u >> 16) & 1u);
    return (u & kAbs32) > kInf32 ? (u | 0x00400000u) : even;
  }
  static REQUANT_INLINE Stored store(float x) { return Stored(rounded_bits(x) >> 16); }
  static constexpr bool kRounds = true;
  static REQUANT_INLINE float round(float x) { return float_of(rounded_bits(x) & 0xffff0000u); }
  // NO_NAN: the caller knows that x is none.
  template <bool NO_NAN>
  static REQUANT_INLINE float round_known(float x) {
    if constexpr (!NO_NAN) return round(x);
    const uint32_t u = bits_of(x);
    return float_of((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
  }
};

struct F16 {
  using Stored = uint16_t;
  using Key = int16_t;
  static constexpr Key kAbs = 0x7fff;
  static constexpr Key kInf = 0x7c00;
  static constexpr Key kExponentStep = 0x0400;
  static constexpr int kMinExponent = -14;
  static constexpr int kMantissa = 10, kBias = 15;
  static constexpr float kLeastNormal = 0x1p-14f;
  static constexpr float kBelowInfinity = 65504.0f;
  static constexpr bool kUnsignedNan = false;

  static REQUANT_INLINE float load(Stored h) {
    const uint32_t a = uint32_t(h & 0x7fffu) << 13;
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    // 2^-14 * (1 + m / 1024) - 2^-14 is m * 2^-24, exactly.
    const uint32_t tiny = bits_of(float_of(a + 0x38800000u) - float_of(0x38800000u));
    uint32_t u = a + 0x38000000u;
    u = a >= 0x0f800000u ? (a | kInf32) : u;
    u = a < 0x00800000u ? tiny : u;
    return float_of(u | sign);
  }
  static REQUANT_INLINE Stored store(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t a = u & kAbs32;
    // Adding 0.5 puts the step of float16's subnormals, 2^-24, in the last bit.
    const uint32_t tiny = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
    uint32_t h = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    h = a < 0x38800000u ? tiny : h;
    h = a >= 0x477ff000u ? 0x7c00u : h;
    h = a > kInf32 ? 0x7e00u : h;
    return Stored(h | ((u >> 16) & 0x8000u));
  }
  static constexpr bool kRounds = true;
  static REQUANT_INLINE float round(float x) { return load(store(x)); }
  template <bool>
  static REQUANT_INLINE float round_known(float x) {
    return round(x);
  }
};

// ---------------------------------------------------------------- float8_e4m3fn

// Nearest even, saturating: 448 and above, infinities and NaN give 0x7e.
REQUANT_INLINE uint32_t encode_e4m3(float x) {
  const uint32_t u = bits_of(x);
  uint32_t a = u & kAbs32;
  a = a < 0x43e00000u ? a : 0x43e00000u;
  // Adding 2^14 puts the step of the subnormals, 2^-9, in the last bit.
  const uint32_t tiny = bits_of(float_of(a) + 16384.0f) - 0x46800000u;
  const uint32_t wide = (a + 0x7ffffu + ((a >> 20) & 1u) - 0x3c000000u) >> 20;
  return (a < 0x3c800000u ? tiny : wide) | ((u >> 24) & 0x80u);
}

REQUANT_INLINE float decode_e4m3(uint32_t code) {
  const uint32_t a = (code & 0x7fu) << 20;
  const uint32_t sign = (code & 0x80u) << 24;
  const uint32_t tiny = bits_of(float_of(a + 0x3c800000u) - float_of(0x3c800000u));
  uint32_t u = a + 0x3c000000u;
  u = a < 0x00800000u ? tiny : u;
  u = a == 0x07f00000u ? 0x7fc00000u : u;
  return float_of(u | sign);
}

// Nearest even. Beyond 2^23 every float is an integer already.
REQUANT_INLINE float round_even(float x) {
  const uint32_t u = bits_of(x);
  const float a = float_of(u & kAbs32);
  const float r = (a + kRoundMagic) - kRoundMagic;
  return float_of((a < kRoundMagic ? bits_of(r) : (u & kAbs32)) | (u & ~kAbs32));
}

}  // namespace
