// The kernels as a table of functions, one table an instruction set.
//
// A kernel is a pure function over whole rows: pointers and sizes in, nothing
// allocated, no threads, no Python. Arrays are C-contiguous, floats are passed
// with their dtype, and the caller has checked every shape.

#pragma once

#include <cstddef>
#include <cstdint>

namespace requant {

// A type of GGUF's blocks.
struct GgufBlock {
  int elements, bytes;
  int bits, group;  // of MLX's affine codes that hold it; bits 0: none do
  bool fp4;         // MLX has a float mode of the same numbers
  int scale_bytes;  // of one block, in that mode
};

enum class Dtype { F32, F16, BF16 };

struct Kernels {
  const char* name;

  void (*affine_quantize)(const void* w, Dtype dtype, size_t rows, size_t cols, int group_size, int bits,
                          uint32_t* words, void* scales, void* biases);
  void (*affine_dequantize)(const uint32_t* words, const void* scales, Dtype scales_dtype, const void* biases,
                            Dtype biases_dtype, size_t rows, size_t cols, int group_size, int bits, void* out,
                            Dtype out_dtype);

  // bits 4: mxfp4; bits 8: mxfp8. Returns the number of groups too small for E8M0.
  size_t (*mx_quantize)(const void* w, Dtype dtype, size_t rows, size_t cols, int bits, uint32_t* words,
                        uint8_t* scales);
  void (*mx_dequantize)(const uint32_t* words, const uint8_t* scales, size_t rows, size_t cols, int bits,
                        void* out, Dtype out_dtype);

  // global_scale: a pointer to one float, or null.
  void (*nvfp4_quantize)(const void* w, Dtype dtype, size_t rows, size_t cols, uint32_t* words, uint8_t* scales,
                         const float* global_scale);
  void (*nvfp4_dequantize)(const uint32_t* words, const uint8_t* scales, size_t rows, size_t cols,
                           const float* global_scale, void* out, Dtype out_dtype);

  // As the three above, with scales found by search. weights: one a column, or null.
  void (*affine_search)(const void* w, Dtype dtype, size_t rows, size_t cols, int group_size, int bits,
                        const float* weights, bool best, uint32_t* words, void* scales, void* biases);
  size_t (*mx_search)(const void* w, Dtype dtype, size_t rows, size_t cols, int bits, const float* weights, bool best,
                      uint32_t* words, uint8_t* scales);
  void (*nvfp4_search)(const void* w, Dtype dtype, size_t rows, size_t cols, const float* weights, bool best,
                       uint32_t* words, uint8_t* scales, const float* global_scale);

  // Codes of the columns [start, start + group) with each one's error handed on; group is a
  // multiple of 4. w changes in place; errors: rows x group, for the kernel's use.
  void (*gptq_group)(float* w, size_t rows, size_t cols, size_t start, size_t group, int bits, const float* scales,
                     const float* biases, const float* propagation, uint8_t* codes, float* errors);

  // cols is a multiple of 32.
  void (*pack_words)(const uint8_t* codes, size_t rows, size_t cols, int bits, uint32_t* words);
  void (*unpack_words)(const uint32_t* words, size_t rows, size_t cols, int bits, uint8_t* codes);

  size_t (*cast)(const void* src, Dtype src_dtype, size_t count, void* dst, Dtype dst_dtype);
  size_t (*count_nonfinite)(const void* w, Dtype dtype, size_t count);
  ptrdiff_t (*first_nonfinite)(const void* w, Dtype dtype, size_t count);
  // out: sum of (a - b)^2, sum of a^2; group_max: the largest |a - b| of each group.
  void (*group_errors)(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, size_t count, size_t group_size,
                       float* group_max, double* out);

  // Codes moved (repack.h). Elements of 1, 2 or 4 bytes: (rows, cols) to (cols, rows).
  void (*transpose)(const void* src, size_t item_bytes, size_t rows, size_t cols, void* out);
  // Each input's codes one bit stream along the outputs, (n_in, n_out * bits / 32), to words
  // (n_out, n_in * out_bits / 32). n_out is a multiple of 8; n_in too, unless out_bits is 8.
  void (*stream_columns)(const uint32_t* src, size_t n_in, size_t n_out, int bits, bool interleaved, bool is_signed,
                         void* out, int out_bits);
  // The same from GPTQModel's planes down the rows, (n_in * bits / 32, n_out); n_in a multiple of 32.
  void (*planar_columns)(const uint32_t* src, size_t n_in, size_t n_out, int bits, void* out, int out_bits);
  // Marlin tiles (n_in / 16, 2 * n_out), and gemv_fast (n_out / 4, n_in), to words (n_out, n_in / 8).
  void (*marlin_words)(const uint32_t* src, size_t n_in, size_t n_out, uint32_t* out);
  void (*awq_gemv_fast_words)(const uint16_t* src, size_t n_in, size_t n_out, uint32_t* out);
  // per_word 0: each row one bit stream; else so many codes in the low bits of each word.
  void (*stream_codes)(const uint32_t* src, size_t rows, size_t row_words, int bits, size_t per_word, size_t count,
                       uint8_t* codes);
  // Bits from shift on of elements of 1 or 4 bytes; row r becomes row first + r * step of out.
  void (*extract_bitfield)(const void* src, size_t item_bytes, size_t rows, size_t cols, int shift, int bits,
                           uint8_t flip, uint8_t* out, size_t first, size_t step);
  void (*deinterleave_words)(const uint32_t* src, size_t count, uint32_t* out);

  // Values computed (decode.h). The last group or block of a row or column may be short.
  // difference: what code - zero is rounded to before it is multiplied.
  void (*integer_values)(const uint8_t* codes, const float* scales, const float* zeros, size_t rows, size_t cols,
                         size_t group, Dtype difference, void* out, Dtype out_dtype);
  // Returns the number of NaN bytes.
  size_t (*float8_values)(const uint8_t* bytes, bool fnuz, const float* scales, size_t rows, size_t cols,
                          size_t scale_cols, size_t block_rows, size_t block_cols, size_t first_row, void* out,
                          Dtype out_dtype);
  // Flat: the first value is number `first` of its block.
  void (*lut_values)(const uint8_t* bytes, size_t count, bool high_first, const float* codebook, const float* absmax,
                     size_t block, size_t first, void* out, Dtype out_dtype);

  // GGUF (gguf.h): count blocks of a type, one after another.
  // False: no block type has this number, and block is left alone.
  bool (*gguf_block)(int type, GgufBlock& block);
  void (*gguf_affine)(int type, const uint8_t* blocks, size_t count, uint32_t* words, void* scales, void* biases,
                      Dtype dtype);
  void (*gguf_fp4)(int type, const uint8_t* blocks, size_t count, uint32_t* words, uint8_t* scales);
  void (*gguf_values)(int type, const uint8_t* blocks, size_t count, void* out, Dtype dtype);
};

// Rounding to nearest even with subnormals kept, for as long as one lives:
// another library may have set the thread to flush subnormals to zero.
class FloatState {
 public:
  FloatState();
  ~FloatState();
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
  uint64_t saved_;
};

// Every table this processor can run, best last; ends with a null.
const Kernels* const* available_kernels();

const Kernels& kernels();
bool use_kernels(const char* name);  // false: no such table here

}  // namespace requant
