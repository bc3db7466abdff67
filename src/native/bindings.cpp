// The Python face: checks every array, releases the GIL, calls a kernel.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;
using requant::Dtype;
using requant::kernels;

// Arrays of any dtype and rank: the checks below say more than nanobind's would.
template <class Array>
struct Unchecked : Array {
  Unchecked() = default;
  explicit Unchecked(const Array& array) : Array(array) {}
};
using In = Unchecked<nb::ndarray<nb::ro, nb::device::cpu>>;
using Out = Unchecked<nb::ndarray<nb::device::cpu>>;

// nanobind's own conversion, under a name in the stub that type checkers take.
template <class Array>
struct nanobind::detail::type_caster<Unchecked<Array>> {
  NB_TYPE_CASTER(Unchecked<Array>, const_name("numpy.typing.NDArray[typing.Any]"))

  template <class Flags>
  bool from_python(handle src, Flags flags, cleanup_list* cleanup) noexcept {
    make_caster<Array> array;
    if (!array.from_python(src, flags, cleanup)) return false;
    value = Unchecked<Array>(array.value);
    return true;
  }
};

namespace {

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string text(const std::vector<size_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); i++) out += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

template <class Array>
std::vector<size_t> shape_of(const Array& array) {
  std::vector<size_t> shape(array.ndim());
  for (size_t i = 0; i < shape.size(); i++) shape[i] = array.shape(i);
  return shape;
}

std::string text(nb::dlpack::dtype dtype) {
  const auto code = nb::dlpack::dtype_code(dtype.code);
  const char* kind = code == nb::dlpack::dtype_code::UInt    ? "uint"
                     : code == nb::dlpack::dtype_code::Int   ? "int"
                     : code == nb::dlpack::dtype_code::Float ? "float"
                                                             : "other";
  return kind + std::to_string(dtype.bits);
}

template <class Array>
void check_layout(const Array& array, const char* name, size_t bits) {
  const nb::dlpack::dtype dtype = array.dtype();
  if (dtype.code != uint8_t(nb::dlpack::dtype_code::UInt) || dtype.bits != bits || dtype.lanes != 1)
    fail(std::string(name) + ": expected uint" + std::to_string(bits) + ", got " + text(dtype));
  int64_t step = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != step && array.size() != 0)
      fail(std::string(name) + ": expected a C-contiguous array");
    step *= int64_t(array.shape(i));
  }
}

template <class Array>
void check_rank(const Array& array, const char* name, size_t rank) {
  if (array.ndim() != rank)
    fail(std::string(name) + ": expected " + std::to_string(rank) + " axes, got shape " + text(shape_of(array)));
}

template <class Array>
void check_shape(const Array& array, const char* name, size_t bits, size_t rows, size_t cols) {
  const std::vector<size_t> expected = {rows, cols};
  const std::vector<size_t> actual = shape_of(array);
  if (actual != expected) fail(std::string(name) + ": expected shape " + text(expected) + ", got " + text(actual));
  check_layout(array, name, bits);
}

Dtype dtype_of(const std::string& name) {
  if (name == "F32") return Dtype::F32;
  if (name == "F16") return Dtype::F16;
  if (name == "BF16") return Dtype::BF16;
  fail("dtype: expected F32, F16 or BF16, got " + name);
}

size_t bits_of(Dtype dtype) { return dtype == Dtype::F32 ? 32 : 16; }

int mx_bits(const std::string& mode) {
  if (mode == "mxfp4") return 4;
  if (mode == "mxfp8") return 8;
  fail("mode: expected mxfp4 or mxfp8, got " + mode);
}

void check_bits(int bits) {
  if (bits < 1 || bits > 8) fail("bits: expected 1 to 8, got " + std::to_string(bits));
}

void check_affine(int group_size, int bits) {
  check_bits(bits);
  if (bits == 7) fail("bits: expected 1, 2, 3, 4, 5, 6 or 8, got 7");
  if (group_size != 32 && group_size != 64 && group_size != 128)
    fail("group_size: expected 32, 64 or 128, got " + std::to_string(group_size));
}

void check_groups(const char* name, size_t cols, int group_size) {
  if (cols % group_size != 0)
    fail(std::string(name) + ": " + std::to_string(cols) + " columns are not a multiple of " +
         std::to_string(group_size));
}

