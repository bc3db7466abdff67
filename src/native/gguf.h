// Blocks of GGUF files: codes moved into MLX's words, or values computed.
//
// A block type gives its codes one a byte, and a scale for each run of kRun of them. A value is
// scale * v, scale * v + offset or scale * (v + offset), in float32, where v = code * kMul - kSub.
// Where a run fills one of MLX's groups the type also has kBits, the width of a code in MLX.

#pragma once

#include "floats.h"
#include "gguf_grids.h"
#include "pack.h"

namespace {

enum class Offset { None, Added, Inner };

REQUANT_INLINE float half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, sizeof h);
  return F16::load(h);
}

REQUANT_INLINE uint32_t word16_at(const uint8_t* p) {
  uint16_t u;
  std::memcpy(&u, p, sizeof u);
  return u;
}

REQUANT_INLINE uint32_t word32_at(const uint8_t* p) {
  uint32_t u;
  std::memcpy(&u, p, sizeof u);
  return u;
}

// N bytes: low nibbles are the first N codes, high nibbles the next N.
template <int N>
REQUANT_INLINE void halves(const uint8_t* REQUANT_RESTRICT q, uint8_t* REQUANT_RESTRICT c) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0full;
  if constexpr (N <= 16) {  // too short for the plain loop to vectorise
    for (int j = 0; j < N; j += 8) {
      uint64_t eight;
      std::memcpy(&eight, q + j, 8);
      const uint64_t low = eight & kLow, high = eight >> 4 & kLow;
      std::memcpy(c + j, &low, 8);
      std::memcpy(c + j + N, &high, 8);
    }
    return;
  }
  for (int j = 0; j < N; j++) c[j] = uint8_t(q[j] & 15u);
  for (int j = 0; j < N; j++) c[j + N] = uint8_t(q[j] >> 4);
}

// Adds bit e of 32 bits to code e, as its bit 4.
REQUANT_INLINE void fifth_bits(const uint8_t* q, uint8_t* c) {
  for (int k = 0; k < 4; k++) {
    uint64_t eight;
    std::memcpy(&eight, c + 8 * k, 8);
    eight |= spread<1>(q[k]) << 4;
    std::memcpy(c + 8 * k, &eight, 8);
  }
}

// Members that most types share; a type hides those that differ.
template <int ELEMENTS, int BYTES, int RUN>
struct Blocks {
  static constexpr int kElements = ELEMENTS, kBytes = BYTES, kRun = RUN;
  static constexpr int kMul = 1, kSub = 0;
  static constexpr int kBits = 0, kGroup = 32;  // kBits 0: no affine mode of MLX holds it
  static constexpr Offset kOffset = Offset::None;
};

// ---------------------------------------------------------------- blocks of 32

// Begins with its scale, and with HALVES 2 an offset: float16, so that many are widened at once.
template <int BYTES, int HALVES>
struct HalfBlocks : Blocks<32, BYTES, 32> {
  static constexpr int kHalves = HALVES;
  static constexpr Offset kOffset = HALVES == 2 ? Offset::Added : Offset::None;
};

struct Q4_0 : HalfBlocks<18, 1> {
  static constexpr int kBits = 4, kSub = 8;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    halves<16>(b + 2, c);
  }
};

struct Q4_1 : HalfBlocks<20, 2> {
  static constexpr int kBits = 4;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    halves<16>(b + 4, c);
  }
};

struct Q5_0 : HalfBlocks<22, 1> {
  static constexpr int kBits = 5, kSub = 16;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    halves<16>(b + 6, c);
    fifth_bits(b + 2, c);
  }
};

struct Q5_1 : HalfBlocks<24, 2> {
  static constexpr int kBits = 5;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    halves<16>(b + 8, c);
    fifth_bits(b + 4, c);
  }
};

struct Q8_0 : HalfBlocks<34, 1> {
  static constexpr int kBits = 8, kSub = 128;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    for (int i = 0; i < 32; i++) c[i] = uint8_t(b[2 + i] ^ 0x80u);
  }
};

