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


// Sums in eight lanes whose order is fixed, so every build gives the same bits.
template <class A, class B>
void error_stats(const void* a_, const void* b_, size_t count, double* out) {
  constexpr size_t run = 256, lanes = 8;
  const auto* a = static_cast<const typename A::Stored*>(a_);
  const auto* b = static_cast<const typename B::Stored*>(b_);
  alignas(64) double errors[run], squares[run], norms[run];
  double error[lanes] = {}, norm[lanes] = {}, most[lanes] = {};
  for (size_t start = 0; start < count; start += run) {
    const size_t size = count - start < run ? count - start : run;
    if (size < run)
      for (size_t i = 0; i < run; i++) errors[i] = squares[i] = norms[i] = 0.0;
    for (size_t i = 0; i < size; i++) {
      const double x = A::load(a[start + i]), y = B::load(b[start + i]);
      const double d = x - y;
      errors[i] = d < 0.0 ? -d : d;
      squares[i] = d * d;
      norms[i] = x * x;
    }
    seal(squares);
    seal(norms);
    for (size_t i = 0; i < run; i += lanes)
      for (size_t k = 0; k < lanes; k++) {
        error[k] += squares[i + k];
        norm[k] += norms[i + k];
        most[k] = errors[i + k] > most[k] ? errors[i + k] : most[k];
      }
  }
  out[0] = out[1] = out[2] = 0.0;
  for (size_t k = 0; k < lanes; k++) {
    out[0] += error[k];
    out[1] += norm[k];
    out[2] = most[k] > out[2] ? most[k] : out[2];
  }
  if (out[0] != out[0]) out[2] = out[0];  // a NaN anywhere is the answer
}

}  // namespace
