// What the bindings share: arrays as arguments, the checks of their shapes and dtypes, and the
// call of a kernel without the GIL.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels.h"

namespace requant::bindings {

namespace nb = nanobind;
using namespace nb::literals;

// Arrays of any dtype and rank: the checks below say more than nanobind's would.
template <class Array>
struct Unchecked : Array {
  Unchecked() = default;
  explicit Unchecked(const Array& array) : Array(array) {}
};
using In = Unchecked<nb::ndarray<nb::ro, nb::device::cpu>>;
using Out = Unchecked<nb::ndarray<nb::device::cpu>>;

}  // namespace requant::bindings

// nanobind's own conversion, under a name in the stub that type checkers take.
template <class Array>
struct nanobind::detail::type_caster<requant::bindings::Unchecked<Array>> {
  NB_TYPE_CASTER(requant::bindings::Unchecked<Array>, const_name("numpy.typing.NDArray[typing.Any]"))

  template <class Flags>
  bool from_python(handle src, Flags flags, cleanup_list* cleanup) noexcept {
    make_caster<Array> array;
    if (!array.from_python(src, flags, cleanup)) return false;
    value = requant::bindings::Unchecked<Array>(array.value);
    return true;
  }
};

namespace requant::bindings {

// ---------------------------------------------------------------- messages

[[noreturn]] inline void throw_value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

inline std::string to_string(const std::vector<size_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); i++) out += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

inline std::string to_string(nb::dlpack::dtype dtype) {
  const auto code = nb::dlpack::dtype_code(dtype.code);
  const char* kind = code == nb::dlpack::dtype_code::UInt    ? "uint"
                     : code == nb::dlpack::dtype_code::Int   ? "int"
                     : code == nb::dlpack::dtype_code::Float ? "float"
                                                             : "other";
  return kind + std::to_string(dtype.bits);
}

template <class Array>
std::vector<size_t> shape_of(const Array& array) {
  std::vector<size_t> shape(array.ndim());
  for (size_t i = 0; i < shape.size(); i++) shape[i] = array.shape(i);
  return shape;
}

// ---------------------------------------------------------------- one array

// Unsigned integers of so many bits, C-contiguous.
template <class Array>
void check_layout(const Array& array, const char* name, size_t bits) {
  const nb::dlpack::dtype dtype = array.dtype();
  if (dtype.code != uint8_t(nb::dlpack::dtype_code::UInt) || dtype.bits != bits || dtype.lanes != 1)
    throw_value_error(std::string(name) + ": expected uint" + std::to_string(bits) + ", got " + to_string(dtype));
  int64_t step = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != step && array.size() != 0)
      throw_value_error(std::string(name) + ": expected a C-contiguous array");
    step *= int64_t(array.shape(i));
  }
}

template <class Array>
void check_rank(const Array& array, const char* name, size_t rank) {
  if (array.ndim() != rank)
    throw_value_error(std::string(name) + ": expected " + std::to_string(rank) + " axes, got shape " +
                      to_string(shape_of(array)));
}

template <class Array>
void check_shape(const Array& array, const char* name, size_t bits, size_t rows, size_t cols) {
  const std::vector<size_t> expected = {rows, cols};
  const std::vector<size_t> actual = shape_of(array);
  if (actual != expected)
    throw_value_error(std::string(name) + ": expected shape " + to_string(expected) + ", got " + to_string(actual));
  check_layout(array, name, bits);
}

inline void check_multiple(const char* name, size_t cols, int group_size) {
  if (cols % size_t(group_size) != 0)
    throw_value_error(std::string(name) + ": " + std::to_string(cols) + " columns are not a multiple of " +
                      std::to_string(group_size));
}

template <class T>
T* data(const Out& array) {
  return static_cast<T*>(array.data());
}

template <class T>
const T* data(const In& array) {
  return static_cast<const T*>(array.data());
}

// ---------------------------------------------------------------- options

inline Dtype dtype_of(const std::string& name) {
  if (name == "F32") return Dtype::F32;
  if (name == "F16") return Dtype::F16;
  if (name == "BF16") return Dtype::BF16;
  throw_value_error("dtype: expected F32, F16 or BF16, got " + name);
}

inline size_t bits_of(Dtype dtype) { return dtype == Dtype::F32 ? 32 : 16; }

