// A unit of work: many rows of one tensor, from files or memory to files or memory.
//
// The rows pass in blocks that stay in a core's cache: read, decoded or cast, checked for NaN and
// infinity, encoded, decoded again to measure the error, written. `block_bytes` is the most that a
// block has of stored or of dense values, but for one row, and what is collected of an output before
// it is written; about six times as much is held. Nothing here depends on the instruction set: the
// arithmetic is that of the table of kernels. Codes that are only moved are in unit_repack.h.

#pragma once

#include <cmath>

#include "kernels.h"
#include "unit_files.h"

namespace requant {

inline size_t itemsize(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

inline size_t least(size_t a, size_t b) { return a < b ? a : b; }
inline size_t most(size_t a, size_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------- bytes moved

inline void copy_rows(RowReader& source, RowWriter& target, size_t nbytes, size_t block_bytes) {
  const size_t most = block_bytes > 1 ? block_bytes : 1;
  target.reserve(most, most);
  for (size_t done = 0, size; done < nbytes; done += size) {
    size = nbytes - done < most ? nbytes - done : most;
    source.read(target.next(size), size);
  }
  target.flush();
}

// ---------------------------------------------------------------- rows of values

// Rows of values, cast or decoded to one dtype, a block after another.
class ValueRows {
 public:
  ValueRows(Dtype dtype, size_t cols) : dtype(dtype), cols(cols) {}
  virtual ~ValueRows() = default;
  ValueRows(const ValueRows&) = delete;
  ValueRows& operator=(const ValueRows&) = delete;

  // Bytes of a row as it is stored.
  virtual size_t stored_bytes() const = 0;
  // Whether values are computed: else `next` returns them where they are.
  virtual bool is_computed() const { return true; }
  // No block has more rows.
  virtual void reserve(size_t rows) = 0;
  // The next rows, in `into` if they are computed. What it returns is valid until the next call.
  virtual const uint8_t* next(size_t rows, uint8_t* into) = 0;

  const Dtype dtype;
  const size_t cols;
  size_t overflowed = 0;    // finite values that became infinite in a cast
  bool is_damaged = false;  // whether a scale or bias of codes is NaN or infinite; values have no meaning then
};

class FloatRows : public ValueRows {
 public:
  FloatRows(RowReader rows, Dtype stored, Dtype dtype, size_t cols)
      : ValueRows(dtype, cols), rows_(std::move(rows)), stored_(stored) {}

  size_t stored_bytes() const override { return cols * itemsize(stored_); }
  bool is_computed() const override { return stored_ != dtype; }
  void reserve(size_t rows) override { rows_.reserve(rows * stored_bytes()); }

  const uint8_t* next(size_t rows, uint8_t* into) override {
    const uint8_t* stored = rows_.next(rows * stored_bytes());
    if (!is_computed()) return stored;
    overflowed += kernels().cast({stored, stored_}, rows * cols, {into, dtype});
    return into;
  }

 private:
  RowReader rows_;
  const Dtype stored_;
};

// E4M3 bytes with a scale for each block of rows and columns. NaN is left to whom the values go.
class Float8Rows : public ValueRows {
 public:
  // blocks: `bytes` are null, `first_row` is that of the first row.
  Float8Rows(RowReader rows, Float8Blocks blocks, Dtype dtype, size_t cols)
      : ValueRows(dtype, cols), rows_(std::move(rows)), blocks_(blocks) {}

  size_t stored_bytes() const override { return cols; }
  void reserve(size_t rows) override { rows_.reserve(rows * cols); }

  const uint8_t* next(size_t rows, uint8_t* into) override {
    blocks_.bytes = rows_.next(rows * cols);
    kernels().float8_values(blocks_, {into, dtype, rows, cols});
    blocks_.first_row += rows;
    return into;
  }

 private:
  RowReader rows_;
  Float8Blocks blocks_;
};

// Blocks of GGUF, of one type.
class GgufRows : public ValueRows {
 public:
  GgufRows(RowReader rows, int type, Dtype dtype, size_t cols)
      : ValueRows(dtype, cols), rows_(std::move(rows)), type_(type) {
    kernels().gguf_block(type, block_);
  }

  size_t stored_bytes() const override { return cols / size_t(block_.elements) * size_t(block_.bytes); }
  void reserve(size_t rows) override { rows_.reserve(rows * stored_bytes()); }

  const uint8_t* next(size_t rows, uint8_t* into) override {
    const uint8_t* blocks = rows_.next(rows * stored_bytes());
    kernels().gguf_values({type_, blocks, rows * (cols / size_t(block_.elements))}, {into, dtype});
    return into;
  }

 private:
  RowReader rows_;
  const int type_;
  GgufBlock block_{};
};

// Whether a scale byte of a mode is NaN.
inline bool has_nan_scales(Mode mode, const uint8_t* scales, size_t count) {
  uint8_t found = 0;
  if (mode == Mode::Nvfp4)
    for (size_t i = 0; i < count; i++) found = uint8_t(found | uint8_t((scales[i] & 0x7f) == 0x7f));
  else
    for (size_t i = 0; i < count; i++) found = uint8_t(found | uint8_t(scales[i] == 0xff));
  return found != 0;
}

// Dtypes of scales and biases as they are stored; of mode affine.
struct GroupDtypes {
  Dtype scales, biases;
};

// Words, scales and biases of a mode of MLX, as MLX decodes them; float32 values are rounded to
// float32 alone, whatever the scales are.
class CodedRows : public ValueRows {
 public:
  CodedRows(RowReader words, RowReader scales, RowReader biases, Target source, GroupDtypes stored, Dtype dtype,
            size_t cols)
      : ValueRows(dtype, cols),
        words_(std::move(words)),
        scales_(std::move(scales)),
        biases_(std::move(biases)),
        source_(source),
        stored_(stored),
        groups_(cols / size_t(source.group_size)) {}

  size_t stored_bytes() const override {
    const size_t of_group = is_affine() ? itemsize(stored_.scales) + itemsize(stored_.biases) : 1;
    return word_bytes() + groups_ * of_group;
  }

  void reserve(size_t rows) override {
    words_.reserve(rows * word_bytes());
    scales_.reserve(rows * groups_ * (is_affine() ? itemsize(stored_.scales) : 1));
    if (!is_affine()) return;
    biases_.reserve(rows * groups_ * itemsize(stored_.biases));
    if (dtype != Dtype::F32) return;
    wide_scales_ = Buffer(rows * groups_ * sizeof(float));
    wide_biases_ = Buffer(rows * groups_ * sizeof(float));
  }

  const uint8_t* next(size_t rows, uint8_t* into) override {
    const Kernels& k = kernels();
    const auto* words = reinterpret_cast<const uint32_t*>(words_.next(rows * word_bytes()));
    const Matrix out{into, dtype, rows, cols};
    const size_t count = rows * groups_;
    if (is_affine()) {
      const ConstValues scales = checked(scales_, stored_.scales, count, wide_scales_);
      const ConstValues biases = checked(biases_, stored_.biases, count, wide_biases_);
      k.affine_dequantize({words, scales, biases}, {source_.group_size, source_.bits}, out);
      return into;
    }
    const uint8_t* scales = scales_.next(count);
    is_damaged = is_damaged || has_nan_scales(source_.mode, scales, count);
    if (source_.mode == Mode::Nvfp4)
      k.nvfp4_dequantize({words, scales}, nullptr, out);
    else
      k.mx_dequantize({words, scales}, source_.bits, out);
    return into;
  }

 private:
  bool is_affine() const { return source_.mode == Mode::Affine; }
  size_t word_bytes() const { return cols * size_t(source_.bits) / 8; }

  ConstValues checked(RowReader& reader, Dtype stored, size_t count, const Buffer& wide) {
    const Kernels& k = kernels();
    const ConstValues found{reader.next(count * itemsize(stored)), stored};
    is_damaged = is_damaged || k.count_nonfinite(found, count) != 0;
    if (wide.get() == nullptr) return found;
    k.cast(found, count, {wide.get(), Dtype::F32});
    return {wide.get(), Dtype::F32};
  }

  RowReader words_, scales_, biases_;
  const Target source_;
  const GroupDtypes stored_;
  const size_t groups_;
  Buffer wide_scales_, wide_biases_;  // float32, where the values are
};

// Rows of a block: so many that neither stored nor dense values take more bytes, but one at least.
inline size_t rows_of_block(const ValueRows& source, size_t rows, size_t block_bytes) {
  const size_t widest = most(source.stored_bytes(), source.cols * itemsize(source.dtype));
  return least(most(block_bytes / widest, 1), rows);
}

// Values written as they are. Returns how many are not finite, if they are counted.
inline size_t write_values(ValueRows& source, RowWriter& target, size_t rows, bool counts_nonfinite,
                           size_t block_bytes) {
  if (rows == 0 || source.cols == 0) return 0;
  const size_t high = rows_of_block(source, rows, block_bytes), row_bytes = source.cols * itemsize(source.dtype);
  source.reserve(high);
  target.reserve(high * row_bytes, block_bytes);
  size_t nonfinite = 0;
  for (size_t row = 0, count; row < rows; row += count) {
    count = least(rows - row, high);
    uint8_t* out = target.next(count * row_bytes);
    const uint8_t* dense = source.next(count, out);
    if (source.is_damaged) return nonfinite;
    if (dense != out) std::memcpy(out, dense, count * row_bytes);
    if (counts_nonfinite) nonfinite += kernels().count_nonfinite({out, source.dtype}, count * source.cols);
  }
  target.flush();
  return nonfinite;
}

// ---------------------------------------------------------------- rows encoded

// How rows are encoded.
struct Encoding {
  Target target;
  bool is_searched;
  Search search;
  bool is_encoded;  // the outputs hold the codes already: only the error is measured
  bool has_biases() const { return target.mode == Mode::Affine; }
};

// What was found in the rows.
struct Findings {
  size_t nonfinite = 0;
  ptrdiff_t first_nonfinite_row = -1;
  size_t overflowed = 0, flushed_groups = 0;
  double squared_error = 0.0, squared_values = 0.0;
  double weighted_error = 0.0, weighted_values = 0.0;  // with the weights of the search; 0 without one
  float max_error_steps = 0.0f;  // in steps of the group's scale
};

// Rows of `cols` values of one dtype on their way to codes. Sums of errors do not depend on how the rows
// are cut into blocks.
class RowEncoder {
 public:
  RowEncoder(Encoding encoding, Dtype dtype, size_t cols, size_t most_rows)
      : k_(kernels()), encoding_(encoding), dtype_(dtype), cols_(cols) {
    if (encoding.is_searched) decoded_ = Buffer(most_rows * cols * itemsize(dtype));
  }

  // False, and codes without a meaning, if a value is not finite.
  bool encode(const void* dense, size_t rows, Encoded out) {
    const ConstMatrix w{dense, dtype_, rows, cols_};
    const size_t nonfinite = error_.nonfinite;
    if (encoding_.is_searched || encoding_.is_encoded) {
      if (encoding_.is_searched && !encoding_.is_encoded) {
        if (k_.count_nonfinite({dense, dtype_}, rows * cols_) == 0) search(w, out);
      }
      k_.measure(w, encoding_.target, {out.words, out.scales, out.biases}, error_);
    } else {
      k_.quantize_measured(w, encoding_.target, out, error_);
    }
    if (error_.nonfinite != nonfinite) return false;
    if (!encoding_.is_searched) return true;
    dequantize(out, {decoded_.get(), dtype_, rows, cols_});
    k_.weighted_errors(w, decoded_.get(), size_t(encoding_.target.group_size), encoding_.search, weighted_);
    return true;
  }

  void finish(Findings& found) const {
    double sums[2];
    k_.total_errors(error_.sums, sums);
    found.squared_error = sums[0];
    found.squared_values = sums[1];
    found.max_error_steps = error_.max_steps;
    found.flushed_groups += error_.flushed;
    found.nonfinite = error_.nonfinite;
    if (error_.nonfinite != 0) found.first_nonfinite_row = ptrdiff_t(error_.first_nonfinite / cols_);
    if (!encoding_.is_searched || error_.nonfinite != 0) return;
    k_.total_errors(weighted_, sums);
    found.weighted_error = sums[0];
    found.weighted_values = sums[1];
  }

 private:
  void search(ConstMatrix w, Encoded out) {
    const Target& target = encoding_.target;
    const FloatTensors floats{out.words, static_cast<uint8_t*>(out.scales)};
    switch (target.mode) {
      case Mode::Affine:
        k_.affine_search(w, {target.group_size, target.bits}, encoding_.search, {out.words, out.scales, out.biases});
        return;
      case Mode::Nvfp4: k_.nvfp4_search(w, nullptr, encoding_.search, floats); return;
      default: error_.flushed += k_.mx_search(w, target.bits, encoding_.search, floats);
    }
  }

  void dequantize(Encoded in, Matrix out) const {
    const Target& target = encoding_.target;
    const auto* scales = static_cast<const uint8_t*>(in.scales);
    switch (target.mode) {
      case Mode::Affine:
        return k_.affine_dequantize({in.words, {in.scales, dtype_}, {in.biases, dtype_}},
                                    {target.group_size, target.bits}, out);
      case Mode::Nvfp4: return k_.nvfp4_dequantize({in.words, scales}, nullptr, out);
      default: return k_.mx_dequantize({in.words, scales}, target.bits, out);
    }
  }

  const Kernels& k_;
  const Encoding encoding_;
  const Dtype dtype_;
  const size_t cols_;
  EncodingError error_{};
  ErrorSums weighted_{};
  Buffer decoded_;  // values of a block
};

struct RowTargets {
  RowWriter words, scales, biases;  // biases: of mode affine only
};

// Values encoded. A block with NaN or infinity is counted and left out: its codes are zeros. It ends where the
// source is damaged.
inline Findings encode_rows(ValueRows& source, size_t rows, const Encoding& encoding, RowTargets& targets,
                            size_t block_bytes) {
  Findings found;
  const size_t cols = source.cols, dense_bytes = cols * itemsize(source.dtype);
  if (rows == 0 || cols == 0) return found;
  const size_t word_bytes = cols * size_t(encoding.target.bits) / 8;
  const size_t scale_bytes =
      cols / size_t(encoding.target.group_size) * (encoding.has_biases() ? itemsize(source.dtype) : 1);
  const size_t high = rows_of_block(source, rows, block_bytes);
  source.reserve(high);
  targets.words.reserve(high * word_bytes, block_bytes);
  targets.scales.reserve(high * scale_bytes, block_bytes);
  if (encoding.has_biases()) targets.biases.reserve(high * scale_bytes, block_bytes);
  const Buffer computed(source.is_computed() ? high * dense_bytes : 0);
  RowEncoder encoder(encoding, source.dtype, cols, high);
  for (size_t row = 0, count; row < rows; row += count) {
    count = least(rows - row, high);
    const uint8_t* dense = source.next(count, computed.get());
    if (source.is_damaged) return found;
    Encoded out{reinterpret_cast<uint32_t*>(targets.words.next(count * word_bytes)),
                targets.scales.next(count * scale_bytes), nullptr};
    if (encoding.has_biases()) out.biases = targets.biases.next(count * scale_bytes);
    if (encoder.encode(dense, count, out)) continue;
    std::memset(out.words, 0, count * word_bytes);
    std::memset(out.scales, 0, count * scale_bytes);
    if (encoding.has_biases()) std::memset(out.biases, 0, count * scale_bytes);
  }
  encoder.finish(found);
  found.overflowed = source.overflowed;
  targets.words.flush();
  targets.scales.flush();
  if (encoding.has_biases()) targets.biases.flush();
  return found;
}

}  // namespace requant
