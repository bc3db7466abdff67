// Units of work that move codes: integer codes and blocks of GGUF, from files to files or arrays.

#include <nanobind/stl/optional.h>

#include "../unit_repack.h"
#include "checks.h"
#include "unit_arguments.h"

namespace requant::bindings {

namespace {

// A rectangle of a matrix whose rows are in ranges of files: (ranges, rows, bytes of a row, left, width).
using Rect = std::tuple<Ranges, size_t, size_t, size_t, size_t>;

// (rectangle, order, bits, padded, interleaved)
using Words = std::tuple<Rect, std::string, int, bool, bool>;
// (rectangle, dtype, whether (groups, rows))
using Numbers = std::tuple<Rect, std::string, bool>;
// (kind, rectangle or none, padded, interleaved, skipped, word offset, code offset, must be middle, dtype)
using Zeros =
    std::tuple<std::string, std::optional<Rect>, bool, bool, size_t, uint32_t, int, bool, std::string>;

// One rectangle after another out of the files of a unit.
class Rects {
 public:
  explicit Rects(const StopFlag* stop) : stop_(stop) {}

  StoredRect take(const Rect& rect, const char* name, size_t rows, size_t width) {
    const auto& [ranges, high, stride, left, broad] = rect;
    if (high != rows || broad != width)
      throw_value_error(std::string(name) + ": expected " + std::to_string(rows) + " rows of " + std::to_string(width) +
                        " bytes, got " + std::to_string(high) + " of " + std::to_string(broad));
    size_t end = 0, nbytes = 0;
    if (__builtin_add_overflow(left, broad, &end) || end > stride || __builtin_mul_overflow(high, stride, &nbytes))
      throw_value_error(std::string(name) + ": bytes " + std::to_string(left) + " to " + std::to_string(end) +
                        " lie beyond rows of " + std::to_string(stride));
    return {bytes_of(ranges, name, nbytes, index_, stop_), high, stride, left, broad};
  }

