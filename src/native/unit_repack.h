// Units of work (unit.h) that move codes into MLX's order: integer codes with scales and zero points, and blocks of
// GGUF. The codes do not change; scales and biases are rounded once.
//
// Anything that is not as it should be, such as a scale that is NaN, ends a unit with `false`: the
// caller then takes the same rows another way, which says what is wrong.

#pragma once

#include "kernels.h"
#include "unit.h"
#include "unit_files.h"

namespace requant {

// Rows of codes on their way to words, scales and biases.
class CodeSource {
 public:
  explicit CodeSource(size_t cols, Target target, Dtype dtype) : cols(cols), target(target), dtype(dtype) {}
  virtual ~CodeSource() = default;
  CodeSource(const CodeSource&) = delete;
  CodeSource& operator=(const CodeSource&) = delete;

  // Bytes of a row as it is stored; 0 where a block is read in panels, of which no row takes anything.
  virtual size_t stored_bytes() const = 0;
  // Bytes that a row takes next to what is stored and written.
  virtual size_t scratch_bytes() const { return 0; }
  virtual void reserve(size_t rows) = 0;
  // Fills words, scales and biases of `rows` rows from `first` on; false if something is wrong.
  virtual bool next(size_t first, size_t rows, Encoded out) = 0;
  // Scales and biases of a row of the block, before they are rounded; words, where they differ.
  virtual const uint32_t* exact(size_t row, const uint32_t* words, float* scales, float* biases) = 0;

  size_t word_bytes() const { return cols * size_t(target.bits) / 8; }
  size_t groups() const { return cols / size_t(target.group_size); }
  size_t scale_bytes() const { return groups() * (target.mode == Mode::Affine ? itemsize(dtype) : 1); }

  const size_t cols;
  const Target target;
  const Dtype dtype;  // of scales and biases, in mode affine
};

// ---------------------------------------------------------------- integer codes

// How codes are stored.
enum class WordOrder {
  Rows,     // each row a bit stream, or as many whole codes in a word as fit (`padded`)
  Columns,  // bit streams down the inputs: MLX's words, transposed
  Streams,  // each input a bit stream along the outputs
  Planes,   // GPTQModel's planes down the inputs
  Quads,    // AutoAWQ's gemv_fast: four rows interleaved
};

struct StoredWords {
  StoredRect rect;  // of the unit's rows
  WordOrder order;
  int bits;
  bool padded, interleaved;
};

// A number for each row and group: (rows, groups), or (groups, rows).
struct StoredNumbers {
  StoredRect rect;
  Dtype dtype;
  bool is_transposed;
};

// What the biases are computed from.
enum class ZeroKind {
  Middle,   // every zero point is 2^(bits - 1)
  Rows,     // each row a bit stream
  Columns,  // bit streams down the rows, (words, groups); the rows of a unit begin with code `skipped`
  Streams,  // each group a bit stream along the rows
  Biases,   // the biases themselves
};

struct StoredZeros {
  ZeroKind kind;
  StoredRect rect;       // for all but Middle
  bool padded, interleaved;
  size_t skipped;
  uint32_t word_offset;  // added to each word
  uint8_t code_offset;   // added to each code, modulo 2^bits
  bool must_be_middle;
  Dtype dtype;           // of Biases
};

// w = (code - zero) * scale; scale and zero of `group` inputs.
class IntegerSource : public CodeSource {
 public:
  IntegerSource(StoredWords words, StoredNumbers scales, StoredZeros zeros, size_t group, size_t rows, size_t cols,
                Target target, Dtype dtype)
      : CodeSource(cols, target, dtype),
        words_(std::move(words)),
        scales_(std::move(scales)),
        zeros_(std::move(zeros)),
        stored_groups_((cols + group - 1) / group),
        rows_(rows) {
    for (size_t g = 0; g < groups(); g++) group_of_.push_back(g * size_t(target.group_size) / group);
    is_plain_ = words_.bits == target.bits && (!words_.padded || 32 % words_.bits == 0);
  }

  size_t stored_bytes() const override {
    const bool by_rows = words_.order == WordOrder::Rows || words_.order == WordOrder::Quads;
    return by_rows ? row_words() * sizeof(uint32_t) + (is_plain_ ? 0 : cols) : 0;
  }

  size_t scratch_bytes() const override { return stored_groups_ * (3 * sizeof(float) + itemsize(dtype) + 1); }

