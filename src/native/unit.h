// A unit of work: many rows of one tensor, from files or memory to files or memory.
//
// The rows pass in blocks that stay in a core's cache: read, cast, checked for NaN and infinity,
// encoded, decoded again to measure the error, written. `block_bytes` is the most that a block has
// of stored or of dense values, but for one row, and what is collected of an output before it is
// written; about six times as much is held. Nothing here depends on the instruction set: the
// arithmetic is that of the table of kernels.

#pragma once

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <unistd.h>

#include "kernels.h"

namespace requant {

inline size_t itemsize(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

// Bytes of an open file.
struct FileRange {
  int fd;
  int64_t offset;
  size_t nbytes;
};

// A read or write that failed. index: of the range, or of the output; error: errno, 0 where a file
// ends too early.
struct FileError : std::exception {
  FileError(bool is_write, size_t index, int error, int64_t offset)
      : is_write(is_write), index(index), error(error), offset(offset) {}
  const char* what() const noexcept override { return "a file could not be read or written"; }

  bool is_write;
  size_t index;
  int error;
  int64_t offset;
};

// Set by one thread, to end units of others at their next block.
class StopFlag {
 public:
  void set() { is_set_.store(true, std::memory_order_relaxed); }
  bool is_set() const { return is_set_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> is_set_{false};
};

// A unit that its flag ended; what it wrote is not complete.
struct Stopped : std::exception {
  const char* what() const noexcept override { return "stopped"; }
};

// ---------------------------------------------------------------- bytes in and out

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t nbytes) : data_(static_cast<uint8_t*>(::operator new(nbytes, kAlign))) {}
  uint8_t* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(uint8_t* data) const { ::operator delete(data, kAlign); }
  };
  std::unique_ptr<uint8_t, Delete> data_;
};

// The rows of an input, one block after another. stop: looked at before each block; or null.
class RowReader {
 public:
  RowReader(const void* data, const StopFlag* stop) : data_(static_cast<const uint8_t*>(data)), stop_(stop) {}
  RowReader(std::vector<FileRange> ranges, const StopFlag* stop) : ranges_(std::move(ranges)), stop_(stop) {}

  // No block is larger.
  void reserve(size_t nbytes) {
    if (data_ == nullptr) block_ = Buffer(nbytes);
  }

  // The next bytes; valid until the next call.
  const uint8_t* next(size_t nbytes) {
    if (data_ == nullptr) {
      read(block_.get(), nbytes);
      return block_.get();
    }
    check_stop();
    data_ += nbytes;
    return data_ - nbytes;
  }

  void read(uint8_t* into, size_t nbytes) {
    if (data_ != nullptr) {
      std::memcpy(into, next(nbytes), nbytes);
      return;
    }
    check_stop();
    while (nbytes > 0) {
      while (index_ < ranges_.size() && ranges_[index_].nbytes == 0) index_++;
      if (index_ == ranges_.size()) throw FileError{false, index_, 0, 0};
      FileRange& range = ranges_[index_];
      const ssize_t got = pread(range.fd, into, nbytes < range.nbytes ? nbytes : range.nbytes, range.offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw FileError{false, index_, got < 0 ? errno : 0, range.offset};
      range.offset += got;
      range.nbytes -= size_t(got);
      into += got;
      nbytes -= size_t(got);
    }
  }

 private:
  void check_stop() const {
    if (stop_ != nullptr && stop_->is_set()) throw Stopped{};
  }

  const uint8_t* data_ = nullptr;  // null: from files
  std::vector<FileRange> ranges_;
  const StopFlag* stop_;
  size_t index_ = 0;
  Buffer block_;
};

// The rows of an output, one block after another.
class RowWriter {
 public:
  explicit RowWriter(void* data) : data_(static_cast<uint8_t*>(data)) {}
  RowWriter(int fd, int64_t offset, size_t index) : fd_(fd), offset_(offset), index_(index) {}

  // No block is larger than `nbytes`; so many, or `collected`, are written at a time.
  void reserve(size_t nbytes, size_t collected) {
    if (data_ != nullptr) return;
    size_ = nbytes > collected ? nbytes : collected;
    block_ = Buffer(size_);
  }

  // Room for the next bytes; they may be changed until the next call.
  uint8_t* next(size_t nbytes) {
    if (data_ != nullptr) {
      data_ += nbytes;
      return data_ - nbytes;
    }
    if (used_ + nbytes > size_) flush();
    used_ += nbytes;
    return block_.get() + used_ - nbytes;
  }

  void flush() {
    for (size_t done = 0; done < used_;) {
      const ssize_t got = pwrite(fd_, block_.get() + done, used_ - done, offset_);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw FileError{true, index_, got < 0 ? errno : ENOSPC, offset_};
      offset_ += got;
      done += size_t(got);
    }
    used_ = 0;
  }