// What the nibbles of IQ4 represent, plus 128.
constexpr uint8_t kIq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

REQUANT_INLINE void iq4_codes(const uint8_t* q, uint8_t* c) {
  for (int j = 0; j < 16; j++) c[j] = kIq4[q[j] & 15u], c[j + 16] = kIq4[q[j] >> 4];
}

struct Iq4Nl : HalfBlocks<18, 1> {
  static constexpr int kBits = 8, kSub = 128;
  static REQUANT_INLINE void codes(const uint8_t* b, uint8_t* c) {
    iq4_codes(b + 2, c);
  }
};

// Twice the values of E2M1, plus 12.
constexpr uint8_t kTwiceE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// MLX has a mode of these numbers: nibbles gives E2M1 as it is stored.
struct Mxfp4 : Blocks<32, 17, 32> {
  static constexpr int kSub = 12, kScaleBytes = 1;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const uint32_t e = b[0];  // half of 2^(e - 127)
    s[0] = float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    halves<16>(b + 1, c);
    for (int i = 0; i < 32; i++) c[i] = kTwiceE2m1[c[i]];
  }
  static REQUANT_INLINE void nibbles(const uint8_t* b, uint8_t* c) { halves<16>(b + 1, c); }
};

struct Nvfp4 : Blocks<64, 36, 16> {
  static constexpr int kSub = 12, kScaleBytes = 4;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    for (int g = 0; g < 4; g++) {
      const float scale = b[g] == 0xffu ? 480.0f : decode_e4m3(b[g] & 0x7fu);
      s[g] = b[g] == 0x7fu ? 0.0f : scale * 0.5f;
    }
    nibbles(b, c);
    for (int i = 0; i < 64; i++) c[i] = kTwiceE2m1[c[i]];
  }
  static REQUANT_INLINE void nibbles(const uint8_t* b, uint8_t* c) {
    for (int g = 0; g < 4; g++) halves<8>(b + 4 + 8 * g, c + 16 * g);
  }
};

// ---------------------------------------------------------------- ternary and binary

struct Q1_0 : Blocks<128, 18, 128> {
  static constexpr int kBits = 2, kGroup = 128, kMul = 2, kSub = 1;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    s[0] = half_at(b);
    for (int k = 0; k < 16; k++)
      for (int e = 0; e < 8; e++) c[8 * k + e] = uint8_t(b[2 + k] >> e & 1u);
  }
};

// Five digits of base 3 a byte, as a fraction of 256: the first is the highest.
template <int N>
REQUANT_INLINE void trits(const uint8_t* q, int digits, uint8_t* c) {
  for (int n = 0; n < digits; n++) {
    constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    for (int e = 0; e < N; e++) c[n * N + e] = uint8_t(uint32_t(uint8_t(q[e] * kPowers[n])) * 3u >> 8);
  }
}

struct Tq1_0 : Blocks<256, 54, 256> {
  static constexpr int kBits = 2, kGroup = 128, kSub = 1;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    s[0] = half_at(b + 52);
    trits<32>(b, 5, c);
    trits<16>(b + 32, 5, c + 160);
    trits<4>(b + 48, 4, c + 240);
  }
};

// N bytes of 2-bit fields: field l of byte e is code N * l + e.
template <int N>
REQUANT_INLINE void quarters(const uint8_t* REQUANT_RESTRICT q, uint8_t* REQUANT_RESTRICT c) {
  for (int l = 0; l < 4; l++)
    for (int e = 0; e < N; e++) c[l * N + e] = uint8_t(q[e] >> (2 * l) & 3u);
}

struct Tq2_0 : Blocks<256, 66, 256> {
  static constexpr int kBits = 2, kGroup = 128, kSub = 1;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    s[0] = half_at(b + 64);
    quarters<32>(b, c), quarters<32>(b + 32, c + 128);
  }
};

