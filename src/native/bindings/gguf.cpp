// Blocks of GGUF files.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checks.h"

namespace requant::bindings {

namespace {

// The type, once the blocks' shape (rows, bytes) fits it.
GgufBlock check_blocks(int type, const In& blocks) {
  GgufBlock found;
  if (!kernels().gguf_block(type, found))
    throw_value_error("type: no block type of GGUF has number " + std::to_string(type));
  check_rank(blocks, "blocks", 2);
  check_layout(blocks, "blocks", 8);
  if (blocks.shape(1) % size_t(found.bytes) != 0)
    throw_value_error("blocks: " + std::to_string(blocks.shape(1)) + " bytes of a row are not a multiple of the " +
                      std::to_string(found.bytes) + " of a block");
  return found;
}

std::optional<std::tuple<int, int, int, int, bool>> gguf_block(int type) {
  GgufBlock b;
  if (!kernels().gguf_block(type, b)) return std::nullopt;
  return std::make_tuple(b.elements, b.bytes, b.bits, b.group, b.fp4);
}

void gguf_affine(int type, In blocks, Out words, Out scales, Out biases, const std::string& dtype) {
  const GgufBlock b = check_blocks(type, blocks);
  if (b.bits == 0) throw_value_error("type: no affine codes of MLX hold number " + std::to_string(type));
  const Dtype d = dtype_of(dtype);
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes), cols = count * size_t(b.elements);
  check_shape(words, "words", 32, rows, cols / 32 * size_t(b.bits));
  check_shape(scales, "scales", bits_of(d), rows, cols / size_t(b.group));
  check_shape(biases, "biases", bits_of(d), rows, cols / size_t(b.group));
  run([&] {
    kernels().gguf_affine({type, data<uint8_t>(blocks), rows * count}, affine_tensors(words, scales, biases), d);
  });
}

void gguf_fp4(int type, In blocks, Out words, Out scales) {
  const GgufBlock b = check_blocks(type, blocks);
  if (!b.fp4) throw_value_error("type: no float mode of MLX holds number " + std::to_string(type));
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes), cols = count * size_t(b.elements);
  check_shape(words, "words", 32, rows, cols / 8);
  check_shape(scales, "scales", 8, rows, count * size_t(b.scale_bytes));
  run([&] {
    kernels().gguf_fp4({type, data<uint8_t>(blocks), rows * count}, float_tensors(words, scales));
  });
}

void gguf_values(int type, In blocks, Out out, const std::string& dtype) {
  const GgufBlock b = check_blocks(type, blocks);
  const Dtype d = dtype_of(dtype);
  const size_t rows = blocks.shape(0), count = blocks.shape(1) / size_t(b.bytes);
  check_shape(out, "out", bits_of(d), rows, count * size_t(b.elements));
  run([&] { kernels().gguf_values({type, data<uint8_t>(blocks), rows * count}, {out.data(), d}); });
}

}  // namespace

void init_gguf(nb::module_& m) {
  m.def("gguf_block", &gguf_block, "type"_a,
        "Values and bytes of a block, bits and group size of the affine codes that hold it (bits 0:\n"
        "none), and whether a float mode of MLX does; None for a number without blocks.");
  m.def("gguf_affine", &gguf_affine, "type"_a, "blocks"_a.noconvert(), "words"_a.noconvert(), "scales"_a.noconvert(),
        "biases"_a.noconvert(), "dtype"_a, "Blocks to words, scales and biases of mode affine.");
  m.def("gguf_fp4", &gguf_fp4, "type"_a, "blocks"_a.noconvert(), "words"_a.noconvert(), "scales"_a.noconvert(),
        "Blocks to words and scales of a float mode of 4 bits.");
  m.def("gguf_values", &gguf_values, "type"_a, "blocks"_a.noconvert(), "out"_a.noconvert(), "dtype"_a,
        "Values of blocks.");
}

}  // namespace requant::bindings