struct Size {
  size_t rows, cols;
};

// Rows and columns of values behind (rows, words) and (rows, groups).
Size size_of(const In& scales, int group_size) {
  check_rank(scales, "scales", 2);
  return {scales.shape(0), scales.shape(1) * size_t(group_size)};
}

template <class Call>
auto run(Call call) {
  nb::gil_scoped_release released;
  requant::FloatState state;
  return call();
}

template <class T>
T* data(const Out& array) {
  return static_cast<T*>(array.data());
}

template <class T>
const T* data(const In& array) {
  return static_cast<const T*>(array.data());
}

// ---------------------------------------------------------------- kernels

void affine_quantize(In w, const std::string& dtype, int group_size, int bits, Out words, Out scales, Out biases) {
  check_affine(group_size, bits);
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, group_size);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  check_shape(scales, "scales", bits_of(t), rows, cols / group_size);
  check_shape(biases, "biases", bits_of(t), rows, cols / group_size);
  run([&] {
    kernels().affine_quantize(w.data(), t, rows, cols, group_size, bits, data<uint32_t>(words), scales.data(),
                              biases.data());
  });
}

void affine_dequantize(In words, In scales, const std::string& scales_dtype, In biases,
                       const std::string& biases_dtype, int group_size, int bits, Out out,
                       const std::string& out_dtype) {
  check_affine(group_size, bits);
  const Dtype s = dtype_of(scales_dtype), b = dtype_of(biases_dtype), o = dtype_of(out_dtype);
  const Size size = size_of(scales, group_size);
  check_layout(scales, "scales", bits_of(s));
  check_shape(words, "words", 32, size.rows, size.cols / 32 * bits);
  check_shape(biases, "biases", bits_of(b), size.rows, size.cols / group_size);
  check_shape(out, "out", bits_of(o), size.rows, size.cols);
  run([&] {
    kernels().affine_dequantize(data<uint32_t>(words), scales.data(), s, biases.data(), b, size.rows, size.cols,
                                group_size, bits, out.data(), o);
  });
}

size_t mx_quantize(In w, const std::string& dtype, const std::string& mode, Out words, Out scales) {
  const int bits = mx_bits(mode);
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  check_shape(scales, "scales", 8, rows, cols / 32);
  return run([&] {
    return kernels().mx_quantize(w.data(), t, rows, cols, bits, data<uint32_t>(words), data<uint8_t>(scales));
  });
}

void mx_dequantize(In words, In scales, const std::string& mode, Out out, const std::string& out_dtype) {
  const int bits = mx_bits(mode);
  const Dtype o = dtype_of(out_dtype);
  const Size size = size_of(scales, 32);
  check_layout(scales, "scales", 8);
  check_shape(words, "words", 32, size.rows, size.cols / 32 * bits);
  check_shape(out, "out", bits_of(o), size.rows, size.cols);
  run([&] {
    kernels().mx_dequantize(data<uint32_t>(words), data<uint8_t>(scales), size.rows, size.cols, bits, out.data(), o);
  });
}

void nvfp4_quantize(In w, const std::string& dtype, Out words, Out scales, std::optional<double> global_scale) {
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, 16);
  check_shape(words, "words", 32, rows, cols / 8);
  check_shape(scales, "scales", 8, rows, cols / 16);
  const float scale = float(global_scale.value_or(1.0));
  run([&] {
    kernels().nvfp4_quantize(w.data(), t, rows, cols, data<uint32_t>(words), data<uint8_t>(scales),
                             global_scale ? &scale : nullptr);
  });
}

void nvfp4_dequantize(In words, In scales, Out out, const std::string& out_dtype,
                      std::optional<double> global_scale) {
  const Dtype o = dtype_of(out_dtype);
  if (global_scale && o != Dtype::F32) fail("out: with a global scale the result is F32, got " + out_dtype);
  const Size size = size_of(scales, 16);
  check_layout(scales, "scales", 8);
  check_shape(words, "words", 32, size.rows, size.cols / 8);
  check_shape(out, "out", bits_of(o), size.rows, size.cols);
  const float scale = float(global_scale.value_or(1.0));
  run([&] {
    kernels().nvfp4_dequantize(data<uint32_t>(words), data<uint8_t>(scales), size.rows, size.cols,
                               global_scale ? &scale : nullptr, out.data(), o);
  });
}

