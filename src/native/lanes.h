// One lane a group: a block of groups is transposed, so that every sum over a group runs
// in the order of its values and no result depends on how many lanes there are.

#pragma once

#include "floats.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Eights __attribute__((vector_size(4 * kLanes)));
typedef int16_t MaskHalves __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Elements of a and b by constant numbers, those of b counted on.
#if defined(__clang__)
#define REQUANT_SHUFFLE(Type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define REQUANT_SHUFFLE(Type, a, b, ...) __builtin_shuffle(a, b, Type{__VA_ARGS__})
#endif

REQUANT_INLINE bool any(Mask x) {
  uint64_t part[kLanes / 2], all = 0;
  std::memcpy(part, &x, sizeof x);
  for (int i = 0; i < kLanes / 2; i++) all |= part[i];
  return all != 0;
}

// ---------------------------------------------------------------- to and from arrays

template <class X>
REQUANT_INLINE X load_as(const void* from) {
  X x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
REQUANT_INLINE Lanes load_lanes(const float* from) { return load_as<Lanes>(from); }
REQUANT_INLINE Mask load_lanes(const int32_t* from) { return load_as<Mask>(from); }
REQUANT_INLINE void store_lanes(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
REQUANT_INLINE void store_lanes(int32_t* to, Mask x) { std::memcpy(to, &x, sizeof x); }

// T::load of kLanes stored values, as vectors: the compiler would otherwise split these loops.
template <class T>
REQUANT_INLINE Lanes load_stored(const void* from) {
  if constexpr (sizeof(typename T::Stored) == 4) {
    return load_as<Lanes>(from);
  } else {
    const Mask u = __builtin_convertvector(load_as<Halves>(from), Mask);
    if constexpr (__is_same(T, BF16)) return Lanes(u << 16);
    const Mask a = (u & 0x7fff) << 13, sign = (u & 0x8000) << 16;
    const Mask tiny = Mask(Lanes(a + 0x38800000) - float_of(0x38800000u));
    Mask x = a + 0x38000000;
    x = a >= 0x0f800000 ? (a | int32_t(kInf32)) : x;
    x = a < 0x00800000 ? tiny : x;
    return Lanes(x | sign);
  }
}

// ---------------------------------------------------------------- arithmetic

REQUANT_INLINE Lanes broadcast(float x) { return Lanes{} + x; }
REQUANT_INLINE Lanes max(Lanes a, Lanes b) { return a > b ? a : b; }
REQUANT_INLINE Lanes min(Lanes a, Lanes b) { return a < b ? a : b; }
REQUANT_INLINE Lanes abs(Lanes a) { return Lanes(Mask(a) & int32_t(kAbs32)); }

// To 0 .. top, by integers, which order like floats that are not negative; NaN counts as either end.
REQUANT_INLINE Lanes clamp(Lanes x, float top) {
  const Mask zero = {}, most = zero + int32_t(bits_of(top));
  Mask k = Mask(x);
  k = k > zero ? k : zero;
  k = k < most ? k : most;
  return Lanes(k);
}

// The nearest of 0 .. top, ties to even.
REQUANT_INLINE Lanes nearest_code(Lanes x, float top) { return (clamp(x, top) + kRoundMagic) - kRoundMagic; }

// As stored in T and loaded again.
template <class T>
REQUANT_INLINE Lanes rounded(Lanes x) {
  if constexpr (!T::kRounds) return x;
  alignas(64) float out[kLanes];
  store_lanes(out, x);
  for (int l = 0; l < kLanes; l++) out[l] = T::round(out[l]);
  return load_lanes(out);
}

// ---------------------------------------------------------------- pairs of 16-bit values

// 2 * kLanes stored values in two vectors without a shuffle: a 32-bit lane holds value 2 l in its low
// half and value 2 l + 1 in its high half. Only for dtypes of 16 bits.
struct Pair {
  Lanes even, odd;
};

// x: a float16 in the high half of each lane, zeros below. NaN and infinities too.
REQUANT_INLINE Lanes widen_f16(Mask x) {
  const Mask sign = x & int32_t(0x80000000u), a = Mask(Words(x & 0x7fffffff) >> 3);
  // Without the case for subnormal numbers y is 2^-15 (1 + f) for f * 2^-14, and 2 y - 2^-14 is right; it
  // is not less than y for normal numbers.
  const Lanes y = Lanes(a + 0x38000000), least = min(y, (y + y) - 0x1p-14f);
  const Mask u = Mask(least) | (a >= 0x0f800000 ? sign | int32_t(kInf32) : sign);
  return Lanes(u);
}

template <class T>
REQUANT_INLINE Pair widen_pair(Mask w) {
  static_assert(sizeof(typename T::Stored) == 2, "a pair fills a lane");
  const Mask even = w << 16, odd = w & int32_t(0xffff0000u);
  if constexpr (__is_same(T, BF16)) return {Lanes(even), Lanes(odd)};
  return {widen_f16(even), widen_f16(odd)};
}

template <class T>
REQUANT_INLINE Pair load_pair(const void* from) {
  return widen_pair<T>(load_as<Mask>(from));
}

// The low halves of one and the high halves of the other.
REQUANT_INLINE Mask join_halves(Mask low, Mask high) { return (low & 0xffff) | (high & int32_t(0xffff0000u)); }

// The nearest numbers of T (16 bits), for zeros and what lies between T's least and largest normal number.
template <class T>
REQUANT_INLINE Lanes round_normal(Lanes x) {
  constexpr int drop = 23 - T::kMantissa;
  const Mask u = Mask(x);
  return Lanes((u + ((1 << (drop - 1)) - 1) + ((u >> drop) & 1)) & -(1 << drop));
}

// The bits of the number nearest to a magnitude, of a format with so many bits of mantissa and that bias: ties
// to even, subnormal numbers too. Beyond the largest exponent there is no infinity.
template <int MANTISSA, int BIAS>
REQUANT_INLINE Mask nearest_bits(Lanes a) {
  constexpr int magic = (23 - MANTISSA) << 23;
  // The power of two at or below a, or of the subnormal numbers, times 2^(23 - MANTISSA): the sum is rounded
  // to the format's last bit, and counts it above that power.
  const Mask power = Mask(max(a, broadcast(float_of(uint32_t(128 - BIAS) << 23)))) & int32_t(kInf32);
  const Mask steps = Mask(a + Lanes(power + magic)) - power;
  return steps + (power >> (23 - MANTISSA)) - (magic + ((127 - BIAS + 1) << MANTISSA));
}

// The same as round_normal for any magnitude that does not round to infinity, each in the high half of its
// lane, and the low half without a meaning.
template <class T>
REQUANT_INLINE Mask narrow(Lanes x) {
  if constexpr (__is_same(T, BF16)) {
    const Mask u = Mask(x);
    return u + 0x7fff + ((u >> 16) & 1);
  } else {
    return (nearest_bits<10, 15>(abs(x)) << 16) | (Mask(x) & int32_t(0x80000000u));
  }
}

// Stored as T, the inverse of load_pair: none is infinite or rounds to infinity.
template <class T>
REQUANT_INLINE Mask narrow_pair(Pair x) {
  return join_halves(Mask(Words(narrow<T>(x.even)) >> 16), narrow<T>(x.odd));
}

// Words 0, 2, ... to a, words 1, 3, ... to b, in an order that costs one shuffle each and that
// natural_order undoes.
REQUANT_INLINE void load_deinterleaved(const void* from, Mask& a, Mask& b) {
  const Mask low = load_as<Mask>(from), high = load_as<Mask>(static_cast<const char*>(from) + sizeof low);
#if defined(__AVX512F__)
  a = REQUANT_SHUFFLE(Mask, low, high, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  b = REQUANT_SHUFFLE(Mask, low, high, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  a = REQUANT_SHUFFLE(Mask, low, high, 0, 2, 8, 10, 4, 6, 12, 14);
  b = REQUANT_SHUFFLE(Mask, low, high, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  a = REQUANT_SHUFFLE(Mask, low, high, 0, 2, 4, 6);
  b = REQUANT_SHUFFLE(Mask, low, high, 1, 3, 5, 7);
#endif
}

REQUANT_INLINE Mask natural_order(Mask x) {
#if defined(__AVX512F__)
  return REQUANT_SHUFFLE(Mask, x, x, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
#elif defined(__AVX2__)
  return REQUANT_SHUFFLE(Mask, x, x, 0, 1, 4, 5, 2, 3, 6, 7);
#else
  return x;
#endif
}

// a[0] b[0] a[1] b[1] ..., 2 * kLanes words.
REQUANT_INLINE void store_interleaved(Mask a, Mask b, void* to) {
#if defined(__AVX512F__)
  const Mask low = REQUANT_SHUFFLE(Mask, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Mask high = REQUANT_SHUFFLE(Mask, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  const Mask low = REQUANT_SHUFFLE(Mask, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  const Mask high = REQUANT_SHUFFLE(Mask, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const Mask low = REQUANT_SHUFFLE(Mask, a, b, 0, 4, 1, 5), high = REQUANT_SHUFFLE(Mask, a, b, 2, 6, 3, 7);
#endif
  std::memcpy(to, &low, sizeof low);
  std::memcpy(static_cast<char*>(to) + sizeof low, &high, sizeof high);
}

// ---------------------------------------------------------------- tables of sixteen entries

typedef uint8_t Bytes __attribute__((vector_size(16)));

// Whether a byte of each lane picks from sixteen others by one instruction, and the compiler knows.
#if defined(__SSSE3__) || (defined(__aarch64__) && !defined(__clang__))
constexpr bool kHasLookup = true;
#else
constexpr bool kHasLookup = false;
#endif

// table[index], index below 16.
REQUANT_INLINE Bytes lookup(Bytes table, Bytes index) {
#if defined(__clang__)
  return __builtin_shufflevector(table, index);
#else
  return __builtin_shuffle(table, index);
#endif
}

// Sixteen entries of 16 bits.
struct Table {
  Bytes low, high;  // bytes of each

  REQUANT_INLINE static Table of(const uint16_t* entries) {
    const Bytes a = load_as<Bytes>(entries), b = load_as<Bytes>(entries + 8);
    return {REQUANT_SHUFFLE(Bytes, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            REQUANT_SHUFFLE(Bytes, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
  }

  // Entries of sixteen codes.
  REQUANT_INLINE void get(const uint8_t* codes, uint16_t* out) const {
    const Bytes index = load_as<Bytes>(codes);
    const Bytes l = lookup(low, index), h = lookup(high, index);
    const Bytes first = REQUANT_SHUFFLE(Bytes, l, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Bytes last = REQUANT_SHUFFLE(Bytes, l, h, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    std::memcpy(out, &first, sizeof first);
    std::memcpy(out + 8, &last, sizeof last);
  }
};

// ---------------------------------------------------------------- transposed blocks

// A square of kLanes x kLanes transposed: each perfect shuffle turns the bits of the
// index by one, and half of them swap rows with columns.
REQUANT_INLINE void transpose_square(float* REQUANT_RESTRICT a, float* REQUANT_RESTRICT b) {
  constexpr int half = kLanes * kLanes / 2;
  constexpr int rounds = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  for (int round = 0; round < rounds; round++) {
    const float* REQUANT_RESTRICT in = round % 2 == 0 ? a : b;
    float* REQUANT_RESTRICT out = round % 2 == 0 ? b : a;
    for (int k = 0; k < half; k++) {
      out[2 * k] = in[k];
      out[2 * k + 1] = in[k + half];
    }
  }
}

// Values of kLanes groups, value i of every group in out[i]. Lanes from count on repeat
// the last group; at(l) is the first value of group l.
template <class T, int GROUP, class At>
REQUANT_INLINE void gather_groups(int count, At at, Lanes* REQUANT_RESTRICT out) {
  alignas(64) float a[kLanes * kLanes], b[kLanes * kLanes];
  constexpr bool even = kLanes != 8;  // rounds of the shuffle
  for (int start = 0; start < GROUP; start += kLanes) {
    for (int l = 0; l < kLanes; l++) {
      const auto* from = at(l < count ? l : count - 1) + start;
      if constexpr (kLanes == 4 && !__is_same(T, F16)) {  // one by one is faster here
        for (int i = 0; i < kLanes; i++) a[l * kLanes + i] = T::load(load_as<typename T::Stored>(from + i));
      } else {
        store_lanes(a + l * kLanes, load_stored<T>(from));
      }
    }
    transpose_square(a, b);
    std::memcpy(out + start, even ? a : b, sizeof a);
  }
}

}  // namespace