 private:
  const StopFlag* stop_;
  size_t index_ = 0;
};

template <class Value>
Value one_of(const char* name, const std::string& given,
             std::initializer_list<std::pair<const char*, Value>> known) {
  std::string names;
  for (const auto& [text, value] : known) {
    if (given == text) return value;
    names += (names.empty() ? "" : ", ") + std::string(text);
  }
  throw_value_error(std::string(name) + ": expected one of " + names + ", got " + given);
}

// Bytes of a row of words that holds so many codes.
size_t row_bytes(size_t codes, int bits, bool padded) {
  const size_t per_word = 32 / size_t(bits);
  return 4 * (padded ? (codes + per_word - 1) / per_word : (codes * size_t(bits) + 31) / 32);
}

StoredWords stored_words(const Words& given, Rects& rects, size_t rows, size_t cols, int out_bits) {
  const auto& [rect, name, bits, padded, interleaved] = given;
  const auto order = one_of<WordOrder>("order", name,
                                       {{"rows", WordOrder::Rows},
                                        {"columns", WordOrder::Columns},
                                        {"streams", WordOrder::Streams},
                                        {"planes", WordOrder::Planes},
                                        {"quads", WordOrder::Quads}});
  check_bits(bits);
  if (out_bits < bits) throw_value_error("bits: " + std::to_string(out_bits) + " do not hold " + std::to_string(bits));
  const bool is_widened = order == WordOrder::Rows || order == WordOrder::Streams || order == WordOrder::Planes;
  if (out_bits != bits && !is_widened) throw_value_error("bits: codes of order " + name + " are not widened");
  if (order == WordOrder::Quads && bits != 4) throw_value_error("bits: order quads has 4 bits");
  if (order == WordOrder::Planes && bits < 2) throw_value_error("bits: order planes has 2 bits or more");
  check_multiple("cols", cols, 32);
  const size_t unit = order == WordOrder::Rows ? 1 : order == WordOrder::Quads ? 4 : 32;
  if (order == WordOrder::Quads) check_multiple("cols", cols, 64);
  if (rows % unit != 0)
    throw_value_error("rows: " + std::to_string(rows) + " are not a multiple of " + std::to_string(unit));
  const auto take = [&](size_t high, size_t width) {
    return StoredWords{rects.take(rect, "words", high, width), order, bits, padded, interleaved};
  };
  switch (order) {
    case WordOrder::Rows: return take(rows, row_bytes(cols, bits, padded));
    case WordOrder::Streams: return take(cols, rows * size_t(bits) / 8);
    case WordOrder::Quads: return take(rows / 4, 2 * cols);
    default: return take(cols / 32 * size_t(bits), 4 * rows);
  }
}

StoredNumbers stored_numbers(const Rect& rect, const char* name, const std::string& dtype, bool is_transposed,
                             Rects& rects, size_t rows, size_t groups) {
  const Dtype d = dtype_of(dtype);
  const size_t high = is_transposed ? groups : rows, broad = is_transposed ? rows : groups;
  return {rects.take(rect, name, high, broad * bits_of(d) / 8), d, is_transposed};
}

StoredZeros stored_zeros(const Zeros& given, Rects& rects, size_t rows, size_t groups, int bits) {
  const auto& [name, rect, padded, interleaved, skipped, word_offset, code_offset, must_be_middle, dtype] = given;
  const auto kind = one_of<ZeroKind>("kind", name,
                                     {{"middle", ZeroKind::Middle},
                                      {"rows", ZeroKind::Rows},
                                      {"columns", ZeroKind::Columns},
                                      {"streams", ZeroKind::Streams},
                                      {"biases", ZeroKind::Biases}});
  StoredZeros zeros{kind,        {StoredBytes(nullptr, nullptr), 0, 0, 0, 0}, padded, interleaved, skipped, word_offset,
                    uint8_t(code_offset), must_be_middle, Dtype::F32};
  if (rect.has_value() == (kind == ZeroKind::Middle)) throw_value_error("zeros: a rectangle is expected but for middle");
  switch (kind) {
    case ZeroKind::Middle: break;
    case ZeroKind::Biases: {
      StoredNumbers numbers = stored_numbers(*rect, "zeros", dtype, true, rects, rows, groups);
      zeros.rect = std::move(numbers.rect);
      zeros.dtype = numbers.dtype;
      break;
    }
    case ZeroKind::Rows: zeros.rect = rects.take(*rect, "zeros", rows, row_bytes(groups, bits, padded)); break;
    case ZeroKind::Streams:
      if (rows % 32 != 0) throw_value_error("rows: zeros of order streams take multiples of 32");
      zeros.rect = rects.take(*rect, "zeros", groups, rows * size_t(bits) / 8);
      break;
    case ZeroKind::Columns:
      if (skipped > 32) throw_value_error("skipped: expected 32 or less");
      zeros.rect = rects.take(*rect, "zeros", row_bytes(skipped + rows, bits, padded) / 4, 4 * groups);
  }
  return zeros;
}

using Rounding = std::pair<double, double>;

// What both kinds of sources have in common.
struct RepackArguments {
  size_t rows, row_unit, first_row;
  bool measures;
};

std::optional<Rounding> repack(CodeSource& source, const RepackArguments& unit, const std::vector<Output>& targets,
                               Out room) {
  check_rank(room, "room", 1);
  check_layout(room, "room", 8);
  if (unit.row_unit < 1) throw_value_error("row_unit: expected 1 or more");
  RowTargets writers = targets_of(targets, source.target, source.dtype, unit.rows, source.cols);
  RoundingError sums;
  const bool is_done = run([&] {
    return repack_rows(source, unit.rows, unit.row_unit, unit.first_row, unit.measures, writers, data<uint8_t>(room),
                       room.shape(0), sums);
  });
  if (!is_done) return std::nullopt;
  return Rounding{sums.error, sums.values};
}

std::optional<Rounding> repack_integers(Words words, Numbers scales, Zeros zeros, size_t group, size_t rows,
                                        size_t cols, int group_size, int bits, const std::string& dtype,
                                        std::vector<Output> targets, size_t row_unit, size_t first_row, bool measures,
                                        Out room, const StopFlag* stop) {
  const Target target = target_of("affine", group_size, bits);
  check_multiple("cols", cols, group_size);
  if (group < 1) throw_value_error("group: expected 1 or more");
  const size_t groups = (cols + group - 1) / group;
  if (groups > 1 && group % size_t(group_size) != 0)
    throw_value_error("group: " + std::to_string(group) + " is not a multiple of " + std::to_string(group_size));
  Rects rects(stop);
  StoredWords stored = stored_words(words, rects, rows, cols, bits);
  const auto& [rect, scale_dtype, is_transposed] = scales;
  StoredNumbers numbers = stored_numbers(rect, "scales", scale_dtype, is_transposed, rects, rows, groups);
  StoredZeros zero_points = stored_zeros(zeros, rects, rows, groups, stored.bits);
  IntegerSource source(std::move(stored), std::move(numbers), std::move(zero_points), group, rows, cols, target,
                       dtype_of(dtype));
  return repack(source, {rows, row_unit, first_row, measures}, targets, room);
}

std::optional<Rounding> repack_gguf(Rect blocks, int type, size_t rows, size_t cols, const std::string& mode,
                                    const std::string& dtype, std::vector<Output> targets, size_t first_row,
                                    bool measures, Out room, const StopFlag* stop) {
  GgufBlock block;
  if (!kernels().gguf_block(type, block))
    throw_value_error("type: no block type of GGUF has number " + std::to_string(type));
  const bool is_affine = mode == "affine";
  if (is_affine ? block.bits == 0 : !block.fp4)
    throw_value_error("type: number " + std::to_string(type) + " has no codes of mode " + mode);
  check_multiple("cols", cols, block.elements);
  const Target target = is_affine ? Target{Mode::Affine, block.group, block.bits}
                                  : Target{mode == "nvfp4" ? Mode::Nvfp4 : Mode::Mx, mode == "nvfp4" ? kNvfp4Group : kMxGroup, 4};
  Rects rects(stop);
  const size_t width = cols / size_t(block.elements) * size_t(block.bytes);
  GgufSource source(rects.take(blocks, "blocks", rows, width), type, cols, target, dtype_of(dtype));
  return repack(source, {rows, 1, first_row, measures && is_affine}, targets, room);
}

}  // namespace

void init_unit_repack(nb::module_& m) {
  m.def("repack_integers", &repack_integers, "words"_a.noconvert(), "scales"_a.noconvert(), "zeros"_a.noconvert(),
        "group"_a, "rows"_a, "cols"_a, "group_size"_a, "bits"_a, "dtype"_a, "targets"_a.noconvert(), "row_unit"_a,
        "first_row"_a, "measures"_a, "room"_a.noconvert(), "stop"_a.none(),
        "Moves integer codes of rows into MLX's words, and rounds scales and biases once. A rectangle is (ranges of\n"
        "files, rows, bytes of a row, left, width). words: (rectangle, order, bits, padded, interleaved); scales:\n"
        "(rectangle, dtype, whether (groups, rows)); zeros: (kind, rectangle or None, padded, interleaved, skipped, word\n"
        "offset, code offset, must be middle, dtype). room: uint8, for a block of outputs. Returns the squares of what\n"
        "rounding changes and of values, of every 16th row if measures; None if a number is not finite or not as claimed:\n"
        "the outputs are not complete then.");
  m.def("repack_gguf", &repack_gguf, "blocks"_a.noconvert(), "type"_a, "rows"_a, "cols"_a, "mode"_a, "dtype"_a,
        "targets"_a.noconvert(), "first_row"_a, "measures"_a, "room"_a.noconvert(), "stop"_a.none(),
        "The same with blocks of GGUF.");
}

}  // namespace requant::bindings