// ---------------------------------------------------------------- K types, blocks of 256

struct Q2K : Blocks<256, 84, 16> {
  static constexpr Offset kOffset = Offset::Added;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float* o) {
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int j = 0; j < 16; j++) s[j] = d * float(b[j] & 15u), o[j] = -(dmin * float(b[j] >> 4));
    quarters<32>(b + 16, c), quarters<32>(b + 48, c + 128);
  }
};

struct Q3K : Blocks<256, 110, 16> {
  static constexpr int kSub = 4;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const uint8_t* q = b + 96;  // scales of 6 bits: 16 times 4 low ones, then 16 times 2 high ones
    const float d = half_at(b + 108);
    for (int j = 0; j < 16; j++) {
      const uint32_t low = q[j % 8] >> (j / 8 * 4) & 15u, high = q[8 + j % 4] >> (j / 4 * 2) & 3u;
      s[j] = d * float(int(low | high << 4) - 32);
    }
    quarters<32>(b + 32, c), quarters<32>(b + 64, c + 128);
    for (int j = 0; j < 8; j++)
      for (int e = 0; e < 32; e++) c[32 * j + e] |= uint8_t((b[e] >> j & 1u) << 2);
  }
};

// Eight scales and eight minima of 6 bits in 12 bytes.
REQUANT_INLINE void k_scales(const uint8_t* b, float* s, float* o) {
  const float d = half_at(b), dmin = half_at(b + 2);
  const uint8_t* q = b + 4;
  for (int j = 0; j < 4; j++) {
    s[j] = d * float(q[j] & 63u);
    o[j] = -(dmin * float(q[j + 4] & 63u));
    s[j + 4] = d * float((q[j + 8] & 15u) | (q[j] >> 6) << 4);
    o[j + 4] = -(dmin * float((q[j + 8] >> 4) | (q[j + 4] >> 6) << 4));
  }
}

struct Q4K : Blocks<256, 144, 32> {
  static constexpr int kBits = 4;
  static constexpr Offset kOffset = Offset::Added;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float* o) {
    k_scales(b, s, o);
    for (int i = 0; i < 4; i++) halves<32>(b + 16 + 32 * i, c + 64 * i);
  }
};

struct Q5K : Blocks<256, 176, 32> {
  static constexpr int kBits = 5;
  static constexpr Offset kOffset = Offset::Added;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float* o) {
    k_scales(b, s, o);
    for (int i = 0; i < 4; i++) halves<32>(b + 48 + 32 * i, c + 64 * i);
    for (int j = 0; j < 8; j++)
      for (int e = 0; e < 32; e++) c[32 * j + e] |= uint8_t((b[16 + e] >> j & 1u) << 4);
  }
};

struct Q6K : Blocks<256, 210, 16> {
  static constexpr int kSub = 32;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const float d = half_at(b + 208);
    for (int j = 0; j < 16; j++) s[j] = d * float(int8_t(b[192 + j]));
    for (int h = 0; h < 2; h++) {
      const uint8_t *low = b + 64 * h, *high = b + 128 + 32 * h;
      uint8_t* REQUANT_RESTRICT out = c + 128 * h;
      halves<64>(low, out);
      for (int l = 0; l < 4; l++)
        for (int e = 0; e < 32; e++) out[32 * l + e] |= uint8_t((high[e] >> (2 * l) & 3u) << 4);
    }
  }
};

// ---------------------------------------------------------------- IQ types, blocks of 256

struct Iq4Xs : Blocks<256, 136, 32> {
  static constexpr int kBits = 8, kSub = 128;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const float d = half_at(b);
    const uint32_t high = word16_at(b + 2);
    for (int i = 0; i < 8; i++) {
      const uint32_t scale = (b[4 + i / 2] >> (4 * (i % 2)) & 15u) | (high >> (2 * i) & 3u) << 4;
      s[i] = d * float(int(scale) - 32);
      iq4_codes(b + 8 + 16 * i, c + 32 * i);
    }
  }
};

