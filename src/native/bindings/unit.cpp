// Units of work: rows from files or arrays, through a kernel, to files or arrays.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>

#include "../unit.h"
#include "checks.h"
#include "unit_arguments.h"

namespace requant::bindings {

namespace {

void copy_rows_from(Source source, Output target, size_t nbytes, size_t block_bytes, const StopFlag* stop) {
  size_t index = 0;
  RowReader reader = reader_of(source, "source", 8, 1, nbytes, index, stop);
  RowWriter writer = writer_of(target, "target", 0, 8, 1, nbytes);
  run([&] { copy_rows(reader, writer, nbytes, block_bytes); });
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

// How rows are stored: (dtype,) of floats; (dtype, scales, rows and columns of a block, first row) of E4M3 bytes;
// (mode, group_size, bits, dtypes of scales and of biases) of MLX's codes; (type,) of blocks of GGUF.
using FloatKind = std::tuple<std::string>;
using Float8Kind = std::tuple<std::string, In, ptrdiff_t, ptrdiff_t, ptrdiff_t>;
using CodedKind = std::tuple<std::string, int, int, std::string, std::string>;
using GgufKind = std::tuple<int>;
using Kind = std::variant<FloatKind, Float8Kind, CodedKind, GgufKind>;

// Rows of values out of one source, or of codes out of two or three, and what the kinds have in common.
class ValueArguments {
 public:
  ValueArguments(const std::vector<Source>& sources, const std::string& dtype, size_t rows, size_t cols,
                 const StopFlag* stop)
      : sources_(sources), dtype_(dtype_of(dtype)), rows_(rows), cols_(cols), stop_(stop) {}

  std::unique_ptr<ValueRows> operator()(const FloatKind& kind) {
    const Dtype stored = dtype_of(std::get<0>(kind));
    return std::make_unique<FloatRows>(only(bits_of(stored), cols_), stored, dtype_, cols_);
  }

  std::unique_ptr<ValueRows> operator()(const Float8Kind& kind) {
    const auto& [dtype, scales, block_rows, block_cols, first_row] = kind;
    const bool fnuz = dtype == "F8_E4M3FNUZ";
    if (!fnuz && dtype != "F8_E4M3") throw_value_error("dtype: expected F8_E4M3 or F8_E4M3FNUZ, got " + dtype);
    if (block_rows < 1 || block_cols < 1 || first_row < 0)
      throw_value_error("block_scales: expected blocks of 1 or more, and a first row of 0 or more");
    const size_t high = size_t(block_rows), broad = size_t(block_cols), first = size_t(first_row);
    check_rank(scales, "block_scales", 2);
    check_shape(scales, "block_scales", 32, scales.shape(0), (cols_ + broad - 1) / broad);
    if (rows_ > 0 && scales.shape(0) <= (first + rows_ - 1) / high)
      throw_value_error("block_scales: row " + std::to_string(first + rows_ - 1) + " in blocks of " +
                        std::to_string(high) + " lies beyond shape " + to_string(shape_of(scales)));
    const Float8Blocks blocks{nullptr, data<float>(scales), scales.shape(1), high, broad, first, fnuz};
    return std::make_unique<Float8Rows>(only(8, cols_), blocks, dtype_, cols_);
  }

  std::unique_ptr<ValueRows> operator()(const CodedKind& kind) {
    const auto& [mode, group_size, bits, scales, biases] = kind;
    const Target source = target_of(mode, group_size, bits);
    check_multiple("source", cols_, group_size);
    const bool is_affine = source.mode == Mode::Affine;
    const size_t groups = cols_ / size_t(group_size);
    expect_sources(is_affine ? 3 : 2);
    size_t index = 0;
    RowReader words = reader_of(sources_[0], "words", 32, rows_, groups * size_t(group_size * bits / 32), index, stop_);
    const GroupDtypes stored = is_affine ? GroupDtypes{dtype_of(scales), dtype_of(biases)} : GroupDtypes{};
    const size_t scale_bits = is_affine ? bits_of(stored.scales) : 8;
    RowReader first = reader_of(sources_[1], "scales", scale_bits, rows_, groups, index, stop_);
    RowReader second(StoredBytes(nullptr, stop_));
    if (is_affine) second = reader_of(sources_[2], "biases", bits_of(stored.biases), rows_, groups, index, stop_);
    return std::make_unique<CodedRows>(std::move(words), std::move(first), std::move(second), source, stored, dtype_,
                                       cols_);
  }

  std::unique_ptr<ValueRows> operator()(const GgufKind& kind) {
    const int type = std::get<0>(kind);
    GgufBlock block;
    if (!kernels().gguf_block(type, block))
      throw_value_error("type: no block type of GGUF has number " + std::to_string(type));
    check_multiple("source", cols_, block.elements);
    return std::make_unique<GgufRows>(only(8, cols_ / size_t(block.elements) * size_t(block.bytes)), type, dtype_,
                                      cols_);
  }

 private:
  void expect_sources(size_t count) const {
    if (sources_.size() != count)
      throw_value_error("sources: expected " + std::to_string(count) + ", got " + std::to_string(sources_.size()));
  }

  RowReader only(size_t bits, size_t width) const {
    expect_sources(1);
    size_t index = 0;
    return reader_of(sources_[0], "source", bits, rows_, width, index, stop_);
  }

  const std::vector<Source>& sources_;
  const Dtype dtype_;
  const size_t rows_, cols_;
  const StopFlag* stop_;
};

using Written = std::tuple<size_t, size_t, bool>;

Written write_values_from(std::vector<Source> sources, Kind kind, Output target, const std::string& dtype, size_t rows,
                          size_t cols, bool counts_nonfinite, size_t block_bytes, const StopFlag* stop) {
  const auto source = std::visit(ValueArguments(sources, dtype, rows, cols, stop), kind);
  RowWriter writer = writer_of(target, "target", 0, bits_of(source->dtype), rows, cols);
  const size_t nonfinite = run([&] { return write_values(*source, writer, rows, counts_nonfinite, block_bytes); });
  return {source->overflowed, nonfinite, source->is_damaged};
}

using Found = std::tuple<size_t, ptrdiff_t, size_t, size_t, double, double, double, double, double, bool>;

Found encode_rows_from(std::vector<Source> sources, Kind kind, const std::string& dtype, size_t rows, size_t cols,
                       const std::string& mode, int group_size, int bits, std::vector<Output> targets,
                       std::optional<std::string> level, std::optional<In> weights, bool by_magnitude,
                       bool is_encoded, size_t block_bytes, const StopFlag* stop) {
  Encoding encoding{};
  encoding.target = target_of(mode, group_size, bits);
  check_multiple("source", cols, group_size);
  const auto source = std::visit(ValueArguments(sources, dtype, rows, cols, stop), kind);
  encoding.is_searched = level.has_value();
  encoding.search.weights = weights_of(weights, "weights", cols);
  if (level) {
    if (*level != "fast" && *level != "best") throw_value_error("level: expected fast or best, got " + *level);
    encoding.search.best = *level == "best";
    encoding.search.by_magnitude = by_magnitude;
  }
  encoding.is_encoded = is_encoded;
  for (const Output& target : targets)
    if (is_encoded && !std::holds_alternative<Out>(target)) throw_value_error("targets: expected arrays with codes");
  RowTargets writers = targets_of(targets, encoding.target, source->dtype, rows, cols);
  const Findings found = run([&] { return encode_rows(*source, rows, encoding, writers, block_bytes); });
  return {found.nonfinite,     found.first_nonfinite_row, found.overflowed,      found.flushed_groups,
          found.squared_error, found.squared_values,      found.max_error_steps, found.weighted_error,
          found.weighted_values, source->is_damaged};
}

void read_spaced_from(int fd, int64_t offset, size_t stride, Out into) {
  check_rank(into, "into", 2);
  check_layout(into, "into", 8);
  const size_t rows = into.shape(0), width = into.shape(1);
  if (rows == 0 || width == 0) return;
  run([&] {
    const StoredRect rect{StoredBytes({{fd, offset, (rows - 1) * stride + width}}, 0, nullptr), rows, stride, 0, width};
    rect.read_all(data<uint8_t>(into));
  });
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
  m.def("write_values", &write_values_from, "sources"_a.noconvert(), "kind"_a.noconvert(), "target"_a.noconvert(),
        "dtype"_a, "rows"_a, "cols"_a, "counts_nonfinite"_a, "block_bytes"_a, "stop"_a.none(),
        "Casts or decodes rows to dtype. kind says how they are stored: (dtype,) of floats; (dtype, scales, rows and\n"
        "columns of a block, first row) of E4M3 bytes; (mode, group_size, bits, dtypes of scales and of biases) of\n"
        "words, scales and biases; (type,) of blocks of GGUF. Returns (finite values that became infinite, values that\n"
        "are not finite, if they are counted, whether a scale or bias of codes is not: then the rest is not done).");
  m.def("encode_rows", &encode_rows_from, "sources"_a.noconvert(), "kind"_a.noconvert(), "dtype"_a, "rows"_a, "cols"_a,
        "mode"_a, "group_size"_a, "bits"_a, "targets"_a.noconvert(), "level"_a.none(), "weights"_a.noconvert().none(),
        "by_magnitude"_a, "is_encoded"_a, "block_bytes"_a, "stop"_a.none(),
        "The same, and encodes them into words, scales and biases, and measures the error; with is_encoded only\n"
        "measures. Returns (nonfinite values, their first row or -1, overflows, flushed groups, squared error, squared\n"
        "values, the largest error in steps, both sums with the weights of a search, whether a scale or bias of the\n"
        "source is not finite).");
  m.def("read_spaced", &read_spaced_from, "fd"_a, "offset"_a, "stride"_a, "into"_a.noconvert(),
        "Reads rows of bytes that lie stride bytes apart.");
}

}  // namespace requant::bindings
