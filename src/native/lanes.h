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
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

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