  void reserve(size_t rows) override {
    const size_t count = rows * stored_groups_, inputs = panel_inputs(rows);
    if (words_.order == WordOrder::Quads)
      stored_ = Buffer(rows * cols / 2);
    else if (words_.order == WordOrder::Rows)
      stored_ = Buffer(is_plain_ ? 0 : rows * row_words() * sizeof(uint32_t));
    else
      stored_ = Buffer(rows * (inputs * size_t(words_.bits) / 8));
    if (words_.order == WordOrder::Rows && !is_plain_) codes_ = Buffer(rows * cols);
    numbers_ = Buffer(count * sizeof(float));
    values_ = Buffer(count * sizeof(float));
    biases_ = Buffer(count * sizeof(float));
    narrow_ = Buffer(count * itemsize(dtype));
    zero_codes_ = Buffer(count);
  }

  bool next(size_t first, size_t rows, Encoded out) override {
    move_words(first, rows, out.words);
    const size_t count = rows * stored_groups_;
    if (!read_numbers(scales_, first, rows, values_.get())) return false;
    if (!read_zeros(first, rows)) return false;
    round_to(out.scales, values_.get(), rows);  // biases are those of the scales as they are stored
    auto* scales = reinterpret_cast<float*>(numbers_.get());
    kernels().cast({narrow_.get(), dtype}, count, {scales, Dtype::F32});
    auto* biases = reinterpret_cast<float*>(biases_.get());
    if (zeros_.kind != ZeroKind::Biases)
      for (size_t i = 0; i < count; i++) biases[i] = -zero_of(i) * scales[i];
    round_to(out.biases, biases_.get(), rows);
    const size_t spread = rows * groups();
    return kernels().count_nonfinite({out.scales, dtype}, spread) == 0 &&
           kernels().count_nonfinite({out.biases, dtype}, spread) == 0;
  }

  const uint32_t* exact(size_t row, const uint32_t* words, float* scales, float* biases) override {
    const size_t start = row * stored_groups_;
    const auto* stored = reinterpret_cast<const float*>(values_.get());
    const auto* given = reinterpret_cast<const float*>(biases_.get());
    for (size_t g = 0; g < groups(); g++) {
      const size_t i = start + group_of_[g];
      scales[g] = stored[i];
      biases[g] = zeros_.kind == ZeroKind::Biases ? given[i] : -zero_of(i) * stored[i];
    }
    return words;
  }

 private:
  // Words of a row of the rectangle, in order Rows.
  size_t row_words() const { return words_.rect.width / sizeof(uint32_t); }

  // Inputs of a panel: what is read at a time, and the rest of a cache line of the result at least.
  size_t panel_inputs(size_t rows) const {
    constexpr size_t kPanelBytes = 512 << 10, kLine = 512;  // 512 codes of any width are whole lines
    const size_t fitting = kPanelBytes * 8 / (rows * size_t(words_.bits));
    return least(fitting > kLine ? fitting / kLine * kLine : 128, cols);
  }

  void move_words(size_t first, size_t rows, uint32_t* out) {
    const Kernels& k = kernels();
    const size_t out_bytes = word_bytes(), bits = size_t(words_.bits);
    uint8_t* stored = stored_.get();
    auto* bytes = reinterpret_cast<uint8_t*>(out);
    if (words_.order == WordOrder::Rows) return move_rows(first, rows, out);
    if (words_.order == WordOrder::Quads) {
      words_.rect.read(first / 4, rows / 4, 0, 2 * cols, stored);
      return k.awq_gemv_fast_words(reinterpret_cast<const uint16_t*>(stored), cols, rows, out);
    }
    const size_t inputs = panel_inputs(rows);
    const auto* panel = reinterpret_cast<const uint32_t*>(stored);
    for (size_t input = 0, count; input < cols; input += count) {
      count = least(cols - input, inputs);
      const OutRows to{bytes + input * size_t(target.bits) / 8, out_bytes};
      switch (words_.order) {
        case WordOrder::Streams:
          words_.rect.read(input, count, first * bits / 8, rows * bits / 8, stored);
          k.stream_columns({panel, count, rows, words_.bits}, words_.interleaved, false, to, target.bits);
          break;
        default: {
          const size_t high = count * bits / 32;
          words_.rect.read(input * bits / 32, high, 4 * first, 4 * rows, stored);
          if (words_.order == WordOrder::Planes)
            k.planar_columns({panel, count, rows, words_.bits}, to, target.bits);
          else
            k.transpose({panel, sizeof(uint32_t), high, rows}, to);
        }
      }
    }
  }