// Seven signs and an eighth that makes their number even.
REQUANT_INLINE uint32_t even_signs(uint32_t seven) {
  uint32_t parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1u) << 7;
}

// v and -v around ZERO, for each of N digits of BITS bits; VALUES are halved by kMul's types.
template <int N, int BITS, int ZERO>
REQUANT_INLINE void grid_codes(uint32_t entry, uint32_t signs, const uint8_t* values, uint8_t* c) {
  for (int i = 0; i < N; i++) {
    const int v = values[entry >> (BITS * i) & ((1u << BITS) - 1u)];
    c[i] = uint8_t(signs >> i & 1u ? ZERO - v : ZERO + v);
  }
}

constexpr uint8_t kIq2Values[4] = {8, 25, 43, 0};
constexpr uint8_t kIq3XxsHalves[8] = {2, 6, 10, 14, 18, 22, 26, 31};

struct Iq2Xxs : Blocks<256, 66, 32> {
  static constexpr int kBits = 8, kSub = 128;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const float d = half_at(b);
    for (int i = 0; i < 8; i++) {
      const uint8_t* q = b + 2 + 8 * i;
      const uint32_t rest = word32_at(q + 4);
      s[i] = d * (0.5f + float(rest >> 28)) * 0.25f;
      for (int j = 0; j < 4; j++)
        grid_codes<8, 2, 128>(kIq2Xxs[q[j]], even_signs(rest >> (7 * j) & 127u), kIq2Values, c + 32 * i + 8 * j);
    }
  }
};

REQUANT_INLINE void nibble_scales(float d, const uint8_t* q, float* s) {
  for (int j = 0; j < 16; j++) s[j] = d * (0.5f + float(q[j / 2] >> (j % 2 * 4) & 15u)) * 0.25f;
}

struct Iq2Xs : Blocks<256, 74, 16> {
  static constexpr int kSub = 128;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    nibble_scales(half_at(b), b + 66, s);
    for (int j = 0; j < 32; j++) {
      const uint32_t q = word16_at(b + 2 + 2 * j);
      grid_codes<8, 2, 128>(kIq2Xs[q & 511u], even_signs(q >> 9), kIq2Values, c + 8 * j);
    }
  }
};

struct Iq2S : Blocks<256, 82, 16> {
  static constexpr int kSub = 128;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    nibble_scales(half_at(b), b + 74, s);
    for (int j = 0; j < 32; j++) {
      const uint32_t high = b[66 + j / 4] >> (j % 4 * 2) & 3u;
      grid_codes<8, 2, 128>(kIq2S[b[2 + j] | high << 8], b[34 + j], kIq2Values, c + 8 * j);
    }
  }
};

struct Iq3Xxs : Blocks<256, 98, 32> {
  static constexpr int kBits = 6, kMul = 2, kSub = 62;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const float d = half_at(b);
    for (int i = 0; i < 8; i++) {
      const uint32_t rest = word32_at(b + 66 + 4 * i);
      s[i] = d * (0.5f + float(rest >> 28)) * 0.5f;
      for (int j = 0; j < 8; j++) {
        const uint32_t signs = even_signs(rest >> (j / 2 * 7) & 127u) >> (j % 2 * 4);
        grid_codes<4, 3, 31>(kIq3Xxs[b[2 + 8 * i + j]], signs, kIq3XxsHalves, c + 32 * i + 4 * j);
      }
    }
  }
};

