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

// Values, (rows, cols), row after row.
struct ConstMatrix {
  const void* data;
  Dtype dtype;
  size_t rows, cols;
};
struct Matrix {
  void* data;
  Dtype dtype;
  size_t rows, cols;
};

// Values, one after another.
struct ConstValues {
  const void* data;
  Dtype dtype;
};
struct Values {
  void* data;
  Dtype dtype;
};

// Mode affine: bits of a code, and the columns that share a scale and a bias.
struct Affine {
  int group_size, bits;
};

// The tensors of an affine layer; scales and biases have the dtype of the weights.
struct AffineTensors {
  uint32_t* words;
  void* scales;
  void* biases;
};
struct ConstAffineTensors {
  const uint32_t* words;
  ConstValues scales, biases;  // may differ in dtype
};

// The tensors of a layer in mode mxfp4, mxfp8 or nvfp4.
struct FloatTensors {
  uint32_t* words;
  uint8_t* scales;
};
struct ConstFloatTensors {
  const uint32_t* words;
  const uint8_t* scales;
};

// How scales are searched for.
struct Search {
  const float* weights;  // of the squared error, one for each column; null for all alike
  bool best;             // the slower level
  bool by_magnitude;     // whether the weights are multiplied with the magnitude of each value (search.h)
};

// Any mode of MLX, without a global scale. Mx: bits 4 is mxfp4, bits 8 mxfp8.
enum class Mode { Affine, Mx, Nvfp4 };
struct Target {
  Mode mode;
  int group_size, bits;
};

// The tensors of a layer in any mode. Scales: bytes, but of the dtype of the weights in mode affine, as the
// biases, which other modes do not have.
struct Encoded {
  uint32_t* words;
  void* scales;
  void* biases;
};
struct ConstEncoded {
  const uint32_t* words;
  const void* scales;
  const void* biases;
};

// Squares of errors and of values, in 16 lanes: lane k has the values k, k + 16, ... of each group, added up in
// float32, and over groups in float64. Groups that are added in order give the same sums, however
// many calls add them. Starts as {}.
struct ErrorSums {
  double error[16], norm[16];
};

// What was found while the rows of a matrix were encoded: added to by each call. Starts as {}.
struct EncodingError {
  ErrorSums sums;          // without a meaning if a value is not finite
  float max_steps;         // the largest error in units of its group's scale
  size_t values;           // seen so far
  size_t nonfinite;        // of these, NaN or infinite
  size_t first_nonfinite;  // its number among the values, if there is one
  size_t flushed;          // groups too small for E8M0
};

// The columns [start, start + size) of a layer whose columns are encoded one by one (gptq.h); size
// is a multiple of 4.
struct GptqGroup {
  float* w;  // (rows, cols), changed in place
  size_t rows, cols, start, size;
  int bits;
  const float *scales, *biases;  // one for each row
  const float* propagation;      // (cols, cols)
  uint8_t* codes;                // (rows, size)
  float* errors;                 // (rows, size), for the kernel's use
};

// The codes, scales and biases of an affine layer, refined with its Hessian (gptq.h); size is a multiple of 4.
struct GptqRefinement {
  const float* w;  // (rows, cols)
  size_t rows, cols, size;
  int bits, sweeps;
  const float* hessian;  // (cols, cols), symmetric
  uint8_t* codes;        // (rows, cols)
  Dtype dtype;           // of scales and biases
  void *scales, *biases;  // (rows, cols / size)
  float* gradients;      // (rows, cols), for the kernel's use
  float* changes;        // (rows, size), likewise
};

// Codes of all outputs of each input, packed: (n_in, n_out) codes.
struct PackedColumns {
  const uint32_t* words;
  size_t n_in, n_out;
  int bits;
};

// Rows of packed codes: `words` words a row, `count` codes taken of each. per_word 0: a row is one
// bit stream; else so many codes are in the low bits of each word.
struct PackedRows {
  const uint32_t* data;
  size_t rows, words, count;
  int bits;
  size_t per_word;
};

// Elements of 1, 2 or 4 bytes, (rows, cols).
struct Elements {
  const void* data;
  size_t item_bytes, rows, cols;
};

// Bits [shift, shift + bits) of an element, xor flip.
struct Bitfield {
  int shift, bits;
  uint8_t flip;
};

// Row r goes to row first + r * step of data.
struct SpacedRows {
  uint8_t* data;
  size_t first, step;
};

// Rows that are written, row_bytes from one to the next.
struct OutRows {
  void* data;
  size_t row_bytes;
};

// (code - zero) * scale, scale and zero shared by `group` columns. The last group may be short.
struct IntegerCodes {
  const uint8_t* codes;
  const float *scales, *zeros;
  size_t group;
  Dtype difference;  // what code - zero is rounded to before it is multiplied
};

// E4M3 bytes with a scale for each block of rows and columns. The last block may be short.
struct Float8Blocks {
  const uint8_t* bytes;
  const float* scales;
  size_t scale_cols, block_rows, block_cols;
  size_t first_row;  // row r of bytes is row first_row + r of the grid of blocks
  bool fnuz;
};

