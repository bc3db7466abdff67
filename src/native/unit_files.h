// Bytes of a unit of work (unit.h): from files or memory, to files or memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <unistd.h>

namespace requant {

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

// Bytes of memory, or of ranges of files that follow one another. stop: looked at before each read; or null.
class StoredBytes {
 public:
  StoredBytes(const void* data, const StopFlag* stop) : data_(static_cast<const uint8_t*>(data)), stop_(stop) {}

  // first_index: number of the first range in errors.
  StoredBytes(std::vector<FileRange> ranges, size_t first_index, const StopFlag* stop)
      : ranges_(std::move(ranges)), first_index_(first_index), stop_(stop) {
    size_t start = 0;
    for (const FileRange& range : ranges_) {
      starts_.push_back(start);
      start += range.nbytes;
    }
  }

  // Null: in files.
  const uint8_t* memory() const { return data_; }

  void check_stop() const {
    if (stop_ != nullptr && stop_->is_set()) throw Stopped{};
  }

  void read(size_t at, size_t nbytes, uint8_t* into) const {
    check_stop();
    if (data_ != nullptr) {
      std::memcpy(into, data_ + at, nbytes);
      return;
    }
    size_t index = size_t(std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin());
    index = index > 0 ? index - 1 : 0;  // the last range that begins at or before it
    while (nbytes > 0) {
      while (index < ranges_.size() && at >= starts_[index] + ranges_[index].nbytes) index++;
      if (index == ranges_.size()) throw FileError{false, first_index_ + index, 0, 0};
      const FileRange& range = ranges_[index];
      const size_t inside = at - starts_[index], left = range.nbytes - inside;
      const int64_t offset = range.offset + int64_t(inside);
      const ssize_t got = pread(range.fd, into, nbytes < left ? nbytes : left, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw FileError{false, first_index_ + index, got < 0 ? errno : 0, offset};
      at += size_t(got);
      into += got;
      nbytes -= size_t(got);
    }
  }

 private:
  const uint8_t* data_ = nullptr;  // null: from files
  std::vector<FileRange> ranges_;
  std::vector<size_t> starts_;
  size_t first_index_ = 0;
  const StopFlag* stop_;
};

// The rows of an input, one block after another.
class RowReader {
 public:
  explicit RowReader(StoredBytes bytes) : bytes_(std::move(bytes)) {}

  // No block is larger.
  void reserve(size_t nbytes) {
    if (bytes_.memory() == nullptr) block_ = Buffer(nbytes);
  }

  // The next bytes; valid until the next call.
  const uint8_t* next(size_t nbytes) {
    if (bytes_.memory() == nullptr) {
      read(block_.get(), nbytes);
      return block_.get();
    }
    bytes_.check_stop();
    at_ += nbytes;
    return bytes_.memory() + at_ - nbytes;
  }

  void read(uint8_t* into, size_t nbytes) {
    bytes_.read(at_, nbytes, into);
    at_ += nbytes;
  }

 private:
  StoredBytes bytes_;
  size_t at_ = 0;
  Buffer block_;
};

// A rectangle of a stored matrix: of each of `rows` rows, `stride` bytes apart, `width` bytes from byte `left` on.
struct StoredRect {
  StoredBytes bytes;
  size_t rows, stride, left, width;

  // Rows from `first` on, and of each `nbytes` bytes from byte `from` of the rectangle, one after another.
  void read(size_t first, size_t count, size_t from, size_t nbytes, uint8_t* into) const {
    const size_t at = first * stride + left + from;
    if (nbytes == stride) return bytes.read(at, count * nbytes, into);
    for (size_t row = 0; row < count; row++) bytes.read(at + row * stride, nbytes, into + row * nbytes);
  }

  void read_all(uint8_t* into) const { read(0, rows, 0, width, into); }
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
    held_ = block_.get();
  }

  // The same in memory of the caller.
  void reserve_in(uint8_t* memory, size_t nbytes) {
    size_ = nbytes;
    held_ = memory;
  }

  // Room for the next bytes; they may be changed until the next call.
  uint8_t* next(size_t nbytes) {
    if (data_ != nullptr) {
      data_ += nbytes;
      return data_ - nbytes;
    }
    if (used_ + nbytes > size_) flush();
    used_ += nbytes;
    return held_ + used_ - nbytes;
  }

  void flush() {
    for (size_t done = 0; done < used_;) {
      const ssize_t got = pwrite(fd_, held_ + done, used_ - done, offset_);
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
  uint8_t* held_ = nullptr;  // what is not written yet
  Buffer block_;
};

}  // namespace requant
