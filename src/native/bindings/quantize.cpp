// The modes of mx.quantize and mx.dequantize.

#include <nanobind/stl/optional.h>

#include "checks.h"

namespace requant::bindings {

namespace {

void affine_quantize(In w, const std::string& dtype, int group_size, int bits, Out words, Out scales, Out biases) {
  check_affine(group_size, bits);
  const MatrixInfo v = check_values(w, dtype, group_size);
  check_words(words, v, group_size, bits);
  check_group_array(scales, "scales", bits_of(v.dtype), v, group_size);
  check_group_array(biases, "biases", bits_of(v.dtype), v, group_size);
  run([&] {
    kernels().affine_quantize(matrix(w, v), {group_size, bits}, affine_tensors(words, scales, biases));
  });
}

void affine_dequantize(In words, In scales, const std::string& scales_dtype, In biases,
                       const std::string& biases_dtype, int group_size, int bits, Out out,
                       const std::string& out_dtype) {
  check_affine(group_size, bits);
  const Dtype s = dtype_of(scales_dtype), b = dtype_of(biases_dtype), o = dtype_of(out_dtype);
  const MatrixInfo v = check_scales(scales, bits_of(s), group_size, o);
  check_words(words, v, group_size, bits);
  check_group_array(biases, "biases", bits_of(b), v, group_size);
  check_shape(out, "out", bits_of(o), v.rows, v.cols);
  run([&] {
    kernels().affine_dequantize({data<uint32_t>(words), {scales.data(), s}, {biases.data(), b}}, {group_size, bits},
                                matrix(out, v));
  });
}

size_t mx_quantize(In w, const std::string& dtype, const std::string& mode, Out words, Out scales) {
  const int bits = mx_bits(mode);
  const MatrixInfo v = check_values(w, dtype, kMxGroup);
  check_words(words, v, kMxGroup, bits);
  check_group_array(scales, "scales", 8, v, kMxGroup);
  return run([&] { return kernels().mx_quantize(matrix(w, v), bits, float_tensors(words, scales)); });
}

void mx_dequantize(In words, In scales, const std::string& mode, Out out, const std::string& out_dtype) {
  const int bits = mx_bits(mode);
  const MatrixInfo v = check_scales(scales, 8, kMxGroup, dtype_of(out_dtype));
  check_words(words, v, kMxGroup, bits);
  check_shape(out, "out", bits_of(v.dtype), v.rows, v.cols);
  run([&] { kernels().mx_dequantize(float_tensors(words, scales), bits, matrix(out, v)); });
}

void nvfp4_quantize(In w, const std::string& dtype, Out words, Out scales, std::optional<double> global_scale) {
  const MatrixInfo v = check_values(w, dtype, kNvfp4Group);
  check_words(words, v, kNvfp4Group, kNvfp4Bits);
  check_group_array(scales, "scales", 8, v, kNvfp4Group);
  const GlobalScale global(global_scale);
  run([&] { kernels().nvfp4_quantize(matrix(w, v), global.get(), float_tensors(words, scales)); });
}

void nvfp4_dequantize(In words, In scales, Out out, const std::string& out_dtype,
                      std::optional<double> global_scale) {
  const Dtype o = dtype_of(out_dtype);
  if (global_scale && o != Dtype::F32)
    throw_value_error("out: with a global scale the result is F32, got " + out_dtype);
  const MatrixInfo v = check_scales(scales, 8, kNvfp4Group, o);
  check_words(words, v, kNvfp4Group, kNvfp4Bits);
  check_shape(out, "out", bits_of(o), v.rows, v.cols);
  const GlobalScale global(global_scale);
  run([&] { kernels().nvfp4_dequantize(float_tensors(words, scales), global.get(), matrix(out, v)); });
}

}  // namespace

void init_quantize(nb::module_& m) {
  m.def("affine_quantize", &affine_quantize, "w"_a.noconvert(), "dtype"_a, "group_size"_a, "bits"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert(),
        "Quantizes to mode affine: a scale and a bias of the dtype of w for each group.");
  m.def("affine_dequantize", &affine_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "scales_dtype"_a,
        "biases"_a.noconvert(), "biases_dtype"_a, "group_size"_a, "bits"_a, "out"_a.noconvert(), "out_dtype"_a,
        "Values of mode affine; scales and biases may differ in dtype.");
  m.def("mx_quantize", &mx_quantize, "w"_a.noconvert(), "dtype"_a, "mode"_a, "words"_a.noconvert(),
        "scales"_a.noconvert(),
        "Quantizes to mxfp4 or mxfp8; returns the number of groups flushed to zero: too small for an E8M0 scale.");
  m.def("mx_dequantize", &mx_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "mode"_a,
        "out"_a.noconvert(), "out_dtype"_a, "Values of mxfp4 or mxfp8.");
  m.def("nvfp4_quantize", &nvfp4_quantize, "w"_a.noconvert(), "dtype"_a, "words"_a.noconvert(),
        "scales"_a.noconvert(), "global_scale"_a = nb::none(),
        "Quantizes to nvfp4, with a global scale of the tensor or without.");
  m.def("nvfp4_dequantize", &nvfp4_dequantize, "words"_a.noconvert(), "scales"_a.noconvert(), "out"_a.noconvert(),
        "out_dtype"_a, "global_scale"_a = nb::none(), "Values of nvfp4; F32 where there is a global scale.");
}

}  // namespace requant::bindings
