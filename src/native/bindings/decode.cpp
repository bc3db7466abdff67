// Values computed from codes and scales that no mode of MLX holds.

#include "checks.h"

namespace requant::bindings {

namespace {

size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0 ? 1 : 0); }

size_t check_positive(const char* name, ptrdiff_t value) {
  if (value < 1) throw_value_error(std::string(name) + ": expected 1 or more, got " + std::to_string(value));
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
    kernels().integer_values({data<uint8_t>(codes), data<float>(scales), data<float>(zeros), size, d},
                             {out.data(), o, rows, cols});
  });
}

size_t float8_values(In bytes, In scales, ptrdiff_t block_rows, ptrdiff_t block_cols, ptrdiff_t first_row, Out out,
                     const std::string& out_dtype, bool fnuz) {
  const size_t high = check_positive("block_rows", block_rows), broad = check_positive("block_cols", block_cols);
  const Dtype o = dtype_of(out_dtype);
  check_rank(bytes, "bytes", 2);
  check_layout(bytes, "bytes", 8);
  check_rank(scales, "scales", 2);
  if (first_row < 0) throw_value_error("first_row: expected 0 or more, got " + std::to_string(first_row));
  const size_t rows = bytes.shape(0), cols = bytes.shape(1), first = size_t(first_row);
  if (rows > 0 && scales.shape(0) <= (first + rows - 1) / high)
    throw_value_error("scales: row " + std::to_string(first + rows - 1) + " in blocks of " + std::to_string(high) +
                      " lies beyond shape " + to_string(shape_of(scales)));
  check_shape(scales, "scales", 32, scales.shape(0), ceil_div(cols, broad));
  check_shape(out, "out", bits_of(o), rows, cols);
  return run([&] {
    return kernels().float8_values(
        {data<uint8_t>(bytes), data<float>(scales), scales.shape(1), high, broad, first, fnuz},
        {out.data(), o, rows, cols});
  });
}

void lut_values(In bytes, In codebook, In absmax, ptrdiff_t block, ptrdiff_t first, bool high_first, Out out,
                const std::string& out_dtype) {
  const size_t size = check_positive("block", block);
  if (size % 2 != 0 || first % 2 != 0) throw_value_error("block, first: expected even numbers");
  if (first < 0 || size_t(first) >= size)
    throw_value_error("first: expected 0 to block - 1, got " + std::to_string(first));
  const Dtype o = dtype_of(out_dtype);
  check_rank(bytes, "bytes", 1);
  check_layout(bytes, "bytes", 8);
  check_rank(codebook, "codebook", 1);
  check_layout(codebook, "codebook", 32);
  if (codebook.size() != 16) throw_value_error("codebook: expected 16 values, got " + std::to_string(codebook.size()));
  check_rank(absmax, "absmax", 1);
  check_layout(absmax, "absmax", 32);
  check_rank(out, "out", 1);
  check_layout(out, "out", bits_of(o));
  const size_t count = 2 * bytes.size();
  if (out.size() != count)
    throw_value_error("out: expected shape " + to_string(std::vector<size_t>{count}) + ", got " +
                      to_string(shape_of(out)));
  if (absmax.size() < ceil_div(size_t(first) + count, size))
    throw_value_error("absmax: " + std::to_string(count) + " values from number " + std::to_string(first) +
                      " of a block of " + std::to_string(size) + " on need " +
                      std::to_string(ceil_div(size_t(first) + count, size)) + ", got " + std::to_string(absmax.size()));
  run([&] {
    kernels().lut_values(
        {data<uint8_t>(bytes), data<float>(codebook), data<float>(absmax), size, size_t(first), high_first}, count,
        {out.data(), o});
  });
}

}  // namespace

void init_decode(nb::module_& m) {
  m.def("integer_values", &integer_values, "codes"_a.noconvert(), "scales"_a.noconvert(), "zeros"_a.noconvert(),
        "group"_a, "out"_a.noconvert(), "out_dtype"_a, "difference"_a,
        "(code - zero) * scale; difference: the dtype that code - zero is rounded to first.");
  m.def("float8_values", &float8_values, "bytes"_a.noconvert(), "scales"_a.noconvert(), "block_rows"_a,
        "block_cols"_a, "first_row"_a, "out"_a.noconvert(), "out_dtype"_a, "fnuz"_a,
        "E4M3 bytes times the scale of their block; returns the number of NaN bytes.");
  m.def("lut_values", &lut_values, "bytes"_a.noconvert(), "codebook"_a.noconvert(), "absmax"_a.noconvert(), "block"_a,
        "first"_a, "high_first"_a, "out"_a.noconvert(), "out_dtype"_a,
        "codebook[code] * absmax of the block, two codes a byte; the first value is number first of its block.");
}

}  // namespace requant::bindings
