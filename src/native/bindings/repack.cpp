// Codes moved: packed, unpacked, and brought into MLX's order.

#include "checks.h"

namespace requant::bindings {

namespace {

void pack_words(In codes, int bits, Out words) {
  check_bits(bits);
  check_rank(codes, "codes", 2);
  check_layout(codes, "codes", 8);
  const size_t rows = codes.shape(0), cols = codes.shape(1);
  check_multiple("codes", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  run([&] { kernels().pack_words(data<uint8_t>(codes), rows, cols, bits, data<uint32_t>(words)); });
}

void unpack_words(In words, int bits, Out codes) {
  check_bits(bits);
  check_rank(codes, "codes", 2);
  check_layout(codes, "codes", 8);
  const size_t rows = codes.shape(0), cols = codes.shape(1);
  check_multiple("codes", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  run([&] { kernels().unpack_words(data<uint32_t>(words), rows, cols, bits, data<uint8_t>(codes)); });
}

// A matrix without gaps.
OutRows out_rows(const Out& out) { return {out.data(), out.shape(1) * size_t(out.dtype().bits / 8)}; }

void transpose(In src, Out out) {
  check_rank(src, "src", 2);
  const size_t bits = src.dtype().bits;
  if (bits != 8 && bits != 16 && bits != 32)
    throw_value_error("src: expected uint8, uint16 or uint32, got " + to_string(src.dtype()));
  check_layout(src, "src", bits);
  check_shape(out, "out", bits, src.shape(1), src.shape(0));
  run([&] { kernels().transpose({src.data(), bits / 8, src.shape(0), src.shape(1)}, out_rows(out)); });
}

// Words of `bits`-bit codes along an axis; widths of packed rows are whole words.
size_t words_of(const char* name, size_t count, int bits) {
  if (count * size_t(bits) % 32 != 0)
    throw_value_error(std::string(name) + ": " + std::to_string(count) + " codes of " + std::to_string(bits) +
                      " bits do not fill whole words");
  return count * size_t(bits) / 32;
}

void check_out_bits(int bits, int out_bits) {
  check_bits(bits);
  if (out_bits < bits || out_bits > 8)
    throw_value_error("out_bits: expected " + std::to_string(bits) + " to 8, got " + std::to_string(out_bits));
}

// What columns of codes become: words of out_bits, or bytes where out_bits is 0.
int check_rows(In src, int bits, const Out& out, int out_bits) {
  const bool bytes = out_bits == 0;
  const int wide = bytes ? 8 : out_bits;
  check_out_bits(bits, wide);
  check_rank(src, "src", 2);
  check_rank(out, "out", 2);
  const size_t n_in = src.shape(0), n_out = out.shape(0);
  check_multiple("out", n_out, 8);
  check_shape(src, "src", 32, n_in, words_of("src", n_out, bits));
  if (bytes) {
    check_shape(out, "out", 8, n_out, n_in);
  } else {
    check_multiple("src", n_in, 8);
    check_shape(out, "out", 32, n_out, words_of("out", n_in, wide));
  }
  return wide;
}

void stream_columns(In src, int bits, Out out, int out_bits, bool interleaved, bool is_signed) {
  const int wide = check_rows(src, bits, out, out_bits);
  run([&] {
    kernels().stream_columns({data<uint32_t>(src), src.shape(0), out.shape(0), bits}, interleaved, is_signed,
                             out_rows(out), wide);
  });
}

void planar_columns(In src, int bits, Out out, int out_bits) {
  if (bits < 2) throw_value_error("bits: expected 2 to 8, got " + std::to_string(bits));
  const bool bytes = out_bits == 0;
  const int wide = bytes ? 8 : out_bits;
  check_out_bits(bits, wide);
  check_rank(src, "src", 2);
  check_rank(out, "out", 2);
  if (src.shape(0) % size_t(bits) != 0)
    throw_value_error("src: " + std::to_string(src.shape(0)) + " rows are not a multiple of the " +
                      std::to_string(bits) + " words of a block");
  const size_t n_in = src.shape(0) / size_t(bits) * 32, n_out = src.shape(1);
  check_layout(src, "src", 32);
  check_shape(out, "out", bytes ? 8 : 32, n_out, bytes ? n_in : n_in / 32 * size_t(wide));
  run([&] { kernels().planar_columns({data<uint32_t>(src), n_in, n_out, bits}, out_rows(out), wide); });
}

void marlin_words(In src, Out out) {
  check_rank(src, "src", 2);
  if (src.shape(1) % 128 != 0)
    throw_value_error("src: " + std::to_string(src.shape(1)) +
                      " columns are not a multiple of the 128 words of a tile");
  const size_t n_in = src.shape(0) * 16, n_out = src.shape(1) / 2;
  check_layout(src, "src", 32);
  check_shape(out, "out", 32, n_out, n_in / 8);
  run([&] { kernels().marlin_words(data<uint32_t>(src), n_in, n_out, out_rows(out)); });
}

void awq_gemv_fast_words(In src, Out out) {
  check_rank(src, "src", 2);
  check_layout(src, "src", 16);
  check_multiple("src", src.shape(1), 64);
  const size_t n_in = src.shape(1), n_out = src.shape(0) * 4;
  check_shape(out, "out", 32, n_out, n_in / 8);
  run([&] { kernels().awq_gemv_fast_words(data<uint16_t>(src), n_in, n_out, data<uint32_t>(out)); });
}

void stream_codes(In src, int bits, Out out, bool padded) {
  check_bits(bits);
  check_rank(src, "src", 2);
  check_layout(src, "src", 32);
  check_rank(out, "out", 2);
  const size_t rows = src.shape(0), words = src.shape(1), count = out.shape(1);
  check_shape(out, "out", 8, rows, count);
  const size_t per_word = padded ? 32 / size_t(bits) : 0;
  const size_t held = padded ? words * per_word : words * 32 / size_t(bits);
  if (rows > 0 && held < count)
    throw_value_error("src: " + std::to_string(words) + " words of a row hold " + std::to_string(held) +
                      " codes, expected " + std::to_string(count));
  run([&] {
    kernels().stream_codes({data<uint32_t>(src), rows, words, count, bits, per_word}, data<uint8_t>(out));
  });
}

void extract_bitfield(In src, int shift, int bits, int flip, Out out, size_t first, size_t step) {
  check_bits(bits);
  check_rank(src, "src", 2);
  const size_t item = src.dtype().bits;
  if (item != 8 && item != 32) throw_value_error("src: expected uint8 or uint32, got " + to_string(src.dtype()));
  check_layout(src, "src", item);
  if (shift < 0 || size_t(shift + bits) > item)
    throw_value_error("shift: " + std::to_string(bits) + " bits from bit " + std::to_string(shift) +
                      " on do not lie in " + std::to_string(item));
  if (flip < 0 || flip >= 1 << bits) throw_value_error("flip: expected less than 2^bits, got " + std::to_string(flip));
  check_rank(out, "out", 2);
  check_shape(out, "out", 8, out.shape(0), src.shape(1));
  const size_t rows = src.shape(0);
  if (step == 0 || (rows > 0 && (first >= out.shape(0) || (out.shape(0) - 1 - first) / step < rows - 1)))
    throw_value_error("out: " + std::to_string(rows) + " rows from " + std::to_string(first) + " in steps of " +
                      std::to_string(step) + " lie beyond shape " + to_string(shape_of(out)));
  run([&] {
    kernels().extract_bitfield({src.data(), item / 8, rows, src.shape(1)}, {shift, bits, uint8_t(flip)},
                               {data<uint8_t>(out), first, step});
  });
}

void deinterleave_words(In src, Out out) {
  check_rank(src, "src", 2);
  check_layout(src, "src", 32);
  check_shape(out, "out", 32, src.shape(0), src.shape(1));
  run([&] { kernels().deinterleave_words(data<uint32_t>(src), src.size(), data<uint32_t>(out)); });
}

}  // namespace

void init_repack(nb::module_& m) {
  m.def("pack_words", &pack_words, "codes"_a.noconvert(), "bits"_a, "words"_a.noconvert(),
        "Codes, one a byte, to words: each row one bit stream.");
  m.def("unpack_words", &unpack_words, "words"_a.noconvert(), "bits"_a, "codes"_a.noconvert(),
        "Words to codes, one a byte; undoes pack_words.");
  m.def("transpose", &transpose, "src"_a.noconvert(), "out"_a.noconvert(),
        "Rows to columns; elements of 8, 16 or 32 bits.");
  m.def("stream_columns", &stream_columns, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "out_bits"_a,
        "interleaved"_a, "is_signed"_a,
        "Rows of inputs, each one bit stream along the outputs, to rows of outputs; out_bits 0: codes, one a byte.");
  m.def("planar_columns", &planar_columns, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "out_bits"_a,
        "Bit planes down the rows (GPTQModel) to rows of outputs; out_bits 0: out holds codes, one a byte.");
  m.def("marlin_words", &marlin_words, "src"_a.noconvert(), "out"_a.noconvert(),
        "4-bit codes in Marlin's tiles to rows of outputs.");
  m.def("awq_gemv_fast_words", &awq_gemv_fast_words, "src"_a.noconvert(), "out"_a.noconvert(),
        "4-bit codes in the order of AutoAWQ's gemv_fast to rows of outputs.");
  m.def("stream_codes", &stream_codes, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "padded"_a,
        "Codes of rows that are bit streams, or with padded, as many codes as fit in the low bits of each word.");
  m.def("extract_bitfield", &extract_bitfield, "src"_a.noconvert(), "shift"_a, "bits"_a, "flip"_a,
        "out"_a.noconvert(), "first"_a, "step"_a,
        "Bits from shift on of each element, xor flip; row r of src becomes row first + r * step of out.");
  m.def("deinterleave_words", &deinterleave_words, "src"_a.noconvert(), "out"_a.noconvert(),
        "Words of 4-bit codes in AutoAWQ's order to words in order.");
}

}  // namespace requant::bindings