inline void check_bits(int bits) {
  if (bits < 1 || bits > 8) throw_value_error("bits: expected 1 to 8, got " + std::to_string(bits));
}

inline void check_affine(int group_size, int bits) {
  check_bits(bits);
  if (bits == 7) throw_value_error("bits: expected 1, 2, 3, 4, 5, 6 or 8, got 7");
  if (group_size != 32 && group_size != 64 && group_size != 128)
    throw_value_error("group_size: expected 32, 64 or 128, got " + std::to_string(group_size));
}

constexpr int kMxGroup = 32, kNvfp4Group = 16, kNvfp4Bits = 4;

inline int mx_bits(const std::string& mode) {
  if (mode == "mxfp4") return 4;
  if (mode == "mxfp8") return 8;
  throw_value_error("mode: expected mxfp4 or mxfp8, got " + mode);
}

inline Target target_of(const std::string& mode, int group_size, int bits) {
  if (mode == "affine") {
    check_affine(group_size, bits);
    return {Mode::Affine, group_size, bits};
  }
  const bool nvfp4 = mode == "nvfp4";
  const Target target{nvfp4 ? Mode::Nvfp4 : Mode::Mx, nvfp4 ? kNvfp4Group : kMxGroup,
                      nvfp4 ? kNvfp4Bits : mx_bits(mode)};
  if (group_size != target.group_size || bits != target.bits)
    throw_value_error(mode + ": expected group_size " + std::to_string(target.group_size) + " and bits " +
                      std::to_string(target.bits) + ", got " + std::to_string(group_size) + " and " +
                      std::to_string(bits));
  return target;
}

// A global scale as the kernels take it: a pointer to one float, or null.
class GlobalScale {
 public:
  explicit GlobalScale(const std::optional<double>& value)
      : is_given_(value.has_value()), value_(float(value.value_or(1.0))) {}
  const float* get() const { return is_given_ ? &value_ : nullptr; }

 private:
  bool is_given_;
  float value_;
};

// ---------------------------------------------------------------- a matrix and its quantized form

// Shape and dtype of a matrix, or of the values of a quantized one.
struct MatrixInfo {
  size_t rows, cols;
  Dtype dtype;
};

// A matrix to be quantized: its columns fill groups.
inline MatrixInfo check_values(const In& w, const std::string& dtype, int group_size) {
  const Dtype t = dtype_of(dtype);
  check_rank(w, "w", 2);
  check_layout(w, "w", bits_of(t));
  check_multiple("w", w.shape(1), group_size);
  return {w.shape(0), w.shape(1), t};
}

// A matrix to be dequantized, by its scales; dtype is that of the result.
inline MatrixInfo check_scales(const In& scales, size_t scale_bits, int group_size, Dtype dtype) {
  check_rank(scales, "scales", 2);
  check_layout(scales, "scales", scale_bits);
  return {scales.shape(0), scales.shape(1) * size_t(group_size), dtype};
}

template <class Array>
void check_words(const Array& words, const MatrixInfo& values, int group_size, int bits) {
  check_shape(words, "words", 32, values.rows, values.cols / size_t(group_size) * size_t(group_size * bits / 32));
}

// An array with one element a group.
template <class Array>
void check_group_array(const Array& array, const char* name, size_t bits, const MatrixInfo& values, int group_size) {
  check_shape(array, name, bits, values.rows, values.cols / size_t(group_size));
}

// ---------------------------------------------------------------- kernels' arguments

inline ConstMatrix matrix(const In& w, const MatrixInfo& info) { return {w.data(), info.dtype, info.rows, info.cols}; }

inline Matrix matrix(const Out& out, const MatrixInfo& info) { return {out.data(), info.dtype, info.rows, info.cols}; }

inline FloatTensors float_tensors(const Out& words, const Out& scales) {
  return {data<uint32_t>(words), data<uint8_t>(scales)};
}

inline ConstFloatTensors float_tensors(const In& words, const In& scales) {
  return {data<uint32_t>(words), data<uint8_t>(scales)};
}

inline AffineTensors affine_tensors(const Out& words, const Out& scales, const Out& biases) {
  return {data<uint32_t>(words), scales.data(), biases.data()};
}

// ---------------------------------------------------------------- kernels

template <class Call>
auto run(Call call) {
  nb::gil_scoped_release released;
  FloatState state;
  return call();
}

}  // namespace requant::bindings
