// The modes of mx.quantize, and the error of their codes.

#include <nanobind/stl/optional.h>

#include "checks.h"

namespace requant::bindings {

namespace {

// A matrix, its target and the arrays of its codes, checked.
struct Measured {
  Target target;
  MatrixInfo info;

  template <class Array>
  Measured(const In& w, const std::string& dtype, const std::string& mode, int group_size, int bits,
           const Array& words, const Array& scales, const std::optional<Array>& biases)
      : target(target_of(mode, group_size, bits)), info(check_values(w, dtype, target.group_size)) {
    const bool affine = target.mode == Mode::Affine;
    if (affine != biases.has_value())
      throw_value_error(std::string("biases: expected ") + (affine ? "an array" : "None") + " for mode " + mode);
    check_words(words, info, target.group_size, target.bits);
    const size_t scale_bits = affine ? bits_of(info.dtype) : 8;
    check_group_array(scales, "scales", scale_bits, info, target.group_size);
    if (affine) check_group_array(*biases, "biases", scale_bits, info, target.group_size);
  }
};

void quantize_measured(In w, const std::string& dtype, const std::string& mode, int group_size, int bits,
                       Out words, Out scales, std::optional<Out> biases, EncodingError& error) {
  const Measured m(w, dtype, mode, group_size, bits, words, scales, biases);
  const Encoded out = {data<uint32_t>(words), scales.data(), biases ? biases->data() : nullptr};
  run([&] { kernels().quantize_measured(matrix(w, m.info), m.target, out, error); });
}

void measure(In w, const std::string& dtype, const std::string& mode, int group_size, int bits, In words, In scales,
             std::optional<In> biases, EncodingError& error) {
  const Measured m(w, dtype, mode, group_size, bits, words, scales, biases);
  const ConstEncoded codes = {data<uint32_t>(words), scales.data(), biases ? biases->data() : nullptr};
  run([&] { kernels().measure(matrix(w, m.info), m.target, codes, error); });
}

double total(const EncodingError& error, int which) {
  double out[2];
  kernels().total_errors(error.sums, out);
  return out[which];
}

}  // namespace

void init_measure(nb::module_& m) {
  nb::class_<EncodingError>(m, "EncodingError", "What was found while rows were encoded; each call adds to it.")
      .def("__init__", [](EncodingError* self) { new (self) EncodingError{}; })
      .def_prop_ro("squared_error", [](const EncodingError& e) { return total(e, 0); })
      .def_prop_ro("squared_values", [](const EncodingError& e) { return total(e, 1); })
      .def_prop_ro("max_error_steps", [](const EncodingError& e) { return double(e.max_steps); })
      .def_prop_ro("nonfinite", [](const EncodingError& e) { return e.nonfinite; })
      .def_prop_ro("first_nonfinite", [](const EncodingError& e) { return e.first_nonfinite; },
                   "Number of the first value that is NaN or infinite, among all so far, if nonfinite is not 0.")
      .def_prop_ro("flushed_groups", [](const EncodingError& e) { return e.flushed; });
  m.def("quantize_measured", &quantize_measured, "w"_a.noconvert(), "dtype"_a, "mode"_a, "group_size"_a, "bits"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert().none(), "error"_a,
        "Quantizes as the kernel of the mode does, and adds the error of the codes.");
  m.def("measure", &measure, "w"_a.noconvert(), "dtype"_a, "mode"_a, "group_size"_a, "bits"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert().none(), "error"_a,
        "Adds the error of codes that exist.");
}

}  // namespace requant::bindings
