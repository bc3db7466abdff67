// Casts, checks and error sums over flat runs of values.

#pragma once

#include "floats.h"
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr size_t kRun = 4096;  // counts within a run fit 16 bits

// Round to nearest even; returns how many finite values became infinite.
template <class Src, class Dst>
size_t cast_values(const void* src_, size_t count, void* dst_) {
  const auto* src = static_cast<const typename Src::Stored*>(src_);
  auto* dst = static_cast<typename Dst::Stored*>(dst_);
  size_t overflows = 0;
  for (size_t start = 0; start < count; start += kRun) {
    const size_t stop = count - start < kRun ? count : start + kRun;
    uint32_t run = 0;
    for (size_t i = start; i < stop; i++) {
      const float x = Src::load(src[i]);
      const auto y = Dst::store(x);
      dst[i] = y;
      run += uint32_t((bits_of(x) & kAbs32) < kInf32) & uint32_t((y & Dst::kAbs) == Dst::kInf);
    }
    overflows += run;
  }
  return overflows;
}

template <class T>
size_t count_nonfinite(const void* w_, size_t count) {
  using Stored = typename T::Stored;
  const auto* w = static_cast<const Stored*>(w_);
  size_t total = 0;
  for (size_t start = 0; start < count; start += kRun) {
    const size_t stop = count - start < kRun ? count : start + kRun;
    Stored run = 0;
    for (size_t i = start; i < stop; i++) run = Stored(run + Stored(Stored(w[i] & T::kAbs) >= Stored(T::kInf)));
    total += run;
  }
  return total;
}

template <class T>
ptrdiff_t first_nonfinite(const void* w_, size_t count) {
  using Stored = typename T::Stored;
  const auto* w = static_cast<const Stored*>(w_);
  for (size_t start = 0; start < count; start += kRun) {
    const size_t size = count - start < kRun ? count - start : kRun;
    if (count_nonfinite<T>(w + start, size) == 0) continue;
    for (size_t i = start; i < start + size; i++)
      if (Stored(w[i] & T::kAbs) >= Stored(T::kInf)) return ptrdiff_t(i);
  }
  return -1;
}

// ---------------------------------------------------------------- errors

void total_errors(const requant::ErrorSums& sums, double* out) {
  out[0] = out[1] = 0.0;
  for (int k = 0; k < 16; k++) {
    out[0] += sums.error[k];
    out[1] += sums.norm[k];
  }
}

// Sixteen neighbouring values in any order, the same for both operands.
constexpr int kParts = 16 / kLanes;

template <class T, bool PAIRED>
REQUANT_INLINE void load_sixteen(const typename T::Stored* from, Lanes* out) {
  if constexpr (PAIRED) {
    for (int p = 0; p < kParts; p += 2) {
      const Pair pair = load_pair<T>(from + p * kLanes);
      out[p] = pair.even;
      out[p + 1] = pair.odd;
    }
  } else {
    for (int p = 0; p < kParts; p++) out[p] = load_stored<T>(from + p * kLanes);
  }
}

REQUANT_INLINE float largest_lane(Lanes x) {
  alignas(64) float of[kLanes];
  store_lanes(of, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) of[l] = of[l + half] > of[l] ? of[l + half] : of[l];
  return of[0];
}

// Errors of b against a, group by group: the largest |a - b| of each group goes to group_max, the squares of
// a - b and of a to sums.
template <class A, class B, size_t group_size>
void add_group_errors(const typename A::Stored* REQUANT_RESTRICT a, const typename B::Stored* REQUANT_RESTRICT b,
                      size_t groups, float* REQUANT_RESTRICT group_max, requant::ErrorSums& sums) {
  static_assert(group_size % 16 == 0, "a group is a whole number of lanes");
  constexpr bool paired = kParts > 1 && sizeof(*a) == 2 && sizeof(*b) == 2;
  alignas(64) double error[16] = {}, norm[16] = {};  // in the order of load_sixteen
  const auto lane = [](int i) {
    const int p = i / kLanes, l = i % kLanes;
    return paired ? p / 2 * 2 * kLanes + 2 * l + p % 2 : i;
  };
  for (int i = 0; i < 16; i++) {
    error[i] = sums.error[lane(i)];
    norm[i] = sums.norm[lane(i)];
  }
  for (size_t g = 0; g < groups; g++, a += group_size, b += group_size) {
    Lanes e[kParts] = {}, n[kParts] = {}, most[kParts] = {};
    for (size_t i = 0; i < group_size; i += 16) {
      Lanes x[kParts], y[kParts];
      load_sixteen<A, paired>(a + i, x);
      load_sixteen<B, paired>(b + i, y);
      for (int p = 0; p < kParts; p++) {
        const Lanes d = x[p] - y[p];
        e[p] += d * d;
        n[p] += x[p] * x[p];
        most[p] = max(abs(d), most[p]);
      }
    }
    alignas(64) float es[16], ns[16];
    for (int p = 0; p < kParts; p++) {
      store_lanes(es + p * kLanes, e[p]);
      store_lanes(ns + p * kLanes, n[p]);
    }
    for (int i = 0; i < 16; i++) {
      error[i] += double(es[i]);
      norm[i] += double(ns[i]);
    }
    for (int p = 1; p < kParts; p++) most[0] = max(most[p], most[0]);
    group_max[g] = largest_lane(most[0]);
  }
  for (int i = 0; i < 16; i++) {
    sums.error[lane(i)] = error[i];
    sums.norm[lane(i)] = norm[i];
  }
}

}  // namespace
