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

}  // namespace

void init_values(nb::module_& m) {
  m.def("cast", &cast, "src"_a.noconvert(), "src_dtype"_a, "dst"_a.noconvert(), "dst_dtype"_a,
        "Rounds to nearest even; returns the number of finite values that became infinite.");
  m.def("count_nonfinite", &count_nonfinite, "w"_a.noconvert(), "dtype"_a, "The number of infinities and NaNs.");
  m.def("first_nonfinite", &first_nonfinite, "w"_a.noconvert(), "dtype"_a,
        "Flat index of the first infinity or NaN, or -1.");
}

}  // namespace requant::bindings