  void move_rows(size_t first, size_t rows, uint32_t* out) {
    const size_t width = words_.rect.width;
    auto* into = is_plain_ ? reinterpret_cast<uint8_t*>(out) : stored_.get();
    words_.rect.read(first, rows, 0, width, into);
    if (is_plain_) return;
    const size_t per_word = words_.padded ? 32 / size_t(words_.bits) : 0;
    const auto* words = reinterpret_cast<const uint32_t*>(into);
    kernels().stream_codes({words, rows, row_words(), cols, words_.bits, per_word}, codes_.get());
    kernels().pack_words(codes_.get(), rows, cols, target.bits, out);
  }

  // Numbers as float32, (rows, groups); false if one of them is not finite.
  bool read_numbers(const StoredNumbers& numbers, size_t first, size_t rows, uint8_t* into) {
    const Kernels& k = kernels();
    const size_t size = itemsize(numbers.dtype), count = rows * stored_groups_;
    uint8_t* stored = biases_.get();
    if (numbers.is_transposed)
      numbers.rect.read(0, stored_groups_, first * size, rows * size, stored);
    else
      numbers.rect.read(first, rows, 0, stored_groups_ * size, stored);
    if (k.count_nonfinite({stored, numbers.dtype}, count) != 0) return false;
    if (!numbers.is_transposed) {
      k.cast({stored, numbers.dtype}, count, {into, Dtype::F32});
      return true;
    }
    k.cast({stored, numbers.dtype}, count, {numbers_.get(), Dtype::F32});
    k.transpose({numbers_.get(), sizeof(float), stored_groups_, rows}, {into, stored_groups_ * sizeof(float)});
    return true;
  }

  bool read_zeros(size_t first, size_t rows) {
    const Kernels& k = kernels();
    const size_t bits = size_t(words_.bits), count = rows * stored_groups_;
    uint8_t* codes = zero_codes_.get();
    const size_t per_word = zeros_.padded ? 32 / bits : 0;
    switch (zeros_.kind) {
      case ZeroKind::Middle: return true;
      case ZeroKind::Biases: {
        const Buffer read(count * sizeof(float));
        const bool is_finite = read_numbers({zeros_.rect, zeros_.dtype, true}, first, rows, read.get());
        std::memcpy(biases_.get(), read.get(), count * sizeof(float));
        return is_finite;
      }
      case ZeroKind::Rows: {
        const size_t width = zeros_.rect.width;
        const uint32_t* words = read_words(first, rows, 0, width);
        k.stream_codes({words, rows, width / 4, stored_groups_, words_.bits, per_word}, codes);
        break;
      }
      case ZeroKind::Streams: {
        const uint32_t* words = read_words(0, stored_groups_, first * bits / 8, rows * bits / 8);
        k.stream_columns({words, stored_groups_, rows, words_.bits}, zeros_.interleaved, false,
                         {codes, stored_groups_}, 8);
        break;
      }
      case ZeroKind::Columns: unit_zeros(first, rows, per_word, codes);
    }
    const auto mask = uint8_t((1u << bits) - 1u), middle = uint8_t(1u << (bits - 1));
    uint8_t differing = 0;
    for (size_t i = 0; i < count; i++) {
      codes[i] = uint8_t((codes[i] + zeros_.code_offset) & mask);
      differing = uint8_t(differing | (codes[i] ^ middle));
    }
    return !zeros_.must_be_middle || differing == 0;
  }

  const uint32_t* read_words(size_t first, size_t count, size_t from, size_t nbytes) {
    held_ = Buffer(count * nbytes);
    zeros_.rect.read(first, count, from, nbytes, held_.get());
    auto* words = reinterpret_cast<uint32_t*>(held_.get());
    if (zeros_.word_offset != 0)
      for (size_t i = 0; i < count * nbytes / 4; i++) words[i] += zeros_.word_offset;
    return words;
  }

