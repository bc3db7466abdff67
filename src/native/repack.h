// Codes moved into MLX's order: transposes, tiles and planes undone.
//
// Everything passes through tiles whose rows are one cache line, so that each line
// of the source is read once and each line of the result written once, whatever
// the distance between rows.

#pragma once

#include "floats.h"
#include "kernels.h"
#include "pack.h"

namespace {

// ---------------------------------------------------------------- tiles

template <class T>
constexpr size_t kEdge = 64 / sizeof(T);  // elements in a line; a tile is square
constexpr size_t kBand = 4;               // tiles side by side: neighbouring lines while their pages are at hand

// Transposes a tile. Each pass is a perfect shuffle: it moves the element at index
// (row, column) to that index with its bits rotated left by one, so after as many
// passes as a column has bits, row and column have changed places. The result is
// where the returned pointer says: in tile or in spare.
template <class T>
REQUANT_INLINE T* transpose_tile(T* REQUANT_RESTRICT tile, T* REQUANT_RESTRICT spare) {
  constexpr size_t half = kEdge<T> * kEdge<T> / 2;
  T* from = tile;
  T* to = spare;
  for (size_t span = 1; span < kEdge<T>; span *= 2) {
    const T* REQUANT_RESTRICT a = from;
    T* REQUANT_RESTRICT b = to;
    for (size_t m = 0; m < half; m++) {
      b[2 * m] = a[m];
      b[2 * m + 1] = a[m + half];
    }
    T* const swapped = from;
    from = to;
    to = swapped;
  }
  return from;
}

REQUANT_INLINE size_t min(size_t a, size_t b) { return a < b ? a : b; }

template <class T>
REQUANT_INLINE void copy_line(T* REQUANT_RESTRICT to, const T* REQUANT_RESTRICT from, size_t count) {
  if (__builtin_expect(count == kEdge<T>, 1))
    std::memcpy(to, from, 64);
  else
    std::memcpy(to, from, count * sizeof(T));
}

template <class T>
void transpose(const void* src_, size_t rows, size_t cols, requant::OutRows to) {
  constexpr size_t edge = kEdge<T>, wide = kBand * edge;
  const auto* src = static_cast<const T*>(src_);
  auto* out = static_cast<uint8_t*>(to.data);
  alignas(64) T tile[edge * edge], spare[edge * edge];
  for (size_t band = 0; band < cols; band += wide)
    for (size_t r = 0; r < rows; r += edge)
      for (size_t c = band; c < min(band + wide, cols); c += edge) {
        const size_t high = min(edge, rows - r), broad = min(edge, cols - c);
        for (size_t i = 0; i < high; i++) copy_line(tile + i * edge, src + (r + i) * cols + c, broad);
        const T* transposed = transpose_tile(tile, spare);
        for (size_t i = 0; i < broad; i++)
          copy_line(reinterpret_cast<T*>(out + (c + i) * to.row_bytes) + r, transposed + i * edge, high);
      }
}

// ---------------------------------------------------------------- columns to rows

// Place i of eight codes along the outputs holds output kInterleave[i] (AutoAWQ's order).
constexpr uint8_t kInterleave[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr uint8_t kInOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};

// Words SPAN apart change places in that bit of (word, nibble).
template <int SPAN, size_t LANES>
REQUANT_INLINE void exchange_nibbles(uint32_t x[8][LANES]) {
  constexpr int shift = 4 * SPAN;
  constexpr uint32_t mask = SPAN == 4 ? 0x0000ffffu : SPAN == 2 ? 0x00ff00ffu : 0x0f0f0f0fu;
  for (int n = 0; n < 4; n++) {
    const int k = n % SPAN + n / SPAN * 2 * SPAN;
    uint32_t* REQUANT_RESTRICT low = x[k];
    uint32_t* REQUANT_RESTRICT high = x[k + SPAN];
    for (size_t l = 0; l < LANES; l++) {
      const uint32_t t = ((low[l] >> shift) ^ high[l]) & mask;
      high[l] ^= t;
      low[l] ^= t << shift;
    }
  }
}

// x[i] holds eight nibbles; afterwards nibble k of x[i] is what nibble i of x[k] was.
template <size_t LANES>
REQUANT_INLINE void transpose_nibbles(uint32_t x[8][LANES]) {
  exchange_nibbles<4>(x);
  exchange_nibbles<2>(x);
  exchange_nibbles<1>(x);
}

// 4 bits: src (n_in, n_out / 8) to out (n_out, n_in / 8); n_in and n_out are multiples of 8.
void nibble_columns(const uint32_t* src, size_t n_in, size_t n_out, const uint8_t* order, uint32_t flip,
                    requant::OutRows to) {
  constexpr size_t edge = kEdge<uint32_t>;  // words a line, of either side
  constexpr size_t wide = kBand * edge;
  const size_t src_words = n_out / 8, out_words = n_in / 8;
  auto* out = static_cast<uint8_t*>(to.data);
  // Of input k of each eight, later of place i: (eights of inputs, words of the source).
  alignas(64) uint32_t planes[8][edge * edge] = {};
  alignas(64) uint32_t spare[edge * edge];
  for (size_t band = 0; band < src_words; band += wide)
    for (size_t w = 0; w < out_words; w += edge)
      for (size_t c = band; c < min(band + wide, src_words); c += edge) {
        const size_t high = min(edge, out_words - w), broad = min(edge, src_words - c);
        for (size_t e = 0; e < high; e++)
          for (size_t k = 0; k < 8; k++)
            copy_line(planes[k] + e * edge, src + (8 * (w + e) + k) * src_words + c, broad);
        transpose_nibbles(planes);
        for (size_t i = 0; i < 8; i++) {
          if (flip != 0)
            for (size_t l = 0; l < edge * edge; l++) planes[i][l] ^= flip;
          const uint32_t* transposed = transpose_tile(planes[i], spare);
          for (size_t l = 0; l < broad; l++)
            copy_line(reinterpret_cast<uint32_t*>(out + (8 * (c + l) + order[i]) * to.row_bytes) + w,
                      transposed + l * edge, high);
        }
      }
}

// Codes by columns, a tile at a time, to words by rows. fill(tile, k, inputs, o, outputs)
// writes the codes of some inputs and outputs; a tile's rows are kEdge bytes apart.
template <class Fill>
REQUANT_INLINE void tiles_to_words(size_t n_in, size_t n_out, int out_bits, const uint8_t* order, uint8_t flip,
                                   requant::OutRows to, Fill fill) {
  constexpr size_t edge = kEdge<uint8_t>;
  auto* out = static_cast<uint8_t*>(to.data);
  alignas(64) uint8_t tile[edge * edge] = {}, spare[edge * edge];
  for (size_t o = 0; o < n_out; o += edge)
    for (size_t k = 0; k < n_in; k += edge) {
      const size_t inputs = min(edge, n_in - k), outputs = min(edge, n_out - o);
      fill(tile, k, inputs, o, outputs);
      if (flip != 0)
        for (size_t i = 0; i < edge * edge; i++) tile[i] ^= flip;
      const uint8_t* transposed = transpose_tile(tile, spare);
      for (size_t i = 0; i < outputs; i++) {
        const size_t row = o + (i & ~size_t(7)) + order[i & 7];
        pack_codes(out_bits, transposed + i * edge, inputs, out + row * to.row_bytes + k / 8 * size_t(out_bits));
      }
    }
}

// Each input's codes are one bit stream along the outputs.
void stream_columns(const uint32_t* src, size_t n_in, size_t n_out, int bits, bool interleaved, bool is_signed,
                    requant::OutRows out, int out_bits) {
  const uint8_t* order = interleaved ? kInterleave : kInOrder;
  if (bits == 4 && out_bits == 4)
    return nibble_columns(src, n_in, n_out, order, is_signed ? 0x88888888u : 0, out);
  const auto* in = reinterpret_cast<const uint8_t*>(src);
  const uint8_t flip = is_signed ? uint8_t(1u << (bits - 1)) : 0;
  tiles_to_words(n_in, n_out, out_bits, order, flip, out,
                 [&](uint8_t* tile, size_t k, size_t inputs, size_t o, size_t outputs) {
                   for (size_t i = 0; i < inputs; i++)
                     unpack_codes(bits, in + ((k + i) * n_out + o) / 8 * size_t(bits), outputs,
                                  tile + i * kEdge<uint8_t>);
                 });
}

// ---------------------------------------------------------------- planes, tiles, quads

// Widths of GPTQModel's planes of a block of 32 codes, lowest bits first; the words of a
// plane are as many as its width.
constexpr uint8_t kPlanes[9][3] = {{}, {}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

// src (n_in * bits / 32, n_out): blocks of 32 inputs as planes down the rows. n_in is a
// multiple of 32; bits 2 to 8.
void planar_columns(const uint32_t* src, size_t n_in, size_t n_out, int bits, requant::OutRows out, int out_bits) {
  constexpr size_t edge = kEdge<uint8_t>;
  tiles_to_words(n_in, n_out, out_bits, kInOrder, 0, out,
                 [&](uint8_t* tile, size_t k, size_t inputs, size_t o, size_t outputs) {
                   for (size_t i = 0; i < inputs; i++) {
                     const uint32_t* block = src + (k + i) / 32 * size_t(bits) * n_out + o;
                     uint8_t* REQUANT_RESTRICT codes = tile + i * edge;
                     std::memset(codes, 0, edge);
                     unsigned low = 0;
                     for (const unsigned width : kPlanes[bits]) {
                       if (width == 0) break;
                       const unsigned bit = unsigned((k + i) % 32) * width, shift = bit % 32;
                       const uint32_t* REQUANT_RESTRICT words = block + (low + bit / 32) * n_out;
                       const uint32_t mask = (1u << width) - 1u;
                       for (size_t j = 0; j < outputs; j++)
                         codes[j] = uint8_t(codes[j] | ((words[j] >> shift) & mask) << low);
                       low += width;
                     }
                   }
                 });
}

// Marlin: src (n_in / 16, 2 * n_out), 128 words a tile of 16 inputs by 64 outputs, to words
// (n_out, n_in / 8). Word 4 * lane + t of a tile holds, for a = lane % 4, inputs 2a, 2a + 8,
// 2a + 1, 2a + 9 of output 16 t + lane / 4 in nibbles 0, 1, 4, 5, and of the output eight
// further on in nibbles 2, 3, 6, 7.
void marlin_words(const uint32_t* src, size_t n_in, size_t n_out, requant::OutRows to) {
  constexpr size_t deep = kEdge<uint32_t> / 2;  // tiles below one another fill lines of the result
  const size_t tiles = n_in / 16;
  auto* out = static_cast<uint8_t*>(to.data);
  alignas(64) uint32_t rows[64][2 * deep];
  for (size_t n = 0; n < n_out; n += 64)
    for (size_t k = 0; k < tiles; k += deep) {
      const size_t high = min(deep, tiles - k);
      for (size_t i = 0; i < high; i++) {
        const uint32_t* tile = src + (k + i) * 2 * n_out + 2 * n;
        for (size_t column = 0; column < 32; column++) {  // 8 t + lane / 4
          const size_t t = column / 8, first = 16 * t + column % 8;
          uint32_t quarters[4] = {};
          for (size_t a = 0; a < 4; a++) {
            const uint32_t word = tile[4 * (column % 8 * 4 + a) + t];
            for (size_t q = 0; q < 4; q++) {
              const uint32_t pair = word >> (4 * q);  // nibbles q and q + 4
              quarters[q] |= ((pair & 15u) | ((pair >> 12) & 0xf0u)) << (8 * a);
            }
          }
          for (size_t q = 0; q < 4; q++) rows[first + q / 2 * 8][2 * i + q % 2] = quarters[q];
        }
      }
      for (size_t r = 0; r < 64; r++)
        std::memcpy(out + (n + r) * to.row_bytes + 2 * k * sizeof(uint32_t), rows[r], 2 * high * sizeof(uint32_t));
    }
}

// AutoAWQ gemv_fast, llm-awq: src (n_out / 4, n_in) of 16 bits. 64 inputs of four rows are 64
// elements: 16 a row, 8 a half; nibble n of element k is input 32 * half + 8 n + k.
void awq_gemv_fast_words(const uint16_t* src, size_t n_in, size_t n_out, uint32_t* out) {
  for (size_t r = 0; r < n_out / 4; r++)
    for (size_t block = 0; block < n_in / 64; block++)
      for (size_t row = 0; row < 4; row++) {
        const uint16_t* stored = src + r * n_in + 64 * block + 16 * row;
        uint32_t* words = out + (4 * r + row) * (n_in / 8) + 8 * block;
        for (size_t w = 0; w < 8; w++) {
          uint32_t word = 0;
          for (size_t k = 0; k < 8; k++)
            word |= ((uint32_t(stored[w / 4 * 8 + k]) >> (4 * (w % 4))) & 15u) << (4 * k);
          words[w] = word;
        }
      }
}

// ---------------------------------------------------------------- row by row

// Rows of `row_words` words hold `count` codes: one bit stream, or per_word codes in the low
// bits of each word where per_word is not 0.
void stream_codes(const uint32_t* src, size_t rows, size_t row_words, int bits, size_t per_word, size_t count,
                  uint8_t* codes) {
  const uint32_t mask = (1u << bits) - 1u;
  for (size_t r = 0; r < rows; r++, src += row_words, codes += count) {
    if (per_word != 0) {
      for (size_t k = 0; k < count; k++)
        codes[k] = uint8_t((src[k / per_word] >> (k % per_word * size_t(bits))) & mask);
      continue;
    }
    const size_t whole = count / 32 * 32;
    unpack_codes(bits, reinterpret_cast<const uint8_t*>(src), whole, codes);
    for (size_t k = whole; k < count; k++) {
      const size_t bit = k * size_t(bits), word = bit / 32, shift = bit % 32;
      uint64_t pair = src[word];
      if (shift + size_t(bits) > 32) pair |= uint64_t(src[word + 1]) << 32;
      codes[k] = uint8_t((pair >> shift) & mask);
    }
  }
}

// Bits shift .. shift + bits - 1 of each element, xor flip; row r of src becomes row
// first + r * step of out.
template <class T>
void extract_bitfield(const void* src_, size_t rows, size_t cols, int shift, int bits, uint8_t flip, uint8_t* out,
                      size_t first, size_t step) {
  const auto* src = static_cast<const T*>(src_);
  const T mask = T((1u << bits) - 1u);
  for (size_t r = 0; r < rows; r++) {
    const T* REQUANT_RESTRICT from = src + r * cols;
    uint8_t* REQUANT_RESTRICT to = out + (first + r * step) * cols;
    for (size_t i = 0; i < cols; i++) to[i] = uint8_t((from[i] >> shift) & mask) ^ flip;
  }
}

// Nibble i of each word holds code kInterleave[i]; afterwards code i.
void deinterleave_words(const uint32_t* REQUANT_RESTRICT src, size_t count, uint32_t* REQUANT_RESTRICT out) {
  for (size_t i = 0; i < count; i++) {
    uint32_t even = src[i] & 0xffffu, odd = src[i] >> 16;
    even = (even | even << 8) & 0x00ff00ffu;
    odd = (odd | odd << 8) & 0x00ff00ffu;
    even = (even | even << 4) & 0x0f0f0f0fu;
    odd = (odd | odd << 4) & 0x0f0f0f0fu;
    out[i] = even | odd << 4;
  }
}

}  // namespace
