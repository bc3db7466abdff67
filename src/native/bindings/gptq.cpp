// GPTQ's steps over groups of columns.

#include "checks.h"

namespace requant::bindings {

namespace {

void gptq_group(Out w, size_t start, int group_size, int bits, In scales, In biases, In propagation, Out codes,
                Out errors) {
  check_affine(group_size, bits);
  check_rank(w, "w", 2);
  const size_t rows = w.shape(0), cols = w.shape(1), group = size_t(group_size);
  check_layout(w, "w", 32);
  check_multiple("w", cols, group_size);
  if (start % group != 0 || start >= cols)
    throw_value_error("start: " + std::to_string(start) + " begins no group");
  check_shape(scales, "scales", 32, rows, 1);
  check_shape(biases, "biases", 32, rows, 1);
  check_shape(propagation, "propagation", 32, cols, cols);
  check_shape(codes, "codes", 8, rows, group);
  check_shape(errors, "errors", 32, rows, group);
  run([&] {
    kernels().gptq_group({data<float>(w), rows, cols, start, group, bits, data<float>(scales), data<float>(biases),
                          data<float>(propagation), data<uint8_t>(codes), data<float>(errors)});
  });
}

void gptq_refine(In w, int group_size, int bits, int sweeps, In hessian, Out codes, const std::string& dtype, Out scales,
                 Out biases, Out gradients, Out changes) {
  check_affine(group_size, bits);
  const MatrixInfo v = check_values(w, "F32", group_size);
  const Dtype stored = dtype_of(dtype);
  check_shape(hessian, "hessian", 32, v.cols, v.cols);
  check_shape(codes, "codes", 8, v.rows, v.cols);
  check_group_array(scales, "scales", bits_of(stored), v, group_size);
  check_group_array(biases, "biases", bits_of(stored), v, group_size);
  check_shape(gradients, "gradients", 32, v.rows, v.cols);
  check_shape(changes, "changes", 32, v.rows, size_t(group_size));
  run([&] {
    kernels().gptq_refine({data<float>(w), v.rows, v.cols, size_t(group_size), bits, sweeps, data<float>(hessian),
                           data<uint8_t>(codes), stored, scales.data(), biases.data(), data<float>(gradients),
                           data<float>(changes)});
  });
}

}  // namespace

void init_gptq(nb::module_& m) {
  m.def("gptq_group", &gptq_group, "w"_a.noconvert(), "start"_a, "group_size"_a, "bits"_a, "scales"_a.noconvert(),
        "biases"_a.noconvert(), "propagation"_a.noconvert(), "codes"_a.noconvert(), "errors"_a.noconvert(),
        "Codes of a group's columns one by one; the error of each is propagated to the later columns of w, in place.");
  m.def("gptq_refine", &gptq_refine, "w"_a.noconvert(), "group_size"_a, "bits"_a, "sweeps"_a, "hessian"_a.noconvert(),
        "codes"_a.noconvert(), "dtype"_a, "scales"_a.noconvert(), "biases"_a.noconvert(), "gradients"_a.noconvert(),
        "changes"_a.noconvert(),
        "Scales, biases and codes refined group by group with the Hessian, so that the outputs' error falls, in place.");
}

}  // namespace requant::bindings