// The column weights of a search: null, or one float32 a column.
const float* weights_of(const std::optional<In>& weights, size_t cols) {
  if (!weights) return nullptr;
  check_rank(*weights, "weights", 1);
  check_layout(*weights, "weights", 32);
  if (weights->shape(0) != cols)
    fail("weights: expected shape (" + std::to_string(cols) + ",), got " + text(shape_of(*weights)));
  return static_cast<const float*>(weights->data());
}

bool is_best(const std::string& level) {
  if (level != "fast" && level != "best") fail("level: expected fast or best, got " + level);
  return level == "best";
}

void affine_search(In w, const std::string& dtype, int group_size, int bits, const std::string& level,
                   std::optional<In> weights, Out words, Out scales, Out biases) {
  check_affine(group_size, bits);
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, group_size);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  check_shape(scales, "scales", bits_of(t), rows, cols / group_size);
  check_shape(biases, "biases", bits_of(t), rows, cols / group_size);
  const float* h = weights_of(weights, cols);
  const bool best = is_best(level);
  run([&] {
    kernels().affine_search(w.data(), t, rows, cols, group_size, bits, h, best, data<uint32_t>(words), scales.data(),
                            biases.data());
  });
}

void gptq_group(Out w, size_t start, int group_size, int bits, In scales, In biases, In propagation, Out codes,
                Out errors) {
  check_affine(group_size, bits);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1), group = size_t(group_size);
  check_layout(w, "w", 32);
  check_groups("w", cols, group_size);
  if (start % group != 0 || start >= cols) fail("start: " + std::to_string(start) + " begins no group");
  check_shape(scales, "scales", 32, rows, 1);
  check_shape(biases, "biases", 32, rows, 1);
  check_shape(propagation, "propagation", 32, cols, cols);
  check_shape(codes, "codes", 8, rows, group);
  check_shape(errors, "errors", 32, rows, group);
  run([&] {
    kernels().gptq_group(data<float>(w), rows, cols, start, group, bits, data<float>(scales), data<float>(biases),
                         data<float>(propagation), data<uint8_t>(codes), data<float>(errors));
  });
}

size_t mx_search(In w, const std::string& dtype, const std::string& mode, const std::string& level,
                 std::optional<In> weights, Out words, Out scales) {
  const int bits = mx_bits(mode);
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  check_shape(scales, "scales", 8, rows, cols / 32);
  const float* h = weights_of(weights, cols);
  const bool best = is_best(level);
  return run([&] {
    return kernels().mx_search(w.data(), t, rows, cols, bits, h, best, data<uint32_t>(words), data<uint8_t>(scales));
  });
}

void nvfp4_search(In w, const std::string& dtype, const std::string& level, std::optional<In> weights, Out words,
                  Out scales, std::optional<double> global_scale) {
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1);
  check_layout(w, "w", bits_of(t));
  check_groups("w", cols, 16);
  check_shape(words, "words", 32, rows, cols / 8);
  check_shape(scales, "scales", 8, rows, cols / 16);
  const float* h = weights_of(weights, cols);
  const bool best = is_best(level);
  const float scale = float(global_scale.value_or(1.0));
  run([&] {
    kernels().nvfp4_search(w.data(), t, rows, cols, h, best, data<uint32_t>(words), data<uint8_t>(scales),
                           global_scale ? &scale : nullptr);
  });
}

