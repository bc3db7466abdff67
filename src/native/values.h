// Casts, checks and error sums over flat runs of values.

#pragma once

#include "floats.h"

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


// Errors of b against a, group by group: the largest |a - b| of each group goes to
// group_max, the sums of (a - b)^2 and of a^2 to out. Sums run in lanes of a fixed order.
template <class A, class B, size_t group_size>
void group_errors(const void* a_, const void* b_, size_t count, float* group_max, double* out) {
  constexpr size_t lanes = 16;
  static_assert(group_size % lanes == 0, "a group is a whole number of lanes");
  const auto* a = static_cast<const typename A::Stored*>(a_);
  const auto* b = static_cast<const typename B::Stored*>(b_);
  double error[lanes] = {}, norm[lanes] = {};
  for (size_t start = 0; start < count; start += group_size) {
    float e[lanes] = {}, n[lanes] = {}, most[lanes] = {};
    for (size_t i = 0; i < group_size; i += lanes)
      for (size_t k = 0; k < lanes; k++) {
        const float x = A::load(a[start + i + k]), d = x - B::load(b[start + i + k]);
        const float abs = float_of(bits_of(d) & kAbs32);
        e[k] += d * d;
        n[k] += x * x;
        most[k] = abs > most[k] ? abs : most[k];
      }
    for (size_t k = 0; k < lanes; k++) {
      error[k] += double(e[k]);
      norm[k] += double(n[k]);
    }
    for (size_t half = lanes / 2; half > 0; half /= 2)
      for (size_t k = 0; k < half; k++) most[k] = most[k + half] > most[k] ? most[k + half] : most[k];
    group_max[start / group_size] = most[0];
  }
  out[0] = out[1] = 0.0;
  for (size_t k = 0; k < lanes; k++) {
    out[0] += error[k];
    out[1] += norm[k];
  }
}

}  // namespace
