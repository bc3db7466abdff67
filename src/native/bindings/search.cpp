// The same modes with scales found by search.

#include <nanobind/stl/optional.h>

#include "checks.h"

namespace requant::bindings {

namespace {

Search check_search(const std::string& level, const std::optional<In>& weights, size_t cols) {
  if (weights) {
    check_rank(*weights, "weights", 1);
    check_layout(*weights, "weights", 32);
    if (weights->shape(0) != cols)
      throw_value_error("weights: expected shape (" + std::to_string(cols) + ",), got " +
                        to_string(shape_of(*weights)));
  }
  if (level != "fast" && level != "best") throw_value_error("level: expected fast or best, got " + level);
  return {weights ? data<float>(*weights) : nullptr, level == "best"};
}

void affine_search(In w, const std::string& dtype, int group_size, int bits, const std::string& level,
                   std::optional<In> weights, Out words, Out scales, Out biases) {
  check_affine(group_size, bits);
  const MatrixInfo v = check_values(w, dtype, group_size);
  check_words(words, v, group_size, bits);
  check_group_array(scales, "scales", bits_of(v.dtype), v, group_size);
  check_group_array(biases, "biases", bits_of(v.dtype), v, group_size);
  const Search search = check_search(level, weights, v.cols);
  run([&] {
    kernels().affine_search(matrix(w, v), {group_size, bits}, search, affine_tensors(words, scales, biases));
  });
}

size_t mx_search(In w, const std::string& dtype, const std::string& mode, const std::string& level,
                 std::optional<In> weights, Out words, Out scales) {
  const int bits = mx_bits(mode);
  const MatrixInfo v = check_values(w, dtype, kMxGroup);
  check_words(words, v, kMxGroup, bits);
  check_group_array(scales, "scales", 8, v, kMxGroup);
  const Search search = check_search(level, weights, v.cols);
  return run([&] { return kernels().mx_search(matrix(w, v), bits, search, float_tensors(words, scales)); });
}

void nvfp4_search(In w, const std::string& dtype, const std::string& level, std::optional<In> weights, Out words,
                  Out scales, std::optional<double> global_scale) {
  const MatrixInfo v = check_values(w, dtype, kNvfp4Group);
  check_words(words, v, kNvfp4Group, kNvfp4Bits);
  check_group_array(scales, "scales", 8, v, kNvfp4Group);
  const Search search = check_search(level, weights, v.cols);
  const GlobalScale global(global_scale);
  run([&] { kernels().nvfp4_search(matrix(w, v), global.get(), search, float_tensors(words, scales)); });
}

}  // namespace

void init_search(nb::module_& m) {
  m.def("affine_search", &affine_search, "w"_a.noconvert(), "dtype"_a, "group_size"_a, "bits"_a, "level"_a,
        "weights"_a.noconvert().none(), "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert(),
        "As affine_quantize, with scales and biases searched for; weights: float32 bits, one a column, or None.");
  m.def("mx_search", &mx_search, "w"_a.noconvert(), "dtype"_a, "mode"_a, "level"_a, "weights"_a.noconvert().none(),
        "words"_a.noconvert(), "scales"_a.noconvert(),
        "As mx_quantize, with scales searched for; weights as those of affine_search.");
  m.def("nvfp4_search", &nvfp4_search, "w"_a.noconvert(), "dtype"_a, "level"_a, "weights"_a.noconvert().none(),
        "words"_a.noconvert(), "scales"_a.noconvert(), "global_scale"_a = nb::none(),
        "As nvfp4_quantize, with scales searched for; weights as those of affine_search.");
}

}  // namespace requant::bindings