void pack_words(In codes, int bits, Out words) {
  check_bits(bits);
  check_rank(codes, "codes", 2);
  check_layout(codes, "codes", 8);
  const size_t rows = codes.shape(0), cols = codes.shape(1);
  check_groups("codes", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  run([&] { kernels().pack_words(data<uint8_t>(codes), rows, cols, bits, data<uint32_t>(words)); });
}

void unpack_words(In words, int bits, Out codes) {
  check_bits(bits);
  check_rank(codes, "codes", 2);
  check_layout(codes, "codes", 8);
  const size_t rows = codes.shape(0), cols = codes.shape(1);
  check_groups("codes", cols, 32);
  check_shape(words, "words", 32, rows, cols / 32 * bits);
  run([&] { kernels().unpack_words(data<uint32_t>(words), rows, cols, bits, data<uint8_t>(codes)); });
}

size_t cast(In src, const std::string& src_dtype, Out dst, const std::string& dst_dtype) {
  const Dtype s = dtype_of(src_dtype), d = dtype_of(dst_dtype);
  check_rank(src, "src", 1);
  check_rank(dst, "dst", 1);
  check_layout(src, "src", bits_of(s));
  check_layout(dst, "dst", bits_of(d));
  if (src.size() != dst.size())
    fail("dst: expected shape " + text(shape_of(src)) + ", got " + text(shape_of(dst)));
  return run([&] { return kernels().cast(src.data(), s, src.size(), dst.data(), d); });
}

size_t count_nonfinite(In w, const std::string& dtype) {
  const Dtype t = dtype_of(dtype);
  check_layout(w, "w", bits_of(t));
  return run([&] { return kernels().count_nonfinite(w.data(), t, w.size()); });
}

ptrdiff_t first_nonfinite(In w, const std::string& dtype) {
  const Dtype t = dtype_of(dtype);
  check_layout(w, "w", bits_of(t));
  return run([&] { return kernels().first_nonfinite(w.data(), t, w.size()); });
}

std::tuple<double, double> group_errors(In a, const std::string& a_dtype, In b, const std::string& b_dtype,
                                        int group_size, Out group_max) {
  const Dtype s = dtype_of(a_dtype), t = dtype_of(b_dtype);
  check_layout(a, "a", bits_of(s));
  check_layout(b, "b", bits_of(t));
  check_layout(group_max, "group_max", 32);
  if (shape_of(a) != shape_of(b)) fail("b: expected shape " + text(shape_of(a)) + ", got " + text(shape_of(b)));
  if (group_size != 16 && group_size != 32 && group_size != 64 && group_size != 128)
    fail("group_size: expected 16, 32, 64 or 128, got " + std::to_string(group_size));
  if (group_max.size() * size_t(group_size) != a.size())
    fail("group_max: expected one value a group of " + std::to_string(group_size) + ", got " +
         text(shape_of(group_max)));
  double out[2];
  run([&] {
    kernels().group_errors(a.data(), s, b.data(), t, a.size(), size_t(group_size),
                           static_cast<float*>(group_max.data()), out);
  });
  return {out[0], out[1]};
}

// ---------------------------------------------------------------- codes moved

void transpose(In src, Out out) {
  check_rank(src, "src", 2);
  const size_t bits = src.dtype().bits;
  if (bits != 8 && bits != 16 && bits != 32) fail("src: expected uint8, uint16 or uint32, got " + text(src.dtype()));
  check_layout(src, "src", bits);
  check_shape(out, "out", bits, src.shape(1), src.shape(0));
  run([&] { kernels().transpose(src.data(), bits / 8, src.shape(0), src.shape(1), out.data()); });
}

// Words of `bits`-bit codes along an axis; widths of packed rows are whole words.
size_t words_of(const char* name, size_t count, int bits) {
  if (count * size_t(bits) % 32 != 0)
    fail(std::string(name) + ": " + std::to_string(count) + " codes of " + std::to_string(bits) +
         " bits do not fill whole words");
  return count * size_t(bits) / 32;
}

void check_out_bits(int bits, int out_bits) {
  check_bits(bits);
  if (out_bits < bits || out_bits > 8)
    fail("out_bits: expected " + std::to_string(bits) + " to 8, got " + std::to_string(out_bits));
}

// What columns of codes become: words of out_bits, or bytes where out_bits is 0.
int check_rows(In src, int bits, const Out& out, int out_bits) {
  const bool bytes = out_bits == 0;
  const int wide = bytes ? 8 : out_bits;
  check_out_bits(bits, wide);
  check_rank(src, "src", 2);
  check_rank(out, "out", 2);
  const size_t n_in = src.shape(0), n_out = out.shape(0);
  check_groups("out", n_out, 8);
  check_shape(src, "src", 32, n_in, words_of("src", n_out, bits));
  if (bytes) {
    check_shape(out, "out", 8, n_out, n_in);
  } else {
    check_groups("src", n_in, 8);
    check_shape(out, "out", 32, n_out, words_of("out", n_in, wide));
  }
  return wide;
}

void stream_columns(In src, int bits, Out out, int out_bits, bool interleaved, bool is_signed) {
  const int wide = check_rows(src, bits, out, out_bits);
  run([&] {
    kernels().stream_columns(data<uint32_t>(src), src.shape(0), out.shape(0), bits, interleaved, is_signed, out.data(),
                             wide);
  });
}

void planar_columns(In src, int bits, Out out, int out_bits) {
  if (bits < 2) fail("bits: expected 2 to 8, got " + std::to_string(bits));
  const bool bytes = out_bits == 0;
  const int wide = bytes ? 8 : out_bits;
  check_out_bits(bits, wide);
  check_rank(src, "src", 2);
  check_rank(out, "out", 2);
  if (src.shape(0) % size_t(bits) != 0)
    fail("src: " + std::to_string(src.shape(0)) + " rows are not a multiple of the " + std::to_string(bits) +
         " words of a block");
  const size_t n_in = src.shape(0) / size_t(bits) * 32, n_out = src.shape(1);
  check_layout(src, "src", 32);
  check_shape(out, "out", bytes ? 8 : 32, n_out, bytes ? n_in : n_in / 32 * size_t(wide));
  run([&] { kernels().planar_columns(data<uint32_t>(src), n_in, n_out, bits, out.data(), wide); });
}

void marlin_words(In src, Out out) {
  check_rank(src, "src", 2);
  if (src.shape(1) % 128 != 0)
    fail("src: " + std::to_string(src.shape(1)) + " columns are not a multiple of the 128 words of a tile");
  const size_t n_in = src.shape(0) * 16, n_out = src.shape(1) / 2;
  check_layout(src, "src", 32);
  check_shape(out, "out", 32, n_out, n_in / 8);
  run([&] { kernels().marlin_words(data<uint32_t>(src), n_in, n_out, data<uint32_t>(out)); });
}

void awq_gemv_fast_words(In src, Out out) {
  check_rank(src, "src", 2);
  check_layout(src, "src", 16);
  check_groups("src", src.shape(1), 64);
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
    fail("src: " + std::to_string(words) + " words of a row hold " + std::to_string(held) + " codes, expected " +
         std::to_string(count));
  run([&] {
    kernels().stream_codes(data<uint32_t>(src), rows, words, bits, per_word, count, data<uint8_t>(out));
  });
}

void extract_bitfield(In src, int shift, int bits, int flip, Out out, size_t first, size_t step) {
  check_bits(bits);
  check_rank(src, "src", 2);
  const size_t item = src.dtype().bits;
  if (item != 8 && item != 32) fail("src: expected uint8 or uint32, got " + text(src.dtype()));
  check_layout(src, "src", item);
  if (shift < 0 || size_t(shift + bits) > item)
    fail("shift: " + std::to_string(bits) + " bits from bit " + std::to_string(shift) + " on do not lie in " +
         std::to_string(item));
  if (flip < 0 || flip >= 1 << bits) fail("flip: expected less than 2^bits, got " + std::to_string(flip));
  check_rank(out, "out", 2);
  check_shape(out, "out", 8, out.shape(0), src.shape(1));
  const size_t rows = src.shape(0);
  if (step == 0 || (rows > 0 && (first >= out.shape(0) || (out.shape(0) - 1 - first) / step < rows - 1)))
    fail("out: " + std::to_string(rows) + " rows from " + std::to_string(first) + " in steps of " +
         std::to_string(step) + " lie beyond shape " + text(shape_of(out)));
  run([&] {
    kernels().extract_bitfield(src.data(), item / 8, rows, src.shape(1), shift, bits, uint8_t(flip), data<uint8_t>(out),
                          first, step);
  });
}

void deinterleave_words(In src, Out out) {
  check_rank(src, "src", 2);
  check_layout(src, "src", 32);
  check_shape(out, "out", 32, src.shape(0), src.shape(1));
  run([&] { kernels().deinterleave_words(data<uint32_t>(src), src.size(), data<uint32_t>(out)); });
}

// ---------------------------------------------------------------- values computed

size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0 ? 1 : 0); }

