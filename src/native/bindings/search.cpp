// The same modes with scales found by search.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checks.h"

namespace requant::bindings {

namespace {

// The weights of columns, or null where there are none.
const float* check_columns(const std::optional<In>& weights, size_t cols) {
  if (!weights) return nullptr;
  check_rank(*weights, "weights", 1);
  check_layout(*weights, "weights", 32);
  if (weights->shape(0) != cols)
    throw_value_error("weights: expected shape (" + std::to_string(cols) + ",), got " + to_string(shape_of(*weights)));
  return data<float>(*weights);
}

Search check_search(const std::string& level, const std::optional<In>& weights, bool by_magnitude, size_t cols) {
  const float* columns = check_columns(weights, cols);
  if (level != "fast" && level != "best") throw_value_error("level: expected fast or best, got " + level);
  return {columns, level == "best", by_magnitude};
}

void affine_search(In w, const std::string& dtype, int group_size, int bits, const std::string& level,
                   std::optional<In> weights, bool by_magnitude, Out words, Out scales, Out biases) {
  check_affine(group_size, bits);
  const MatrixInfo v = check_values(w, dtype, group_size);
  check_words(words, v, group_size, bits);
  check_group_array(scales, "scales", bits_of(v.dtype), v, group_size);
  check_group_array(biases, "biases", bits_of(v.dtype), v, group_size);
  const Search search = check_search(level, weights, by_magnitude, v.cols);
  run([&] {
    kernels().affine_search(matrix(w, v), {group_size, bits}, search, affine_tensors(words, scales, biases));
  });
}

size_t mx_search(In w, const std::string& dtype, const std::string& mode, const std::string& level,
                 std::optional<In> weights, bool by_magnitude, Out words, Out scales) {
  const int bits = mx_bits(mode);
  const MatrixInfo v = check_values(w, dtype, kMxGroup);
  check_words(words, v, kMxGroup, bits);
  check_group_array(scales, "scales", 8, v, kMxGroup);
  const Search search = check_search(level, weights, by_magnitude, v.cols);
  return run([&] { return kernels().mx_search(matrix(w, v), bits, search, float_tensors(words, scales)); });
}

void nvfp4_search(In w, const std::string& dtype, const std::string& level, std::optional<In> weights, bool by_magnitude, Out words,
                  Out scales, std::optional<double> global_scale) {
  const MatrixInfo v = check_values(w, dtype, kNvfp4Group);
  check_words(words, v, kNvfp4Group, kNvfp4Bits);
  check_group_array(scales, "scales", 8, v, kNvfp4Group);
  const Search search = check_search(level, weights, by_magnitude, v.cols);
  const GlobalScale global(global_scale);
  run([&] { kernels().nvfp4_search(matrix(w, v), global.get(), search, float_tensors(words, scales)); });
}

void column_sums(In w, const std::string& dtype, Out magnitudes, Out squares) {
  const MatrixInfo v = check_values(w, dtype, 1);
  for (const Out* out : {&magnitudes, &squares}) {
    const char* name = out == &squares ? "squares" : "magnitudes";
    check_rank(*out, name, 1);
    check_layout(*out, name, 64);
    if (out->size() != v.cols)
      throw_value_error(std::string(name) + ": expected shape (" + std::to_string(v.cols) + ",), got " +
                        to_string(shape_of(*out)));
  }
  run([&] { kernels().column_sums(matrix(w, v), data<double>(magnitudes), data<double>(squares)); });
}

std::tuple<double, double> weighted_errors(In a, In b, const std::string& dtype, int group_size,
                                           std::optional<In> weights, bool by_magnitude) {
  if (group_size != 16 && group_size != 32 && group_size != 64 && group_size != 128)
    throw_value_error("group_size: expected 16, 32, 64 or 128, got " + std::to_string(group_size));
  const MatrixInfo v = check_values(a, dtype, group_size);
  check_values(b, dtype, group_size);
  if (shape_of(a) != shape_of(b))
    throw_value_error("b: expected shape " + to_string(shape_of(a)) + ", got " + to_string(shape_of(b)));
  const Search search = {check_columns(weights, v.cols), false, by_magnitude};
  ErrorSums lanes{};
  double sums[2];
  run([&] {
    kernels().weighted_errors(matrix(a, v), b.data(), size_t(group_size), search, lanes);
    kernels().total_errors(lanes, sums);
  });
  return {sums[0], sums[1]};
}

}  // namespace

void init_search(nb::module_& m) {
  m.def("affine_search", &affine_search, "w"_a.noconvert(), "dtype"_a, "group_size"_a, "bits"_a, "level"_a,
        "weights"_a.noconvert().none(), "by_magnitude"_a, "words"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert(),
        "As affine_quantize, with scales and biases searched for; weights: float32 bits, one a column, or None; "
        "by_magnitude: whether they are multiplied with the magnitude of each value.");
  m.def("mx_search", &mx_search, "w"_a.noconvert(), "dtype"_a, "mode"_a, "level"_a, "weights"_a.noconvert().none(), "by_magnitude"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(),
        "As mx_quantize, with scales searched for; weights as those of affine_search.");
  m.def("nvfp4_search", &nvfp4_search, "w"_a.noconvert(), "dtype"_a, "level"_a, "weights"_a.noconvert().none(), "by_magnitude"_a,
        "words"_a.noconvert(), "scales"_a.noconvert(), "global_scale"_a = nb::none(),
        "As nvfp4_quantize, with scales searched for; weights as those of affine_search.");
  m.def("column_sums", &column_sums, "w"_a.noconvert(), "dtype"_a, "magnitudes"_a.noconvert(), "squares"_a.noconvert(),
        "Adds each column's sum of magnitudes and of squares (bits of float64).");
  m.def("weighted_errors", &weighted_errors, "a"_a.noconvert(), "b"_a.noconvert(), "dtype"_a, "group_size"_a,
        "weights"_a.noconvert().none(), "by_magnitude"_a,
        "The sums of weight * (a - b)^2 and of weight * a^2, with the weights that a search of a minimizes.");
}

}  // namespace requant::bindings
