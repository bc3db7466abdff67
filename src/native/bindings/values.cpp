// Casts, checks and errors of values.

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checks.h"

namespace requant::bindings {

namespace {

size_t cast(In src, const std::string& src_dtype, Out dst, const std::string& dst_dtype) {
  const Dtype s = dtype_of(src_dtype), d = dtype_of(dst_dtype);
  check_rank(src, "src", 1);
  check_rank(dst, "dst", 1);
  check_layout(src, "src", bits_of(s));
  check_layout(dst, "dst", bits_of(d));
  if (src.size() != dst.size())
    throw_value_error("dst: expected shape " + to_string(shape_of(src)) + ", got " + to_string(shape_of(dst)));
  return run([&] { return kernels().cast({src.data(), s}, src.size(), {dst.data(), d}); });
}

size_t count_nonfinite(In w, const std::string& dtype) {
  const Dtype t = dtype_of(dtype);
  check_layout(w, "w", bits_of(t));
  return run([&] { return kernels().count_nonfinite({w.data(), t}, w.size()); });
}

ptrdiff_t first_nonfinite(In w, const std::string& dtype) {
  const Dtype t = dtype_of(dtype);
  check_layout(w, "w", bits_of(t));
  return run([&] { return kernels().first_nonfinite({w.data(), t}, w.size()); });
}

std::tuple<double, double> group_errors(In a, const std::string& a_dtype, In b, const std::string& b_dtype,
                                        int group_size, Out group_max) {
  const Dtype s = dtype_of(a_dtype), t = dtype_of(b_dtype);
  check_layout(a, "a", bits_of(s));
  check_layout(b, "b", bits_of(t));
  check_layout(group_max, "group_max", 32);
  if (shape_of(a) != shape_of(b))
    throw_value_error("b: expected shape " + to_string(shape_of(a)) + ", got " + to_string(shape_of(b)));
  if (group_size != 16 && group_size != 32 && group_size != 64 && group_size != 128)
    throw_value_error("group_size: expected 16, 32, 64 or 128, got " + std::to_string(group_size));
  if (group_max.size() * size_t(group_size) != a.size())
    throw_value_error("group_max: expected one value a group of " + std::to_string(group_size) + ", got " +
                      to_string(shape_of(group_max)));
  double out[2];
  run([&] {
    kernels().group_errors({a.data(), s}, {b.data(), t}, a.size(), size_t(group_size), data<float>(group_max), out);
  });
  return {out[0], out[1]};
}

}  // namespace

void init_values(nb::module_& m) {
  m.def("cast", &cast, "src"_a.noconvert(), "src_dtype"_a, "dst"_a.noconvert(), "dst_dtype"_a,
        "Rounds to nearest even; returns the number of finite values that became infinite.");
  m.def("count_nonfinite", &count_nonfinite, "w"_a.noconvert(), "dtype"_a, "The number of infinities and NaNs.");
  m.def("first_nonfinite", &first_nonfinite, "w"_a.noconvert(), "dtype"_a,
        "Flat index of the first infinity or NaN, or -1.");
  m.def("group_errors", &group_errors, "a"_a.noconvert(), "a_dtype"_a, "b"_a.noconvert(), "b_dtype"_a, "group_size"_a,
        "group_max"_a.noconvert(),
        "Writes the largest |a - b| of each group (float32 bits); returns the sums of (a - b)^2 and of a^2.");
}

}  // namespace requant::bindings