size_t check_positive(const char* name, ptrdiff_t value) {
  if (value < 1) fail(std::string(name) + ": expected 1 or more, got " + std::to_string(value));
  return size_t(value);
}

void integer_values(In codes, In scales, In zeros, ptrdiff_t group, Out out, const std::string& out_dtype,
                    const std::string& difference) {
  const size_t size = check_positive("group", group);
  const Dtype o = dtype_of(out_dtype), d = dtype_of(difference);
  check_rank(codes, "codes", 2);
  check_layout(codes, "codes", 8);
  const size_t rows = codes.shape(0), cols = codes.shape(1);
  check_shape(scales, "scales", 32, rows, ceil_div(cols, size));
  check_shape(zeros, "zeros", 32, rows, ceil_div(cols, size));
  check_shape(out, "out", bits_of(o), rows, cols);
  run([&] {
    kernels().integer_values(data<uint8_t>(codes), data<float>(scales), data<float>(zeros), rows, cols, size, d,
                             out.data(), o);
  });
}

size_t float8_values(In bytes, In scales, ptrdiff_t block_rows, ptrdiff_t block_cols, ptrdiff_t first_row, Out out,
                     const std::string& out_dtype, bool fnuz) {
  const size_t high = check_positive("block_rows", block_rows), broad = check_positive("block_cols", block_cols);
  const Dtype o = dtype_of(out_dtype);
  check_rank(bytes, "bytes", 2);
  check_layout(bytes, "bytes", 8);
  check_rank(scales, "scales", 2);
  if (first_row < 0) fail("first_row: expected 0 or more, got " + std::to_string(first_row));
  const size_t rows = bytes.shape(0), cols = bytes.shape(1), first = size_t(first_row);
  if (rows > 0 && scales.shape(0) <= (first + rows - 1) / high)
    fail("scales: row " + std::to_string(first + rows - 1) + " in blocks of " + std::to_string(high) +
         " lies beyond shape " + text(shape_of(scales)));
  check_shape(scales, "scales", 32, scales.shape(0), ceil_div(cols, broad));
  check_shape(out, "out", bits_of(o), rows, cols);
  return run([&] {
    return kernels().float8_values(data<uint8_t>(bytes), fnuz, data<float>(scales), rows, cols, scales.shape(1), high,
                                   broad, first, out.data(), o);
  });
}