// v is odd, -15 to 15.
struct Iq3S : Blocks<256, 110, 32> {
  static constexpr int kBits = 4, kMul = 2, kSub = 15;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float*) {
    const float d = half_at(b);
    for (int i = 0; i < 8; i++) s[i] = d * float(1u + 2u * (b[106 + i / 2] >> (i % 2 * 4) & 15u));
    for (int j = 0; j < 64; j++) {
      const uint32_t entry = kIq3S[b[2 + j] | (b[66 + j / 8] >> (j % 8) & 1u) << 8];
      const uint32_t signs = b[74 + j / 2] >> (j % 2 * 4);
      for (int e = 0; e < 4; e++) {
        const uint32_t digit = entry >> (3 * e) & 7u;  // v = 2 * digit + 1
        c[4 * j + e] = uint8_t(signs >> e & 1u ? 7u - digit : 8u + digit);
      }
    }
  }
};

constexpr float kDelta = 0.125f;

REQUANT_INLINE void ternary_codes(uint32_t entry, uint8_t* c) {
  for (int i = 0; i < 8; i++) c[i] = uint8_t(entry >> (2 * i) & 3u);
}

struct Iq1S : Blocks<256, 50, 32> {
  static constexpr int kBits = 2, kSub = 1;
  static constexpr Offset kOffset = Offset::Inner;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float* o) {
    const float d = half_at(b);
    for (int i = 0; i < 8; i++) {
      const uint32_t high = word16_at(b + 34 + 2 * i);
      s[i] = d * float(2u * (high >> 12 & 7u) + 1u);
      o[i] = high & 0x8000u ? -kDelta : kDelta;
      for (int j = 0; j < 4; j++)
        ternary_codes(kIq1[b[2 + 4 * i + j] | (high >> (3 * j) & 7u) << 8], c + 32 * i + 8 * j);
    }
  }
};

// A scale for 16 values, an offset for 8: the scale is repeated.
struct Iq1M : Blocks<256, 56, 8> {
  static constexpr int kSub = 1;
  static constexpr Offset kOffset = Offset::Inner;
  static REQUANT_INLINE void decode(const uint8_t* b, uint8_t* c, float* s, float* o) {
    uint32_t half = 0;
    for (int k = 0; k < 4; k++) half |= (word16_at(b + 48 + 2 * k) >> 12) << (4 * k);
    const float d = F16::load(uint16_t(half));
    for (int j = 0; j < 32; j++) {
      const uint32_t high = b[32 + j / 2] >> (j % 2 * 4);
      const uint32_t scale = word16_at(b + 48 + j / 8 * 2) >> (j / 2 % 4 * 3) & 7u;
      s[j] = d * float(2u * scale + 1u);
      o[j] = high & 8u ? -kDelta : kDelta;
      ternary_codes(kIq1[b[j] | (high & 7u) << 8], c + 8 * j);
    }
  }
};

// ---------------------------------------------------------------- rows of blocks

// Blocks that are worked on at a time.
template <class T>
constexpr size_t kBundle = T::kElements < 1024 ? 1024 / T::kElements : 1;
template <class T>
constexpr size_t kRuns = T::kElements / T::kRun;

template <class T, class = void>
struct HasHalves {
  static constexpr bool kYes = false;
};
template <class T>
struct HasHalves<T, decltype(void(T::kHalves))> {
  static constexpr bool kYes = true;
};

// Codes, scales and offsets of up to kBundle blocks.
template <class T>
REQUANT_INLINE void decode_bundle(const uint8_t* blocks, size_t count, uint8_t* codes, float* s, float* o) {
  if constexpr (HasHalves<T>::kYes) {
    uint16_t d[kBundle<T>] = {}, m[kBundle<T>] = {};
    for (size_t k = 0; k < count; k++) {
      const uint8_t* b = blocks + k * T::kBytes;
      std::memcpy(&d[k], b, 2);
      if (T::kHalves == 2) std::memcpy(&m[k], b + 2, 2);
      T::codes(b, codes + k * T::kElements);
    }
    for (size_t k = 0; k < kBundle<T>; k++) s[k] = F16::load(d[k]);
    if (T::kHalves == 2)
      for (size_t k = 0; k < kBundle<T>; k++) o[k] = F16::load(m[k]);
  } else {
    for (size_t k = 0; k < count; k++)
      T::decode(blocks + k * T::kBytes, codes + k * T::kElements, s + k * kRuns<T>, o + k * kRuns<T>);
  }
}