// Two codes of 4 bits a byte: codebook[code] * absmax of the block, whose value number `first` is
// the first one.
struct LutBlocks {
  const uint8_t* bytes;
  const float *codebook, *absmax;
  size_t block, first;
  bool high_first;
};

// GGUF blocks of one type, one after another.
struct GgufBlocks {
  int type;
  const uint8_t* data;
  size_t count;
};

struct Kernels {
  const char* name;

  void (*affine_quantize)(ConstMatrix w, Affine mode, AffineTensors out);
  void (*affine_dequantize)(ConstAffineTensors codes, Affine mode, Matrix out);

  // bits 4: mxfp4; bits 8: mxfp8. Returns the number of groups too small for E8M0.
  size_t (*mx_quantize)(ConstMatrix w, int bits, FloatTensors out);
  void (*mx_dequantize)(ConstFloatTensors codes, int bits, Matrix out);

  // global_scale: a pointer to one float, or null.
  void (*nvfp4_quantize)(ConstMatrix w, const float* global_scale, FloatTensors out);
  void (*nvfp4_dequantize)(ConstFloatTensors codes, const float* global_scale, Matrix out);

  // As the three *_quantize, with scales found by search.
  void (*affine_search)(ConstMatrix w, Affine mode, Search search, AffineTensors out);
  size_t (*mx_search)(ConstMatrix w, int bits, Search search, FloatTensors out);
  void (*nvfp4_search)(ConstMatrix w, const float* global_scale, Search search, FloatTensors out);

  // Any of the modes by *_quantize, and the error of the codes, while a block of them is in the cache. Codes
  // have no meaning if a value is not finite.
  void (*quantize_measured)(ConstMatrix w, Target target, Encoded out, EncodingError& error);
  // The error of codes that exist.
  void (*measure)(ConstMatrix w, Target target, ConstEncoded codes, EncodingError& error);

  // The lanes added up in order: squares of errors, and of values.
  void (*total_errors)(const ErrorSums& sums, double* out);

  // Codes of a group's columns; the error of each is propagated to the columns after it.
  void (*gptq_group)(const GptqGroup& group);
  // Scales, biases and codes again, group by group, so that the error of the layer's outputs falls.
  void (*gptq_refine)(const GptqRefinement& refinement);

  // cols is a multiple of 32.
  void (*pack_words)(const uint8_t* codes, size_t rows, size_t cols, int bits, uint32_t* words);
  void (*unpack_words)(const uint32_t* words, size_t rows, size_t cols, int bits, uint8_t* codes);

  size_t (*cast)(ConstValues src, size_t count, Values dst);
  size_t (*count_nonfinite)(ConstValues w, size_t count);
  ptrdiff_t (*first_nonfinite)(ConstValues w, size_t count);
  // Adds the sums of each column's magnitudes and squares (column_sums.h).
  void (*column_sums)(ConstMatrix w, double* magnitudes, double* squares);
  // b has the dtype of a. Adds weight * (a - b)^2, and weight * a^2.
  void (*weighted_errors)(ConstMatrix a, const void* b, size_t group_size, Search search, ErrorSums& sums);

  // Codes repacked (repack.h). (rows, cols) to (cols, rows).
  void (*transpose)(const Elements& src, OutRows out);
  // Each input's codes one bit stream along the outputs, (n_in, n_out * bits / 32) words, to words
  // (n_out, n_in * out_bits / 32). n_out is a multiple of 8; n_in too, unless out_bits is 8.
  void (*stream_columns)(const PackedColumns& src, bool interleaved, bool is_signed, OutRows out, int out_bits);
  // The same from GPTQModel's planes down the rows, (n_in * bits / 32, n_out) words; n_in a multiple of 32.
  void (*planar_columns)(const PackedColumns& src, OutRows out, int out_bits);
  // Marlin tiles (n_in / 16, 2 * n_out), and gemv_fast (n_out / 4, n_in), to words (n_out, n_in / 8).
  void (*marlin_words)(const uint32_t* src, size_t n_in, size_t n_out, OutRows out);
  void (*awq_gemv_fast_words)(const uint16_t* src, size_t n_in, size_t n_out, uint32_t* out);
  void (*stream_codes)(const PackedRows& src, uint8_t* codes);
  void (*extract_bitfield)(const Elements& src, Bitfield field, SpacedRows out);
  void (*deinterleave_words)(const uint32_t* src, size_t count, uint32_t* out);

  // Values computed (decode.h).
  void (*integer_values)(const IntegerCodes& codes, Matrix out);
  // Returns the number of NaN bytes.
  size_t (*float8_values)(const Float8Blocks& blocks, Matrix out);
  void (*lut_values)(const LutBlocks& blocks, size_t count, Values out);

  // GGUF (gguf.h). False: no block type has this number, and block is left alone.
  bool (*gguf_block)(int type, GgufBlock& block);
  void (*gguf_affine)(GgufBlocks blocks, AffineTensors out, Dtype dtype);
  void (*gguf_fp4)(GgufBlocks blocks, FloatTensors out);
  void (*gguf_values)(GgufBlocks blocks, Values out);
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