void lut_values(In bytes, In codebook, In absmax, ptrdiff_t block, ptrdiff_t first, bool high_first, Out out,
                const std::string& out_dtype) {
  const size_t size = check_positive("block", block);
  if (size % 2 != 0 || first % 2 != 0) fail("block, first: expected even numbers");
  if (first < 0 || size_t(first) >= size) fail("first: expected 0 to block - 1, got " + std::to_string(first));
  const Dtype o = dtype_of(out_dtype);
  check_rank(bytes, "bytes", 1);
  check_layout(bytes, "bytes", 8);
  check_rank(codebook, "codebook", 1);
  check_layout(codebook, "codebook", 32);
  if (codebook.size() != 16) fail("codebook: expected 16 values, got " + std::to_string(codebook.size()));
  check_rank(absmax, "absmax", 1);
  check_layout(absmax, "absmax", 32);
  check_rank(out, "out", 1);
  check_layout(out, "out", bits_of(o));
  const size_t count = 2 * bytes.size();
  if (out.size() != count)
    fail("out: expected shape " + text(std::vector<size_t>{count}) + ", got " + text(shape_of(out)));
  if (absmax.size() < ceil_div(size_t(first) + count, size))
    fail("absmax: " + std::to_string(count) + " values from number " + std::to_string(first) + " of a block of " +
         std::to_string(size) + " on need " + std::to_string(ceil_div(size_t(first) + count, size)) + ", got " +
         std::to_string(absmax.size()));
  run([&] {
    kernels().lut_values(data<uint8_t>(bytes), count, high_first, data<float>(codebook), data<float>(absmax), size,
                         size_t(first), out.data(), o);
  });
}

// ---------------------------------------------------------------- GGUF blocks

// The type, once the blocks' shape (rows, bytes) fits it.
requant::GgufBlock check_blocks(int type, const In& blocks) {
  requant::GgufBlock found;
  if (!kernels().gguf_block(type, found)) fail("type: no block type of GGUF has number " + std::to_string(type));
  check_rank(blocks, "blocks", 2);
  check_layout(blocks, "blocks", 8);
  if (blocks.shape(1) % size_t(found.bytes) != 0)
    fail("blocks: " + std::to_string(blocks.shape(1)) + " bytes of a row are not a multiple of the " +
         std::to_string(found.bytes) + " of a block");
  return found;
}

