// Values behind stored codes: float32 arithmetic, one rounding to the dtype of the result.

#pragma once

#include "floats.h"
#include "minifloat.h"
#include "pack.h"

namespace {

// ---------------------------------------------------------------- integers

// (code - zero) * scale; the difference is rounded to D first. Group j / group of a row.
template <class D, class Out>
void integer_values(const uint8_t* codes, const float* scales, const float* zeros, size_t rows, size_t cols,
                    size_t group, void* out_) {
  auto* out = static_cast<typename Out::Stored*>(out_);
  for (size_t r = 0; r < rows; r++)
    for (size_t start = 0; start < cols; start += group) {
      const size_t count = cols - start < group ? cols - start : group;
      const uint8_t* REQUANT_RESTRICT c = codes + r * cols + start;
      typename Out::Stored* REQUANT_RESTRICT o = out + r * cols + start;
      const float scale = *scales++, zero = *zeros++;
      for (size_t i = 0; i < count; i++) o[i] = Out::store(D::round(float(c[i]) - zero) * scale);
    }
}

// ---------------------------------------------------------------- float8

struct E4M3FN {
  static REQUANT_INLINE float decode(uint32_t byte) { return decode_e4m3(byte); }
  static REQUANT_INLINE bool is_nan(uint8_t byte) { return (byte & 0x7fu) == 0x7fu; }
};

// Exponent bias 8, no negative zero: its byte is the only NaN.
struct E4M3FNUZ {
  static REQUANT_INLINE float decode(uint32_t byte) {
    const uint32_t a = (byte & 0x7fu) << 20;
    const uint32_t tiny = bits_of(float_of(a + 0x3c000000u) - float_of(0x3c000000u));
    const uint32_t u = (a < 0x00800000u ? tiny : a + 0x3b800000u) | (byte & 0x80u) << 24;
    return float_of(byte == 0x80u ? 0x7fc00000u : u);
  }
  static REQUANT_INLINE bool is_nan(uint8_t byte) { return byte == 0x80u; }
};

template <class Format>
size_t count_nan_bytes(const uint8_t* bytes, size_t count) {
  size_t total = 0;
  while (count > 0) {
    const size_t run = count < 255 ? count : 255;  // fits the byte that counts
    uint8_t found = 0;
    for (size_t i = 0; i < run; i++) found = uint8_t(found + uint8_t(Format::is_nan(bytes[i])));
    total += found;
    bytes += run;
    count -= run;
  }
  return total;
}

// Byte times the scale of its block; row i of the bytes is row first_row + i of the blocks'
// grid. Returns how many bytes are NaN.
template <class Format, class Out>
size_t float8_values(const uint8_t* bytes, const float* scales, size_t rows, size_t cols, size_t scale_cols,
                     size_t block_rows, size_t block_cols, size_t first_row, void* out_) {
  auto* out = static_cast<typename Out::Stored*>(out_);
  for (size_t r = 0; r < rows; r++) {
    const float* scale = scales + (first_row + r) / block_rows * scale_cols;
    for (size_t start = 0; start < cols; start += block_cols) {
      const size_t count = cols - start < block_cols ? cols - start : block_cols;
      const uint8_t* REQUANT_RESTRICT b = bytes + r * cols + start;
      typename Out::Stored* REQUANT_RESTRICT o = out + r * cols + start;
      const float s = *scale++;
      for (size_t i = 0; i < count; i++) o[i] = Out::store(Format::decode(b[i]) * s);
    }
  }
  return count_nan_bytes<Format>(bytes, rows * cols);
}

// ---------------------------------------------------------------- 4-bit codes

// codebook[code] * absmax of the block, two codes a byte. The first value is number `first` of
// its block; count, first and block are even.
template <class Out>
void lut_values(const uint8_t* bytes, size_t count, bool high_first, const float* codebook, const float* absmax,
                size_t block, size_t first, void* out_) {
  using Stored = typename Out::Stored;
  auto* out = static_cast<Stored*>(out_);
  const int low = high_first ? 4 : 0, high = 4 - low;
  while (count > 0) {
    const size_t run = block - first < count ? block - first : count;
    const float scale = *absmax++;
    Stored table[16];  // of this block, rounded already
    for (int c = 0; c < 16; c++) table[c] = Out::store(codebook[c] * scale);
    for (size_t i = 0; i < run / 2; i++) {
      out[2 * i] = table[(bytes[i] >> low) & 15u];
      out[2 * i + 1] = table[(bytes[i] >> high) & 15u];
    }
    bytes += run / 2;
    out += run;
    count -= run;
    first = 0;
  }
}

}  // namespace