// Scales and biases of MLX's groups. The bias fits the scale that is stored.
template <class T, class S>
REQUANT_INLINE void affine_scales(const float* s, const float* o, size_t groups, typename S::Stored* REQUANT_RESTRICT
                                  scales, typename S::Stored* REQUANT_RESTRICT biases) {
  constexpr float kZero = float(T::kSub) / float(T::kMul);
  constexpr size_t kRepeat = T::kRun / T::kGroup;  // groups with one scale
  for (size_t g = 0; g < groups; g++) scales[g] = S::store(s[g / kRepeat] * float(T::kMul));
  if (T::kOffset == Offset::Added) {
    for (size_t g = 0; g < groups; g++) biases[g] = S::store(o[g / kRepeat]);
    return;
  }
  for (size_t g = 0; g < groups; g++) {
    const float zero = T::kOffset == Offset::Inner ? kZero - o[g / kRepeat] : kZero;
    biases[g] = S::store(-(S::load(scales[g]) * zero));
  }
}

// Words, scales and offsets of up to kBundle blocks: one copy, whatever the dtype of the scales.
template <class T>
REQUANT_NOINLINE void decode_words(const uint8_t* blocks, size_t count, uint8_t* words, float* s, float* o) {
  alignas(64) uint8_t codes[kBundle<T> * T::kElements];
  decode_bundle<T>(blocks, count, codes, s, o);
  pack_codes<T::kBits>(codes, count * T::kElements, words);
}

template <class T, class S>
void gguf_affine(const uint8_t* blocks, size_t count, uint32_t* words_, void* scales_, void* biases_) {
  auto* words = reinterpret_cast<uint8_t*>(words_);
  auto* scales = static_cast<typename S::Stored*>(scales_);
  auto* biases = static_cast<typename S::Stored*>(biases_);
  alignas(64) float s[kBundle<T> * kRuns<T>], o[kBundle<T> * kRuns<T>];
  while (count > 0) {
    const size_t bundle = count < kBundle<T> ? count : kBundle<T>;
    const size_t groups = bundle * T::kElements / T::kGroup;
    decode_words<T>(blocks, bundle, words, s, o);
    affine_scales<T, S>(s, o, groups, scales, biases);
    scales += groups;
    biases += groups;
    words += bundle * T::kElements * T::kBits / 8;
    blocks += bundle * T::kBytes;
    count -= bundle;
  }
}

template <class T>
void gguf_fp4(const uint8_t* blocks, size_t count, uint32_t* words_, uint8_t* scales) {
  auto* words = reinterpret_cast<uint8_t*>(words_);
  alignas(64) uint8_t codes[kBundle<T> * T::kElements];
  while (count > 0) {
    const size_t bundle = count < kBundle<T> ? count : kBundle<T>;
    for (size_t k = 0; k < bundle; k++) {
      T::nibbles(blocks + k * T::kBytes, codes + k * T::kElements);
      std::memcpy(scales, blocks + k * T::kBytes, T::kScaleBytes);
      scales += T::kScaleBytes;
    }
    pack_codes<4>(codes, bundle * T::kElements, words);
    words += bundle * T::kElements / 2;
    blocks += bundle * T::kBytes;
    count -= bundle;
  }
}