std::optional<std::tuple<int, int, int, int, bool>> gguf_block(int type) {
  requant::GgufBlock b;
  if (!kernels().gguf_block(type, b)) return std::nullopt;
  return std::make_tuple(b.elements, b.bytes, b.bits, b.group, b.fp4);
}

void gguf_affine(int type, In blocks, Out words, Out scales, Out biases, const std::string& dtype) {
  const requant::GgufBlock b = check_blocks(type, blocks);
  if (b.bits == 0) fail("type: no affine codes of MLX hold number " + std::to_string(type));
  const Dtype d = dtype_of(dtype);
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes), cols = count * size_t(b.elements);
  check_shape(words, "words", 32, rows, cols / 32 * size_t(b.bits));
  check_shape(scales, "scales", bits_of(d), rows, cols / size_t(b.group));
  check_shape(biases, "biases", bits_of(d), rows, cols / size_t(b.group));
  run([&] {
    kernels().gguf_affine(type, data<uint8_t>(blocks), rows * count, data<uint32_t>(words), scales.data(),
                          biases.data(), d);
  });
}

void gguf_fp4(int type, In blocks, Out words, Out scales) {
  const requant::GgufBlock b = check_blocks(type, blocks);
  if (!b.fp4) fail("type: no float mode of MLX holds number " + std::to_string(type));
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes), cols = count * size_t(b.elements);
  check_shape(words, "words", 32, rows, cols / 8);
  check_shape(scales, "scales", 8, rows, count * size_t(b.scale_bytes));
  run([&] {
    kernels().gguf_fp4(type, data<uint8_t>(blocks), rows * count, data<uint32_t>(words), data<uint8_t>(scales));
  });
}

void gguf_values(int type, In blocks, Out out, const std::string& dtype) {
  const requant::GgufBlock b = check_blocks(type, blocks);
  const Dtype d = dtype_of(dtype);
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes);
  check_shape(out, "out", bits_of(d), rows, count * size_t(b.elements));
  run([&] { kernels().gguf_values(type, data<uint8_t>(blocks), rows * count, out.data(), d); });
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const requant::Kernels* const* k = requant::available_kernels(); *k != nullptr; k++)
    names.emplace_back((*k)->name);
  return names;
}

