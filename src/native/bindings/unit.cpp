// Units of work: rows from files or arrays, through a kernel, to files or arrays.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <variant>

#include "../unit.h"
#include "checks.h"

namespace requant::bindings {

namespace {

using Source = std::variant<In, std::vector<std::tuple<int, int64_t, size_t>>>;
using Output = std::variant<Out, std::pair<int, int64_t>>;

RowReader reader_of(const Source& source, size_t bits, size_t rows, size_t cols, const StopFlag* stop) {
  if (const In* array = std::get_if<In>(&source)) {
    check_shape(*array, "source", bits, rows, cols);
    return RowReader(array->data(), stop);
  }
  size_t expected = 0, nbytes = 0;
  if (__builtin_mul_overflow(rows, cols, &expected) || __builtin_mul_overflow(expected, bits / 8, &expected))
    throw_value_error("source: " + to_string(std::vector<size_t>{rows, cols}) + " is too large");
  std::vector<FileRange> ranges;
  for (const auto& [fd, offset, size] : std::get<1>(source)) {
    ranges.push_back({fd, offset, size});
    if (__builtin_add_overflow(nbytes, size, &nbytes)) throw_value_error("source: the ranges are too large");
  }
  if (nbytes != expected)
    throw_value_error("source: expected ranges of " + std::to_string(expected) + " bytes, got " +
                      std::to_string(nbytes));
  return RowReader(std::move(ranges), stop);
}

RowWriter writer_of(const Output& target, const char* name, size_t index, size_t bits, size_t rows, size_t cols) {
  if (const Out* array = std::get_if<Out>(&target)) {
    check_shape(*array, name, bits, rows, cols);
    return RowWriter(array->data());
  }
  const auto& [fd, offset] = std::get<1>(target);
  return RowWriter(fd, offset, index);
}

void copy_rows_from(Source source, Output target, size_t nbytes, size_t block_bytes, const StopFlag* stop) {
  RowReader reader = reader_of(source, 8, 1, nbytes, stop);
  RowWriter writer = writer_of(target, "target", 0, 8, 1, nbytes);
  run([&] { copy_rows(reader, writer, nbytes, block_bytes); });
}

size_t cast_rows_from(Source source, const std::string& source_dtype, Output target, const std::string& dtype,
                      size_t count, size_t block_bytes, const StopFlag* stop) {
  const Dtype from = dtype_of(source_dtype), to = dtype_of(dtype);
  RowReader reader = reader_of(source, bits_of(from), 1, count, stop);
  RowWriter writer = writer_of(target, "target", 0, bits_of(to), 1, count);
  return run([&] { return cast_rows(reader, from, writer, to, count, block_bytes); });
}

const float* weights_of(const std::optional<In>& weights, const char* name, size_t cols) {
  if (!weights) return nullptr;
  check_rank(*weights, name, 1);
  check_layout(*weights, name, 32);
  if (weights->shape(0) != cols)
    throw_value_error(std::string(name) + ": expected shape (" + std::to_string(cols) + ",), got " +
                      to_string(shape_of(*weights)));
  return data<float>(*weights);
}

using BlockScales = std::tuple<In, ptrdiff_t, ptrdiff_t, ptrdiff_t>;

StoredRows stored_rows(const std::string& dtype, const std::optional<BlockScales>& block_scales, size_t rows,
                       size_t cols) {
  StoredRows stored{};
  stored.is_float8 = dtype == "F8_E4M3" || dtype == "F8_E4M3FNUZ";
  if (stored.is_float8 != block_scales.has_value())
    throw_value_error("block_scales: expected for F8_E4M3 and F8_E4M3FNUZ, and only for these");
  if (!stored.is_float8) {
    stored.dtype = dtype_of(dtype);
    return stored;
  }
  const auto& [scales, block_rows, block_cols, first_row] = *block_scales;
  if (block_rows < 1 || block_cols < 1 || first_row < 0)
    throw_value_error("block_scales: expected blocks of 1 or more, and a first row of 0 or more");
  const size_t high = size_t(block_rows), broad = size_t(block_cols), first = size_t(first_row);
  check_rank(scales, "block_scales", 2);
  check_shape(scales, "block_scales", 32, scales.shape(0), (cols + broad - 1) / broad);
  if (rows > 0 && scales.shape(0) <= (first + rows - 1) / high)
    throw_value_error("block_scales: row " + std::to_string(first + rows - 1) + " in blocks of " +
                      std::to_string(high) + " lies beyond shape " + to_string(shape_of(scales)));
  stored.blocks = {nullptr, data<float>(scales), scales.shape(1), high, broad, first, dtype == "F8_E4M3FNUZ"};
  return stored;
}

using Found = std::tuple<size_t, ptrdiff_t, size_t, size_t, double, double, double, double, double>;

Found encode_rows_from(Source source, const std::string& source_dtype, std::optional<BlockScales> block_scales,
                       const std::string& dtype, size_t rows, size_t cols, const std::string& mode, int group_size, int bits, std::vector<Output> targets,
                       std::optional<std::string> level, std::optional<In> weights, bool by_magnitude,
                       bool is_encoded, size_t block_bytes, const StopFlag* stop) {
  const Dtype to = dtype_of(dtype);
  const StoredRows stored = stored_rows(source_dtype, block_scales, rows, cols);
  Encoding encoding{};
  encoding.target = target_of(mode, group_size, bits);
  check_multiple("source", cols, group_size);
  encoding.is_searched = level.has_value();
  encoding.search.weights = weights_of(weights, "weights", cols);
  if (level) {
    if (*level != "fast" && *level != "best") throw_value_error("level: expected fast or best, got " + *level);
    encoding.search.best = *level == "best";
    encoding.search.by_magnitude = by_magnitude;
  }
  encoding.is_encoded = is_encoded;
  const size_t count = encoding.has_biases() ? 3 : 2;
  if (targets.size() != count)
    throw_value_error("targets: expected " + std::to_string(count) + ", got " + std::to_string(targets.size()));
  for (const Output& target : targets)
    if (is_encoded && !std::holds_alternative<Out>(target)) throw_value_error("targets: expected arrays with codes");
  const size_t groups = cols / size_t(group_size), words = groups * size_t(group_size * bits / 32);
  const size_t scale_bits = encoding.has_biases() ? bits_of(to) : 8;
  RowReader reader = reader_of(source, 8 * stored.item_bytes(), rows, cols, stop);
  RowTargets writers{writer_of(targets[0], "words", 0, 32, rows, words),
                     writer_of(targets[1], "scales", 1, scale_bits, rows, groups),
                     writer_of(targets.back(), count == 3 ? "biases" : "scales", count - 1, scale_bits, rows, groups)};
  const Findings found = run([&] { return encode_rows(reader, stored, to, rows, cols, encoding, writers, block_bytes); });
  return {found.nonfinite,     found.first_nonfinite_row, found.overflowed,     found.flushed_groups,
          found.squared_error, found.squared_values,      found.max_error_steps, found.weighted_error,
          found.weighted_values};
}

void read_spaced_from(int fd, int64_t offset, size_t stride, Out into) {
  check_rank(into, "into", 2);
  check_layout(into, "into", 8);
  run([&] { read_spaced(fd, offset, stride, into.shape(0), into.shape(1), data<uint8_t>(into)); });
}

}  // namespace

void init_unit(nb::module_& m) {
  static PyObject* failure = nb::exception<FileError>(m, "FileError").ptr();
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const FileError& e) {
      PyErr_SetObject(failure, nb::make_tuple(e.is_write, e.index, e.error, e.offset).ptr());
    }
  });
  nb::exception<Stopped>(m, "Stopped");
  nb::class_<StopFlag>(m, "StopFlag", "Set by one thread, to end the units of others at their next block.")
      .def(nb::init<>())
      .def("set", &StopFlag::set, "Ends the units that were given the flag: they raise Stopped.")
      .def("is_set", &StopFlag::is_set, "Whether set was called.");
  m.def("copy_rows", &copy_rows_from, "source"_a.noconvert(), "target"_a.noconvert(), "nbytes"_a, "block_bytes"_a,
        "stop"_a.none(),
        "Copies bytes. A source is an array or ranges (fd, offset, nbytes) of files, a target an array or a place\n"
        "(fd, offset). Raises FileError(is_write, index of the range or target, errno or 0 at the end, offset), and\n"
        "Stopped once the flag is set.");
  m.def("cast_rows", &cast_rows_from, "source"_a.noconvert(), "source_dtype"_a, "target"_a.noconvert(), "dtype"_a,
        "count"_a, "block_bytes"_a, "stop"_a.none(),
        "The same with values rounded; returns the number of finite values that became infinite.");
  m.def("encode_rows", &encode_rows_from, "source"_a.noconvert(), "source_dtype"_a,
        "block_scales"_a.noconvert().none(), "dtype"_a, "rows"_a, "cols"_a,
        "mode"_a, "group_size"_a, "bits"_a, "targets"_a.noconvert(), "level"_a.none(), "weights"_a.noconvert().none(), "by_magnitude"_a,
        "is_encoded"_a, "block_bytes"_a, "stop"_a.none(),
        "Casts rows to dtype, encodes them into words, scales and biases, and measures the error; with is_encoded\n"
        "only measures. F8_E4M3 and F8_E4M3FNUZ take block_scales: float32 bits, rows and columns of a block, the\n"
        "first row. Returns (nonfinite values, their first row or -1, overflows, flushed groups, squared error,\n"
        "squared values, the largest error in steps, and with a level the weighted sums).");
  m.def("read_spaced", &read_spaced_from, "fd"_a, "offset"_a, "stride"_a, "into"_a.noconvert(),
        "Reads rows of bytes that lie stride bytes apart.");
}

}  // namespace requant::bindings
