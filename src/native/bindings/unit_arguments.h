// Arguments of units of work: sources and targets, each an array or a place in a file.

#pragma once

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <variant>

#include "../unit.h"
#include "checks.h"

namespace requant::bindings {

using Ranges = std::vector<std::tuple<int, int64_t, size_t>>;
using Source = std::variant<In, Ranges>;
using Output = std::variant<Out, std::pair<int, int64_t>>;

// Ranges of so many bytes in all; `index` is the number of the first one in errors, and moves on.
inline StoredBytes bytes_of(const Ranges& ranges, const char* name, size_t expected, size_t& index,
                            const StopFlag* stop) {
  std::vector<FileRange> found;
  size_t nbytes = 0;
  for (const auto& [fd, offset, size] : ranges) {
    found.push_back({fd, offset, size});
    if (__builtin_add_overflow(nbytes, size, &nbytes))
      throw_value_error(std::string(name) + ": the ranges are too large");
  }
  if (nbytes != expected)
    throw_value_error(std::string(name) + ": expected ranges of " + std::to_string(expected) + " bytes, got " +
                      std::to_string(nbytes));
  const size_t first = index;
  index += ranges.size();
  return StoredBytes(std::move(found), first, stop);
}

inline RowReader reader_of(const Source& source, const char* name, size_t bits, size_t rows, size_t cols, size_t& index,
                           const StopFlag* stop) {
  if (const In* array = std::get_if<In>(&source)) {
    check_shape(*array, name, bits, rows, cols);
    return RowReader(StoredBytes(array->data(), stop));
  }
  size_t expected = 0;
  if (__builtin_mul_overflow(rows, cols, &expected) || __builtin_mul_overflow(expected, bits / 8, &expected))
    throw_value_error(std::string(name) + ": " + to_string(std::vector<size_t>{rows, cols}) + " is too large");
  return RowReader(bytes_of(std::get<1>(source), name, expected, index, stop));
}

inline RowWriter writer_of(const Output& target, const char* name, size_t index, size_t bits, size_t rows,
                           size_t cols) {
  if (const Out* array = std::get_if<Out>(&target)) {
    check_shape(*array, name, bits, rows, cols);
    return RowWriter(array->data());
  }
  const auto& [fd, offset] = std::get<1>(target);
  return RowWriter(fd, offset, index);
}

// Writers for words, scales and, in mode affine, biases.
inline RowTargets targets_of(const std::vector<Output>& targets, Target target, Dtype dtype, size_t rows, size_t cols) {
  const bool has_biases = target.mode == Mode::Affine;
  const size_t count = has_biases ? 3 : 2, groups = cols / size_t(target.group_size);
  if (targets.size() != count)
    throw_value_error("targets: expected " + std::to_string(count) + ", got " + std::to_string(targets.size()));
  const size_t words = groups * size_t(target.group_size * target.bits / 32);
  const size_t scale_bits = has_biases ? bits_of(dtype) : 8;
  return {writer_of(targets[0], "words", 0, 32, rows, words), writer_of(targets[1], "scales", 1, scale_bits, rows, groups),
          writer_of(targets.back(), has_biases ? "biases" : "scales", count - 1, scale_bits, rows, groups)};
}

}  // namespace requant::bindings
