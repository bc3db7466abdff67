// Codes of 1 to 8 bits, one a byte, to and from packed words.
//
// A row is one little-endian bit stream: code k takes the bits from k * BITS on.
// Eight codes fill BITS bytes, so a run of 32 codes fills BITS whole words; both
// directions work on eight codes at a time inside a 64-bit integer.

#pragma once

#include "floats.h"

namespace {

constexpr size_t kEights = 64;  // runs of eight codes worked on at a time

template <int BITS>
REQUANT_INLINE uint64_t squeeze(uint64_t x) {
  if constexpr (BITS == 8) return x;
  constexpr uint64_t m8 = 0x0101010101010101ull * ((1u << BITS) - 1u);
  constexpr uint64_t m16 = 0x0001000100010001ull * ((1ull << BITS) - 1u);
  constexpr uint64_t m32 = 0x0000000100000001ull * ((1ull << (2 * BITS)) - 1u);
  constexpr uint64_t m64 = (1ull << (4 * BITS)) - 1u;
  x &= m8;
  x = (x & m16) | ((x >> (8 - BITS)) & (m16 << BITS));
  x = (x & m32) | ((x >> (16 - 2 * BITS)) & (m32 << (2 * BITS)));
  x = (x & m64) | ((x >> (32 - 4 * BITS)) & (m64 << (4 * BITS)));
  return x;
}

template <int BITS>
REQUANT_INLINE uint64_t spread(uint64_t x) {
  if constexpr (BITS == 8) return x;
  constexpr uint64_t m16 = 0x0001000100010001ull * ((1ull << BITS) - 1u);
  constexpr uint64_t m32 = 0x0000000100000001ull * ((1ull << (2 * BITS)) - 1u);
  constexpr uint64_t m64 = (1ull << (4 * BITS)) - 1u;
  x = (x & m64) | ((x & (m64 << (4 * BITS))) << (32 - 4 * BITS));
  x = (x & m32) | ((x & (m32 << (2 * BITS))) << (16 - 2 * BITS));
  x = (x & m16) | ((x & (m16 << BITS)) << (8 - BITS));
  return x;
}

// Eight packed codes, the low 8 * BITS bits of an integer, to and from BITS bytes.
template <int BITS>
REQUANT_INLINE void store_eights(const uint64_t* REQUANT_RESTRICT x, size_t eights, uint8_t* REQUANT_RESTRICT out) {
  if constexpr (BITS == 1) {
    for (size_t j = 0; j < eights; j++) out[j] = uint8_t(x[j]);
  } else if constexpr (BITS == 2 || BITS == 4) {
    for (size_t j = 0; j < eights; j++) {
      if constexpr (BITS == 2) {
        const auto word = uint16_t(x[j]);
        std::memcpy(out + j * BITS, &word, BITS);
      } else {
        const auto word = uint32_t(x[j]);
        std::memcpy(out + j * BITS, &word, BITS);
      }
    }
  } else {
    // Whole words that the next one overlaps, but for the last, which would overrun.
    size_t j = 0;
    for (; (j + 1) * BITS + 8 <= eights * BITS; j++) std::memcpy(out + j * BITS, &x[j], 8);
    for (; j < eights; j++) std::memcpy(out + j * BITS, &x[j], BITS);
  }
}

template <int BITS>
REQUANT_INLINE void load_eights(const uint8_t* REQUANT_RESTRICT in, size_t eights, uint64_t* REQUANT_RESTRICT x) {
  if constexpr (BITS == 1) {
    for (size_t j = 0; j < eights; j++) x[j] = in[j];
  } else if constexpr (BITS == 2 || BITS == 4) {
    for (size_t j = 0; j < eights; j++) {
      x[j] = 0;
      std::memcpy(&x[j], in + j * BITS, BITS);
    }
  } else {
    size_t j = 0;
    for (; j * BITS + 8 <= eights * BITS; j++) std::memcpy(&x[j], in + j * BITS, 8);
    for (; j < eights; j++) {
      x[j] = 0;
      std::memcpy(&x[j], in + j * BITS, BITS);
    }
  }
}

// count is a multiple of 32; reads count bytes, writes count * BITS / 8 bytes.
template <int BITS>
void pack_codes(const uint8_t* REQUANT_RESTRICT codes, size_t count, uint8_t* REQUANT_RESTRICT out) {
  if constexpr (BITS == 8) {
    std::memcpy(out, codes, count);
    return;
  }
  if constexpr (BITS == 4) {  // pairs in 16 bits: the plain loop vectorises
    for (size_t i = 0; i < count / 2; i++) {
      uint16_t pair;  // copied: rows of odd length put codes at odd addresses
      std::memcpy(&pair, codes + 2 * i, 2);
      out[i] = uint8_t((pair & 15u) | ((pair >> 4) & 0xf0u));
    }
    return;
  }
  for (size_t i = 0; i < count; i += 8 * kEights) {
    const size_t eights = count - i < 8 * kEights ? (count - i) / 8 : kEights;
    alignas(64) uint64_t x[kEights];
    std::memcpy(x, codes + i, 8 * eights);
    for (size_t j = 0; j < eights; j++) x[j] = squeeze<BITS>(x[j]);
    store_eights<BITS>(x, eights, out);
    out += eights * BITS;
  }
}

template <int BITS>
void unpack_codes(const uint8_t* REQUANT_RESTRICT in, size_t count, uint8_t* REQUANT_RESTRICT codes) {
  if constexpr (BITS == 8) {
    std::memcpy(codes, in, count);
    return;
  }
  if constexpr (BITS == 4) {
    for (size_t i = 0; i < count / 2; i++) {
      const auto pair = uint16_t((in[i] & 15u) | ((in[i] & 0xf0u) << 4));
      std::memcpy(codes + 2 * i, &pair, 2);
    }
    return;
  }
  for (size_t i = 0; i < count; i += 8 * kEights) {
    const size_t eights = count - i < 8 * kEights ? (count - i) / 8 : kEights;
    alignas(64) uint64_t x[kEights];
    load_eights<BITS>(in, eights, x);
    for (size_t j = 0; j < eights; j++) x[j] = spread<BITS>(x[j]);
    std::memcpy(codes + i, x, 8 * eights);
    in += eights * BITS;
  }
}

template <int BITS>
REQUANT_INLINE void squeeze_eights(const uint8_t* codes, size_t eights, uint64_t* REQUANT_RESTRICT x) {
  std::memcpy(x, codes, 8 * eights);
  for (size_t j = 0; j < eights; j++) x[j] = squeeze<BITS>(x[j]);
}

template <int BITS>
struct Bits {
  static constexpr int value = BITS;
};

// call(Bits<bits>()), bits 1 to 8.
template <class Call>
REQUANT_INLINE void with_bits(int bits, Call call) {
  switch (bits) {
    case 1: return call(Bits<1>());
    case 2: return call(Bits<2>());
    case 3: return call(Bits<3>());
    case 4: return call(Bits<4>());
    case 5: return call(Bits<5>());
    case 6: return call(Bits<6>());
    case 7: return call(Bits<7>());
    case 8: return call(Bits<8>());
  }
}

REQUANT_INLINE void pack_codes(int bits, const uint8_t* codes, size_t count, uint8_t* out) {
  with_bits(bits, [&](auto b) { pack_codes<decltype(b)::value>(codes, count, out); });
}

REQUANT_INLINE void unpack_codes(int bits, const uint8_t* in, size_t count, uint8_t* codes) {
  with_bits(bits, [&](auto b) { unpack_codes<decltype(b)::value>(in, count, codes); });
}

}  // namespace