void set_isa(const std::string& name) {
  if (requant::use_kernels(name.c_str())) return;
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  fail("isa: expected one of " + known + ", got " + name);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() =
      "Kernels of requant.\n\n"
      "Arrays are C-contiguous and outputs are allocated by the caller. Floats are passed\n"
      "as bits, uint16 or uint32, with a dtype name: \"F32\", \"F16\" or \"BF16\".";

  m.def("affine_quantize", &affine_quantize, "w"_a.noconvert(), "dtype"_a, "group_size"_a, "bits"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert());
  m.def("affine_dequantize", &affine_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "scales_dtype"_a,
        "biases"_a.noconvert(), "biases_dtype"_a, "group_size"_a, "bits"_a, "out"_a.noconvert(), "out_dtype"_a);
  m.def("mx_quantize", &mx_quantize, "w"_a.noconvert(), "dtype"_a, "mode"_a, "words"_a.noconvert(),
        "scales"_a.noconvert(), "Returns the number of groups flushed to zero: too small for an E8M0 scale.");
  m.def("mx_dequantize", &mx_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "mode"_a,
        "out"_a.noconvert(), "out_dtype"_a);
  m.def("nvfp4_quantize", &nvfp4_quantize, "w"_a.noconvert(), "dtype"_a, "words"_a.noconvert(),
        "scales"_a.noconvert(), "global_scale"_a = nb::none());
  m.def("nvfp4_dequantize", &nvfp4_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "out"_a.noconvert(),
        "out_dtype"_a, "global_scale"_a = nb::none());
  m.def("affine_search", &affine_search, "w"_a.noconvert(), "dtype"_a, "group_size"_a, "bits"_a, "level"_a,
        "weights"_a.noconvert().none(), "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert(),
        "As affine_quantize, with scales and biases searched for; weights: float32 bits, one a column, or None.");
  m.def("gptq_group", &gptq_group, "w"_a.noconvert(), "start"_a, "group_size"_a, "bits"_a, "scales"_a.noconvert(),
        "biases"_a.noconvert(), "propagation"_a.noconvert(), "codes"_a.noconvert(), "errors"_a.noconvert(),
        "Codes of a group's columns one by one; each one's error is handed on to the later columns of w, in place.");
  m.def("mx_search", &mx_search, "w"_a.noconvert(), "dtype"_a, "mode"_a, "level"_a, "weights"_a.noconvert().none(),
        "words"_a.noconvert(), "scales"_a.noconvert(), "Returns what mx_quantize does.");
  m.def("nvfp4_search", &nvfp4_search, "w"_a.noconvert(), "dtype"_a, "level"_a, "weights"_a.noconvert().none(),
        "words"_a.noconvert(), "scales"_a.noconvert(), "global_scale"_a = nb::none());
  m.def("pack_words", &pack_words, "codes"_a.noconvert(), "bits"_a, "words"_a.noconvert());
  m.def("unpack_words", &unpack_words, "words"_a.noconvert(), "bits"_a, "codes"_a.noconvert());
  m.def("cast", &cast, "src"_a.noconvert(), "src_dtype"_a, "dst"_a.noconvert(), "dst_dtype"_a,
        "Rounds to nearest even; returns the number of finite values that became infinite.");
  m.def("count_nonfinite", &count_nonfinite, "w"_a.noconvert(), "dtype"_a);
  m.def("first_nonfinite", &first_nonfinite, "w"_a.noconvert(), "dtype"_a, "Flat index, or -1.");
  m.def("group_errors", &group_errors, "a"_a.noconvert(), "a_dtype"_a, "b"_a.noconvert(), "b_dtype"_a, "group_size"_a,
        "group_max"_a.noconvert(),
        "Writes the largest |a - b| of each group (float32 bits); returns the sums of (a - b)^2 and of a^2.");

  m.def("transpose", &transpose, "src"_a.noconvert(), "out"_a.noconvert());
  m.def("stream_columns", &stream_columns, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "out_bits"_a,
        "interleaved"_a, "is_signed"_a, "out_bits 0: out holds codes, one a byte.");
  m.def("planar_columns", &planar_columns, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "out_bits"_a,
        "out_bits 0: out holds codes, one a byte.");
  m.def("marlin_words", &marlin_words, "src"_a.noconvert(), "out"_a.noconvert());
  m.def("awq_gemv_fast_words", &awq_gemv_fast_words, "src"_a.noconvert(), "out"_a.noconvert());
  m.def("stream_codes", &stream_codes, "src"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "padded"_a);
  m.def("extract_bitfield", &extract_bitfield, "src"_a.noconvert(), "shift"_a, "bits"_a, "flip"_a, "out"_a.noconvert(),
        "first"_a, "step"_a, "Row r of src becomes row first + r * step of out.");
  m.def("deinterleave_words", &deinterleave_words, "src"_a.noconvert(), "out"_a.noconvert());
  m.def("integer_values", &integer_values, "codes"_a.noconvert(), "scales"_a.noconvert(), "zeros"_a.noconvert(),
        "group"_a, "out"_a.noconvert(), "out_dtype"_a, "difference"_a);
  m.def("float8_values", &float8_values, "bytes"_a.noconvert(), "scales"_a.noconvert(), "block_rows"_a,
        "block_cols"_a, "first_row"_a, "out"_a.noconvert(), "out_dtype"_a, "fnuz"_a,
        "Returns the number of NaN bytes.");
  m.def("lut_values", &lut_values, "bytes"_a.noconvert(), "codebook"_a.noconvert(), "absmax"_a.noconvert(), "block"_a,
        "first"_a, "high_first"_a, "out"_a.noconvert(), "out_dtype"_a);

  m.def("gguf_block", &gguf_block, "type"_a,
        "Values and bytes of a block, bits and group size of the affine codes that hold it (bits 0:\n"
        "none), and whether a float mode of MLX does; None for a number without blocks.");
  m.def("gguf_affine", &gguf_affine, "type"_a, "blocks"_a.noconvert(), "words"_a.noconvert(), "scales"_a.noconvert(),
        "biases"_a.noconvert(), "dtype"_a);
  m.def("gguf_fp4", &gguf_fp4, "type"_a, "blocks"_a.noconvert(), "words"_a.noconvert(), "scales"_a.noconvert());
  m.def("gguf_values", &gguf_values, "type"_a, "blocks"_a.noconvert(), "out"_a.noconvert(), "dtype"_a);

  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", &set_isa, "name"_a);
  m.def("available_isas", &available_isas);
}