// Values of up to kBundle blocks: one copy, whatever the dtype that they are stored in.
template <class T>
REQUANT_NOINLINE void decode_values(const uint8_t* blocks, size_t count, float* REQUANT_RESTRICT values) {
  alignas(64) uint8_t codes[kBundle<T> * T::kElements];
  alignas(64) float s[kBundle<T> * kRuns<T>], o[kBundle<T> * kRuns<T>];
  decode_bundle<T>(blocks, count, codes, s, o);
  for (size_t run = 0; run < count * kRuns<T>; run++) {
    const uint8_t* c = codes + run * T::kRun;
    float* v = values + run * T::kRun;
    for (int i = 0; i < T::kRun; i++) {
      const float code = float(int(c[i]) * T::kMul - T::kSub);
      v[i] = s[run] * (T::kOffset == Offset::Inner ? code + o[run] : code);
    }
  }
  prevent_fma(values);
  if (T::kOffset == Offset::Added)
    for (size_t run = 0; run < count * kRuns<T>; run++)
      for (int i = 0; i < T::kRun; i++) values[run * T::kRun + i] += o[run];
}

template <class T, class Out>
void gguf_values(const uint8_t* blocks, size_t count, void* out_) {
  auto* REQUANT_RESTRICT out = static_cast<typename Out::Stored*>(out_);
  alignas(64) float values[kBundle<T> * T::kElements];
  while (count > 0) {
    const size_t bundle = count < kBundle<T> ? count : kBundle<T>;
    decode_values<T>(blocks, bundle, values);
    for (size_t i = 0; i < bundle * T::kElements; i++) out[i] = Out::store(values[i]);
    out += bundle * T::kElements;
    blocks += bundle * T::kBytes;
    count -= bundle;
  }
}

// Numbers of block types in a file, by llama.cpp's names (GGML_TYPE_...).
enum class GgmlType : int {
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  IQ1_M = 29,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,
  NVFP4 = 40,
  Q1_0 = 41,
};

// Calls with the type of a block, by its number in the file; false for a number without one.
template <class T>
struct BlockTag {
  using Type = T;
};

template <class Call>
bool with_block(int type, Call call) {
  switch (GgmlType(type)) {
    case GgmlType::Q4_0: return call(BlockTag<Q4_0>()), true;
    case GgmlType::Q4_1: return call(BlockTag<Q4_1>()), true;
    case GgmlType::Q5_0: return call(BlockTag<Q5_0>()), true;
    case GgmlType::Q5_1: return call(BlockTag<Q5_1>()), true;
    case GgmlType::Q8_0: return call(BlockTag<Q8_0>()), true;
    case GgmlType::Q2_K: return call(BlockTag<Q2K>()), true;
    case GgmlType::Q3_K: return call(BlockTag<Q3K>()), true;
    case GgmlType::Q4_K: return call(BlockTag<Q4K>()), true;
    case GgmlType::Q5_K: return call(BlockTag<Q5K>()), true;
    case GgmlType::Q6_K: return call(BlockTag<Q6K>()), true;
    case GgmlType::IQ2_XXS: return call(BlockTag<Iq2Xxs>()), true;
    case GgmlType::IQ2_XS: return call(BlockTag<Iq2Xs>()), true;
    case GgmlType::IQ3_XXS: return call(BlockTag<Iq3Xxs>()), true;
    case GgmlType::IQ1_S: return call(BlockTag<Iq1S>()), true;
    case GgmlType::IQ4_NL: return call(BlockTag<Iq4Nl>()), true;
    case GgmlType::IQ3_S: return call(BlockTag<Iq3S>()), true;
    case GgmlType::IQ2_S: return call(BlockTag<Iq2S>()), true;
    case GgmlType::IQ4_XS: return call(BlockTag<Iq4Xs>()), true;
    case GgmlType::IQ1_M: return call(BlockTag<Iq1M>()), true;
    case GgmlType::TQ1_0: return call(BlockTag<Tq1_0>()), true;
    case GgmlType::TQ2_0: return call(BlockTag<Tq2_0>()), true;
    case GgmlType::MXFP4: return call(BlockTag<Mxfp4>()), true;
    case GgmlType::NVFP4: return call(BlockTag<Nvfp4>()), true;
    case GgmlType::Q1_0: return call(BlockTag<Q1_0>()), true;
    default: return false;
  }
}

}  // namespace
