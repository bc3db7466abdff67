// Sums over the columns of a matrix, and weighted errors.
//
// Every sum has a fixed order, so that no result depends on the instruction set.

#pragma once

#include "floats.h"
#include "search.h"

namespace {

constexpr size_t kSumLanes = 16;

REQUANT_INLINE double sum_of_lanes(const double* lanes) {
  double sum = 0.0;
  for (size_t k = 0; k < kSumLanes; k++) sum += lanes[k];
  return sum;
}

// Adds the magnitudes and the squares of each column, row by row: no sum depends on how the rows are cut.
template <class T>
void column_sums(const void* w_, size_t rows, size_t cols, double* REQUANT_RESTRICT magnitudes,
                 double* REQUANT_RESTRICT squares) {
  const auto* w = static_cast<const typename T::Stored*>(w_);
  for (size_t r = 0; r < rows; r++, w += cols)
    for (size_t i = 0; i < cols; i++) {
      const float x = T::load(w[i]);
      magnitudes[i] += double(float_of(bits_of(x) & kAbs32));
      squares[i] += double(x) * double(x);
    }
}

// Adds to sums those of weight * (a - b)^2 and of weight * a^2, the weights those that a search of a minimizes
// (search.h), but for a factor of each group. columns: one float a column, or null for ones.
template <class T>
void weighted_errors(const void* a_, const void* b_, size_t rows, size_t cols, size_t group_size, const float* columns,
                     bool by_magnitude, requant::ErrorSums& sums) {
  const auto* a = static_cast<const typename T::Stored*>(a_);
  const auto* b = static_cast<const typename T::Stored*>(b_);
  double errors[kSumLanes], values[kSumLanes];
  for (size_t k = 0; k < kSumLanes; k++) errors[k] = sums.error[k], values[k] = sums.norm[k];
  for (size_t r = 0; r < rows; r++, a += cols, b += cols)
    for (size_t start = 0; start < cols; start += group_size) {
      double sizes[kSumLanes] = {};
      if (by_magnitude)
        for (size_t i = start; i < start + group_size; i += kSumLanes)
          for (size_t k = 0; k < kSumLanes; k++) sizes[k] += double(float_of(bits_of(T::load(a[i + k])) & kAbs32));
      const double total = sum_of_lanes(sizes);
      const bool usable = total > double(kSmallestUnit) && total < double(kLargestUnit);
      const double per_mean = usable ? double(group_size) / total : 0.0;
      const double floor = usable ? double(kMagnitudeFloor) : 1.0;
      for (size_t i = start; i < start + group_size; i += kSumLanes)
        for (size_t k = 0; k < kSumLanes; k++) {
          const double x = double(T::load(a[i + k])), d = x - double(T::load(b[i + k]));
          const double magnitude = double(float_of(bits_of(float(x)) & kAbs32));
          const double h = (columns == nullptr ? 1.0 : double(columns[i + k])) * (magnitude * per_mean + floor);
          errors[k] += h * (d * d);
          values[k] += h * (x * x);
        }
    }
  for (size_t k = 0; k < kSumLanes; k++) sums.error[k] = errors[k], sums.norm[k] = values[k];
}

}  // namespace