 private:
  uint8_t* data_ = nullptr;  // null: to a file
  int fd_ = -1;
  int64_t offset_ = 0;
  size_t index_ = 0, size_ = 0, used_ = 0;
  Buffer block_;
};

// ---------------------------------------------------------------- rows moved and cast

inline void copy_rows(RowReader& source, RowWriter& target, size_t nbytes, size_t block_bytes) {
  const size_t most = block_bytes > 1 ? block_bytes : 1;
  target.reserve(most, most);
  for (size_t done = 0, size; done < nbytes; done += size) {
    size = nbytes - done < most ? nbytes - done : most;
    source.read(target.next(size), size);
  }
  target.flush();
}

// Returns the number of finite values that became infinite.
inline size_t cast_rows(RowReader& source, Dtype from, RowWriter& target, Dtype to, size_t count, size_t block_bytes) {
  const Kernels& k = kernels();
  const size_t most = block_bytes > 4 ? block_bytes / 4 : 1;
  source.reserve(most * itemsize(from));
  target.reserve(most * itemsize(to), block_bytes);
  size_t overflowed = 0;
  for (size_t done = 0, size; done < count; done += size) {
    size = count - done < most ? count - done : most;
    const uint8_t* stored = source.next(size * itemsize(from));
    overflowed += k.cast({stored, from}, size, {target.next(size * itemsize(to)), to});
  }
  target.flush();
  return overflowed;
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

// How rows are stored: as values, or as E4M3 bytes with a scale for each block of rows and columns,
// whose `bytes` are null, and whose `first_row` is that of the first row.
struct StoredRows {
  Dtype dtype;
  bool is_float8;
  Float8Blocks blocks;
  size_t item_bytes() const { return is_float8 ? 1 : itemsize(dtype); }
};

struct RowTargets {
  RowWriter words, scales, biases;  // biases: of mode affine only
};

// Rows as stored, decoded or cast to `dtype`, and encoded. A block with NaN or infinity is counted
// and left out: its codes are zeros.
inline Findings encode_rows(RowReader& source, const StoredRows& stored, Dtype dtype, size_t rows, size_t cols,
                            const Encoding& encoding, RowTargets& targets, size_t block_bytes) {
  const Kernels& k = kernels();
  Findings found;
  if (rows == 0 || cols == 0) return found;
  const size_t stored_bytes = cols * stored.item_bytes(), dense_bytes = cols * itemsize(dtype);
  const size_t word_bytes = cols * size_t(encoding.target.bits) / 8;
  const size_t scale_bytes = cols / size_t(encoding.target.group_size) * (encoding.has_biases() ? itemsize(dtype) : 1);
  const size_t widest = stored_bytes > dense_bytes ? stored_bytes : dense_bytes;
  const size_t fitting = block_bytes / widest > 1 ? block_bytes / widest : 1;
  const size_t most = fitting < rows ? fitting : rows;
  source.reserve(most * stored_bytes);
  targets.words.reserve(most * word_bytes, block_bytes);
  targets.scales.reserve(most * scale_bytes, block_bytes);
  if (encoding.has_biases()) targets.biases.reserve(most * scale_bytes, block_bytes);
  const bool is_cast = stored.is_float8 || stored.dtype != dtype;
  const Buffer cast(is_cast ? most * dense_bytes : 0);
  RowEncoder encoder(encoding, dtype, cols, most);
  for (size_t row = 0, count; row < rows; row += count) {
    count = rows - row < most ? rows - row : most;
    const uint8_t* dense = source.next(count * stored_bytes);
    if (stored.is_float8) {
      Float8Blocks blocks = stored.blocks;
      blocks.bytes = dense;
      blocks.first_row += row;
      k.float8_values(blocks, {cast.get(), dtype, count, cols});  // NaN is counted below
    } else if (is_cast) {
      found.overflowed += k.cast({dense, stored.dtype}, count * cols, {cast.get(), dtype});
    }
    if (is_cast) dense = cast.get();
    Encoded out{reinterpret_cast<uint32_t*>(targets.words.next(count * word_bytes)),
                targets.scales.next(count * scale_bytes), nullptr};
    if (encoding.has_biases()) out.biases = targets.biases.next(count * scale_bytes);
    if (encoder.encode(dense, count, out)) continue;
    std::memset(out.words, 0, count * word_bytes);
    std::memset(out.scales, 0, count * scale_bytes);
    if (encoding.has_biases()) std::memset(out.biases, 0, count * scale_bytes);
  }
  encoder.finish(found);
  targets.words.flush();
  targets.scales.flush();
  if (encoding.has_biases()) targets.biases.flush();
  return found;
}

// ---------------------------------------------------------------- a rectangle of a file

// Rows of `row_bytes`, `stride` bytes apart in a file, put one after another.
inline void read_spaced(int fd, int64_t offset, size_t stride, size_t rows, size_t row_bytes, uint8_t* into) {
  for (size_t row = 0; row < rows; row++, offset += int64_t(stride), into += row_bytes) {
    RowReader reader(std::vector<FileRange>{{fd, offset, row_bytes}}, nullptr);
    reader.read(into, row_bytes);
  }
}

}  // namespace requant