  // Zeros of a block out of words down the rows, which are decoded once for the whole unit.
  void unit_zeros(size_t first, size_t rows, size_t per_word, uint8_t* codes) {
    const Kernels& k = kernels();
    const size_t groups = stored_groups_, high = zeros_.rect.rows, count = zeros_.skipped + rows_;
    if (unit_codes_.get() == nullptr) {
      const uint32_t* words = read_words(0, high, 0, 4 * groups);
      const Buffer turned(4 * high * groups), streams(count * groups);
      k.transpose({words, sizeof(uint32_t), high, groups}, {turned.get(), 4 * high});
      const auto* rows_of_words = reinterpret_cast<const uint32_t*>(turned.get());
      k.stream_codes({rows_of_words, groups, high, count, words_.bits, per_word}, streams.get());
      unit_codes_ = Buffer(count * groups);
      k.transpose({streams.get(), 1, groups, count}, {unit_codes_.get(), groups});
    }
    std::memcpy(codes, unit_codes_.get() + (zeros_.skipped + first) * groups, rows * groups);
  }

  float zero_of(size_t i) const {
    return zeros_.kind == ZeroKind::Middle ? float(1u << (words_.bits - 1)) : float(zero_codes_.get()[i]);
  }

  // float32 numbers of the stored groups rounded, and one for each of MLX's groups.
  void round_to(void* out, const uint8_t* numbers, size_t rows) {
    kernels().cast({numbers, Dtype::F32}, rows * stored_groups_, {narrow_.get(), dtype});
    if (itemsize(dtype) == 2)
      spread<uint16_t>(static_cast<uint16_t*>(out), rows);
    else
      spread<uint32_t>(static_cast<uint32_t*>(out), rows);
  }

  template <class Item>
  void spread(Item* out, size_t rows) const {
    const auto* from = reinterpret_cast<const Item*>(narrow_.get());
    const size_t count = groups();
    for (size_t row = 0; row < rows; row++, from += stored_groups_, out += count)
      for (size_t g = 0; g < count; g++) out[g] = from[group_of_[g]];
  }

  const StoredWords words_;
  const StoredNumbers scales_;
  const StoredZeros zeros_;
  const size_t stored_groups_, rows_;
  std::vector<size_t> group_of_;  // of each of MLX's groups
  bool is_plain_;                 // words of rows are MLX's
  // Words as stored and codes of them; then of each row and stored group: a place for what is read, scales,
  // biases, what is rounded, zeros.
  Buffer stored_, codes_, numbers_, values_, biases_, narrow_, zero_codes_, held_, unit_codes_;
};

// ---------------------------------------------------------------- blocks of GGUF

class GgufSource : public CodeSource {
 public:
  GgufSource(StoredRect rows, int type, size_t cols, Target target, Dtype dtype)
      : CodeSource(cols, target, dtype), rect_(std::move(rows)), type_(type) {
    kernels().gguf_block(type, block_);
  }

  size_t stored_bytes() const override { return rect_.width; }

  void reserve(size_t rows) override {
    blocks_ = Buffer(rows * rect_.width);
    words_ = Buffer(word_bytes());
  }

  bool next(size_t first, size_t rows, Encoded out) override {
    const Kernels& k = kernels();
    rect_.read(first, rows, 0, rect_.width, blocks_.get());
    const GgufBlocks blocks{type_, blocks_.get(), rows * per_row()};
    const size_t count = rows * groups();
    if (target.mode == Mode::Affine) {
      k.gguf_affine(blocks, {out.words, out.scales, out.biases}, dtype);
      return k.count_nonfinite({out.scales, dtype}, count) == 0 && k.count_nonfinite({out.biases, dtype}, count) == 0;
    }
    auto* scales = static_cast<uint8_t*>(out.scales);
    k.gguf_fp4(blocks, {out.words, scales});
    if (target.mode == Mode::Mx) return !has_nan_scales(target.mode, scales, count);
    uint8_t negative = 0;
    for (size_t i = 0; i < count; i++) {
      if (scales[i] == 0x7f) scales[i] = 0;  // 0 for llama.cpp, NaN for MLX
      negative = uint8_t(negative | (scales[i] & 0x80));
    }
    return negative == 0;
  }

  const uint32_t* exact(size_t row, const uint32_t*, float* scales, float* biases) override {
    auto* words = reinterpret_cast<uint32_t*>(words_.get());
    const GgufBlocks blocks{type_, blocks_.get() + row * rect_.width, per_row()};
    kernels().gguf_affine(blocks, {words, scales, biases}, Dtype::F32);
    return words;
  }

 private:
  size_t per_row() const { return cols / size_t(block_.elements); }

  const StoredRect rect_;
  const int type_;
  GgufBlock block_{};
  Buffer blocks_, words_;  // rows as stored; words of a row
};

// ---------------------------------------------------------------- the unit

// Sums over the rows that are measured: of squares of what rounding scales and biases changes, and of values.
struct RoundingError {
  double error = 0.0, values = 0.0;
};

// The error of rows of a block, each `every`-th from row `from` on.
inline void add_rounding_error(CodeSource& source, size_t from, size_t every, size_t rows, ConstEncoded made,
                               RoundingError& sums) {
  const Kernels& k = kernels();
  const size_t groups = source.groups(), cols = source.cols;
  std::vector<float> numbers(4 * groups), values(2 * cols);
  float *scales = numbers.data(), *biases = scales + groups;
  float *rounded = values.data(), *exact = rounded + cols;
  const Affine mode{source.target.group_size, source.target.bits};
  for (size_t row = from; row < rows; row += every) {
    const size_t at = row * source.scale_bytes();
    const uint32_t* words = made.words + row * source.word_bytes() / sizeof(uint32_t);
    const auto widened = [&](const void* stored, float* wide) {
      k.cast({static_cast<const uint8_t*>(stored) + at, source.dtype}, groups, {wide, Dtype::F32});
      return ConstValues{wide, Dtype::F32};
    };
    const ConstValues s = widened(made.scales, biases + groups), b = widened(made.biases, biases + 2 * groups);
    k.affine_dequantize({words, s, b}, mode, {rounded, Dtype::F32, 1, cols});
    const uint32_t* same = source.exact(row, words, scales, biases);
    k.affine_dequantize({same, {scales, Dtype::F32}, {biases, Dtype::F32}}, mode, {exact, Dtype::F32, 1, cols});
    for (size_t i = 0; i < cols; i++) {
      const float error = rounded[i] - exact[i];
      sums.error += double(error) * double(error);
      sums.values += double(exact[i]) * double(exact[i]);
    }
  }
}

// Rows repacked; `room` is memory for a block of outputs. Of every 16th row of the step, of which the unit's first
// row is number `first_row`, the error of rounding is measured, if `measures`. Blocks begin at multiples
// of `row_unit`. False if something is wrong.
inline bool repack_rows(CodeSource& source, size_t rows, size_t row_unit, size_t first_row, bool measures,
                        RowTargets& targets, uint8_t* room, size_t room_bytes, RoundingError& sums) {
  constexpr size_t kMeasured = 16;
  if (rows == 0 || source.cols == 0) return true;
  const bool has_biases = source.target.mode == Mode::Affine;
  const size_t word_bytes = source.word_bytes(), scale_bytes = source.scale_bytes();
  const size_t written = word_bytes + scale_bytes * (has_biases ? 2 : 1);
  const size_t held = written + source.stored_bytes() + source.scratch_bytes();
  const size_t fitting = most(room_bytes / held / row_unit, 1) * row_unit;
  const size_t high = least(fitting, rows);
  Buffer own;
  if (high * written > room_bytes) {  // not even one unit of rows fits
    own = Buffer(high * written);
    room = own.get();
  }
  source.reserve(high);
  targets.words.reserve_in(room, high * word_bytes);
  targets.scales.reserve_in(room + high * word_bytes, high * scale_bytes);
  if (has_biases) targets.biases.reserve_in(room + high * (word_bytes + scale_bytes), high * scale_bytes);
  for (size_t row = 0, count; row < rows; row += count) {
    count = least(rows - row, high);
    Encoded out{reinterpret_cast<uint32_t*>(targets.words.next(count * word_bytes)),
                targets.scales.next(count * scale_bytes), nullptr};
    if (has_biases) out.biases = targets.biases.next(count * scale_bytes);
    if (!source.next(row, count, out)) return false;
    if (!measures) continue;
    const size_t from = (kMeasured - (first_row + row) % kMeasured) % kMeasured;
    add_rounding_error(source, from, kMeasured, count, {out.words, out.scales, out.biases}, sums);
  }
  targets.words.flush();
  targets.scales.flush();
  if (has_biases) targets.biases.flush();
  return true;
}

}  // namespace requant
