// Prints a hash of every kernel's output over inputs made by integer arithmetic alone, so
// that two builds agree exactly when they compute the same bits. See test-arm64.

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../src/native/kernels.h"

namespace requant {
extern const Kernels kernels_baseline;
}

namespace {

using requant::Dtype;
using requant::EncodingError;
using requant::Mode;
using requant::Target;

const requant::Kernels& kernels = requant::kernels_baseline;

struct Format {
  const char* name;
  Dtype dtype;
  int exponent_bits, mantissa_bits;

  size_t bytes() const { return size_t(1 + exponent_bits + mantissa_bits) / 8; }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t build(uint32_t sign, int exponent, uint32_t mantissa) const {
    return (sign & 1u) << (exponent_bits + mantissa_bits) | uint32_t(exponent) << mantissa_bits |
           (mantissa & ((1u << mantissa_bits) - 1u));
  }
  // k / 8, |k| < 64: exact in every format.
  uint32_t eighths(int k) const {
    const uint32_t sign = k < 0;
    uint32_t m = uint32_t(k < 0 ? -k : k);
    if (m == 0) return build(sign, 0, 0);
    int log = 0;
    while ((m >> (log + 1)) != 0) log++;
    return build(sign, bias() + log - 3, (m << mantissa_bits) >> log);
  }
};

constexpr Format kFormats[] = {
    {"F32", Dtype::F32, 8, 23}, {"F16", Dtype::F16, 5, 10}, {"BF16", Dtype::BF16, 8, 7}};

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 33);
  }
  int below(int n) { return int(next() % uint32_t(n)); }
};

// One row a family and repetition; all values finite.
constexpr int kFamilies = 11, kRepeats = 6, kRows = kFamilies * kRepeats, kCols = 512;

uint32_t value(const Format& f, int family, int row, int col, Random& random) {
  const int top = (1 << f.exponent_bits) - 2;
  const uint32_t sign = random.next(), mantissa = random.next();
  Random of_group{uint64_t(row * 1000 + col / 16)};
  of_group.next();
  const int centre = 1 + of_group.below(top);
  switch (family) {
    case 0: return f.build(sign, random.below(top + 1), mantissa);             // any finite bits
    case 1: return f.build(sign, f.bias() - 6 + random.below(8), mantissa);    // about 1
    case 2: return f.build(sign, random.below(3), mantissa);                   // subnormal and next to
    case 3: return f.build(sign, top - random.below(2), mantissa);             // ranges that overflow
    case 4: return f.eighths(random.below(61) - 30);                           // ties
    case 5: return f.eighths(row % 5 * 7 - 14);                                // constant
    case 6: return random.below(3) != 0 ? f.build(sign, 0, 0) : f.eighths(random.below(20));  // zeros, signed
    case 7: return f.build(sign, f.bias() - 9 + (col % 32 == 5 ? 12 : 0), mantissa);          // an outlier
    case 8: return f.build(1, f.bias() + 1, mantissa);                         // negative
    case 9: return f.build(sign, f.bias() - 12 + random.below(6), mantissa & ~uint32_t(0) << (f.mantissa_bits - 2));
    default: return f.build(sign, centre - random.below(centre < 8 ? centre : 8), mantissa);  // by group
  }
}

std::vector<uint8_t> weights(const Format& f) {
  std::vector<uint8_t> out(size_t(kRows) * kCols * f.bytes());
  Random random{2024};
  for (int row = 0; row < kRows; row++)
    for (int col = 0; col < kCols; col++) {
      const uint32_t v = value(f, row % kFamilies, row, col, random);
      std::memcpy(&out[(size_t(row) * kCols + col) * f.bytes()], &v, f.bytes());
    }
  return out;
}

uint64_t hash(const void* data, size_t size) {
  uint64_t h = 14695981039346656037ull;
  for (size_t i = 0; i < size; i++) h = (h ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  return h;
}

// Sign and payload of a NaN are the processor's choice: all count as one.
uint64_t hash_values(std::vector<uint8_t> values, const Format& f) {
  const uint32_t inf = f.build(0, (1 << f.exponent_bits) - 1, 0);
  for (size_t i = 0; i < values.size(); i += f.bytes()) {
    uint32_t v = 0;
    std::memcpy(&v, &values[i], f.bytes());
    if ((v & ~f.build(1, 0, 0)) > inf) v = inf + 1;
    std::memcpy(&values[i], &v, f.bytes());
  }
  return hash(values.data(), values.size());
}

void print(const char* what, const char* dtype, int a, int b, uint64_t h) {
  std::printf("%-19s %-9s %4d %4d  %016" PRIx64 "\n", what, dtype, a, b, h);
}

void affine(const Format& f) {
  const std::vector<uint8_t> w = weights(f);
  for (int group : {32, 64, 128})
    for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
      std::vector<uint32_t> words(size_t(kRows) * kCols / 32 * bits);
      std::vector<uint8_t> scales(kRows * (kCols / group) * f.bytes()), biases(scales.size());
      kernels.affine_quantize({w.data(), f.dtype, kRows, kCols}, {group, bits},
                              {words.data(), scales.data(), biases.data()});
      print("affine_words", f.name, group, bits, hash(words.data(), words.size() * 4));
      print("affine_scales", f.name, group, bits, hash_values(scales, f));
      print("affine_biases", f.name, group, bits, hash_values(biases, f));
      for (const Format& o : kFormats) {
        std::vector<uint8_t> out(size_t(kRows) * kCols * o.bytes());
        kernels.affine_dequantize({words.data(), {scales.data(), f.dtype}, {biases.data(), f.dtype}}, {group, bits},
                                  {out.data(), o.dtype, kRows, kCols});
        print("affine_values", (std::string(f.name) + ">" + o.name).c_str(), group, bits, hash_values(out, o));
      }
    }
}

// Scales of one dtype, biases of another: the weights themselves serve as both.
void mixed(const Format& s, const Format& b) {
  const std::vector<uint8_t> scales = weights(s), biases = weights(b);
  constexpr int rows = kRows / 32, cols = kCols * 32;
  Random random{7};
  std::vector<uint32_t> words(size_t(rows) * cols / 32 * 5);
  for (uint32_t& word : words) word = random.next() ^ random.next() << 1;
  for (const Format& o : kFormats) {
    std::vector<uint8_t> out(size_t(rows) * cols * o.bytes());
    kernels.affine_dequantize({words.data(), {scales.data(), s.dtype}, {biases.data(), b.dtype}}, {32, 5},
                              {out.data(), o.dtype, rows, cols});
    print("mixed_values", (std::string(s.name) + "+" + b.name).c_str(), int(o.bytes()), o.mantissa_bits,
          hash_values(out, o));
  }
}

void float_modes(const Format& f) {
  const std::vector<uint8_t> w = weights(f);
  for (int bits : {4, 8}) {
    std::vector<uint32_t> words(size_t(kRows) * kCols / 32 * bits);
    std::vector<uint8_t> scales(kRows * (kCols / 32));
    const size_t flushed = kernels.mx_quantize({w.data(), f.dtype, kRows, kCols}, bits, {words.data(), scales.data()});
    print("mx_flushed", f.name, 32, bits, flushed);
    print("mx_words", f.name, 32, bits, hash(words.data(), words.size() * 4));
    print("mx_scales", f.name, 32, bits, hash(scales.data(), scales.size()));
    for (const Format& o : kFormats) {
      std::vector<uint8_t> out(size_t(kRows) * kCols * o.bytes());
      kernels.mx_dequantize({words.data(), scales.data()}, bits, {out.data(), o.dtype, kRows, kCols});
      print("mx_values", (std::string(f.name) + ">" + o.name).c_str(), 32, bits, hash_values(out, o));
    }
  }
  const float globals[] = {3.0f, 0.001f, 1e20f};
  for (int k = -1; k < 3; k++) {
    const float* global = k < 0 ? nullptr : &globals[k];
    std::vector<uint32_t> words(size_t(kRows) * kCols / 8);
    std::vector<uint8_t> scales(kRows * (kCols / 16));
    kernels.nvfp4_quantize({w.data(), f.dtype, kRows, kCols}, global, {words.data(), scales.data()});
    print("nvfp4_words", f.name, 16, k, hash(words.data(), words.size() * 4));
    print("nvfp4_scales", f.name, 16, k, hash(scales.data(), scales.size()));
    for (const Format& o : kFormats) {
      if (global != nullptr && o.dtype != Dtype::F32) continue;
      std::vector<uint8_t> out(size_t(kRows) * kCols * o.bytes());
      kernels.nvfp4_dequantize({words.data(), scales.data()}, global, {out.data(), o.dtype, kRows, kCols});
      print("nvfp4_values", (std::string(f.name) + ">" + o.name).c_str(), 16, k, hash_values(out, o));
    }
  }
}

void searches(const Format& f) {
  const std::vector<uint8_t> w = weights(f);
  std::vector<float> h(kCols);
  Random random{11};
  for (float& value : h) value = float(random.below(1000)) / 64.0f;
  for (int level = 0; level < 8; level++) {
    const bool best = level % 2 != 0, by_magnitude = level >= 4;
    const float* importance = level % 4 < 2 ? nullptr : h.data();
    for (int group : {32, 64, 128})
      for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
        std::vector<uint32_t> words(size_t(kRows) * kCols / 32 * bits);
        std::vector<uint8_t> scales(kRows * (kCols / group) * f.bytes()), biases(scales.size());
        kernels.affine_search({w.data(), f.dtype, kRows, kCols}, {group, bits}, {importance, best, by_magnitude},
                              {words.data(), scales.data(), biases.data()});
        const uint64_t h1 = hash(words.data(), words.size() * 4), h2 = hash_values(scales, f);
        print("affine_search", f.name, group, bits * 10 + level, h1 ^ h2 * 3 ^ hash_values(biases, f) * 5);
      }
    for (int bits : {4, 8}) {
      std::vector<uint32_t> words(size_t(kRows) * kCols / 32 * bits);
      std::vector<uint8_t> scales(kRows * (kCols / 32));
      kernels.mx_search({w.data(), f.dtype, kRows, kCols}, bits, {importance, best, by_magnitude}, {words.data(), scales.data()});
      print("mx_search", f.name, level, bits, hash(words.data(), words.size() * 4) ^ hash(scales.data(), scales.size()));
    }
    std::vector<uint32_t> words(size_t(kRows) * kCols / 8);
    std::vector<uint8_t> scales(kRows * (kCols / 16));
    kernels.nvfp4_search({w.data(), f.dtype, kRows, kCols}, nullptr, {importance, best, by_magnitude}, {words.data(), scales.data()});
    print("nvfp4_search", f.name, level, 4, hash(words.data(), words.size() * 4) ^ hash(scales.data(), scales.size()));
  }
}

void weighted(const Format& f, const std::vector<uint8_t>& w) {
  std::vector<double> magnitudes(kCols), squares(kCols);
  kernels.column_sums({w.data(), f.dtype, kRows, kCols}, magnitudes.data(), squares.data());
  const size_t size = kCols * sizeof(double);
  print("column_sums", f.name, 0, 0, hash(magnitudes.data(), size) ^ hash(squares.data(), size) * 3);
  std::vector<float> h(kCols);
  Random random{12};
  for (float& value : h) value = float(random.below(1000)) / 64.0f;
  for (bool by_magnitude : {false, true}) {
    requant::ErrorSums sums{};
    const uint8_t* row = &w[size_t(kCols) * f.bytes()];  // about 1
    kernels.weighted_errors({row, f.dtype, 1, kCols}, row + kFamilies * size_t(kCols) * f.bytes(), 32, {h.data(), false, by_magnitude}, sums);
    print("weighted_errors", f.name, by_magnitude, 0, hash(&sums, sizeof sums));
  }
}

void values(const Format& a) {
  const std::vector<uint8_t> x = weights(a);
  const size_t count = size_t(kRows) * kCols;
  print("count_nonfinite", a.name, 0, 0, kernels.count_nonfinite({x.data(), a.dtype}, count));
  for (const Format& b : kFormats) {
    const std::string pair = std::string(a.name) + ">" + b.name;
    std::vector<uint8_t> y(count * b.bytes());
    const size_t overflows = kernels.cast({x.data(), a.dtype}, count, {y.data(), b.dtype});
    print("cast_overflows", pair.c_str(), 0, 0, overflows);
    print("cast", pair.c_str(), 0, 0, hash_values(y, b));
  }
}

void measures(const Format& f) {
  const std::vector<uint8_t> x = weights(f);
  const Target targets[] = {{Mode::Affine, 64, 4}, {Mode::Affine, 32, 8}, {Mode::Mx, 32, 4}, {Mode::Mx, 32, 8},
                            {Mode::Nvfp4, 16, 4}};
  for (const Target& target : targets)
    for (int repeat = 0; repeat < kRepeats; repeat++) {
      const size_t row = (size_t(repeat) * kFamilies + 1) * size_t(kCols);  // about 1, where sums stay finite
      std::vector<uint32_t> words(kCols / 4);
      std::vector<float> scales(kCols / 16), biases(kCols / 16);
      EncodingError error{};
      kernels.quantize_measured({&x[row * f.bytes()], f.dtype, 1, kCols}, target,
                                {words.data(), scales.data(), biases.data()}, error);
      const uint64_t sums = hash(&error.sums, sizeof error.sums), most = hash(&error.max_steps, sizeof error.max_steps);
      print("measure", f.name, int(target.mode) * 100 + target.group_size, target.bits * 10 + repeat, sums ^ most * 3);
    }
}

void packing() {
  Random random{3};
  std::vector<uint8_t> codes(size_t(kRows) * kCols), back(codes.size());
  for (uint8_t& code : codes) code = uint8_t(random.next());
  for (int bits = 1; bits <= 8; bits++) {
    std::vector<uint32_t> words(codes.size() / 32 * bits);
    kernels.pack_words(codes.data(), kRows, kCols, bits, words.data());
    kernels.unpack_words(words.data(), kRows, kCols, bits, back.data());
    print("pack_words", "", 0, bits, hash(words.data(), words.size() * 4));
    print("unpack_words", "", 0, bits, hash(back.data(), back.size()));
  }
}

std::vector<uint8_t> random_bytes(size_t count, uint64_t seed) {
  Random random{seed};
  std::vector<uint8_t> out(count);
  for (uint8_t& byte : out) byte = uint8_t(random.next());
  return out;
}

// Ragged against the tiles' 64 on either side.
void repacking() {
  constexpr size_t n_in = 96, n_out = 160;
  const std::vector<uint8_t> src = random_bytes(n_in * n_out, 5);
  std::vector<uint8_t> out(src.size());
  const auto* words = reinterpret_cast<const uint32_t*>(src.data());
  auto* out_words = reinterpret_cast<uint32_t*>(out.data());
  for (size_t item : {1, 2, 4}) {
    kernels.transpose({src.data(), item, n_in, n_out / item}, {out.data(), n_in * item});
    print("transpose", "", int(item), 0, hash(out.data(), out.size()));
  }
  for (int bits = 1; bits <= 8; bits++)
    for (int out_bits = bits; out_bits <= 8; out_bits++) {
      const requant::OutRows rows{out.data(), n_in / 8 * size_t(out_bits)};
      kernels.stream_columns({words, n_in, n_out, bits}, bits % 2 == 0, out_bits % 2 == 0, rows, out_bits);
      print("stream_columns", "", bits, out_bits, hash(out.data(), n_in * n_out / 8 * size_t(out_bits)));
      if (bits == 1) continue;
      kernels.planar_columns({words, n_in, n_out, bits}, rows, out_bits);
      print("planar_columns", "", bits, out_bits, hash(out.data(), n_in * n_out / 8 * size_t(out_bits)));
    }
  for (int bits = 1; bits <= 8; bits++)
    for (size_t per_word : {size_t(0), size_t(32 / bits)}) {
      kernels.stream_codes({words, 10, 24, 77, bits, per_word}, out.data());
      print("stream_codes", "", bits, int(per_word), hash(out.data(), 770));
      for (size_t item : {1, 4}) {
        kernels.extract_bitfield({src.data(), item, 20, 76}, {int(item) * 8 - 8, bits, uint8_t(bits / 2)},
                                 {out.data(), 1, 2});
        print("extract_bitfield", "", bits, int(item), hash(out.data(), 41 * 76));
      }
    }
  const size_t tiled = 96 * 128 / 2;  // bytes of 96 inputs by 128 outputs
  kernels.marlin_words(words, 96, 128, {out.data(), 96 / 2});
  print("marlin_words", "", 0, 0, hash(out.data(), tiled));
  kernels.awq_gemv_fast_words(reinterpret_cast<const uint16_t*>(src.data()), 192, 64, out_words);
  print("awq_gemv_fast_words", "", 0, 0, hash(out.data(), tiled));
  kernels.deinterleave_words(words, src.size() / 4, out_words);
  print("deinterleave_words", "", 0, 0, hash(out.data(), out.size()));
}

// Scales and zeros are any finite floats; codes any bytes.
void decoding(const Format& o) {
  const std::vector<uint8_t> scales = weights(kFormats[0]), codes = random_bytes(size_t(kRows) * kCols, 6);
  const auto* s = reinterpret_cast<const float*>(scales.data());
  std::vector<uint8_t> out(codes.size() * o.bytes());
  for (const Format& d : kFormats) {
    kernels.integer_values({codes.data(), s, s + kRows * 8, 72, d.dtype}, {out.data(), o.dtype, kRows, kCols});
    print("integer_values", o.name, int(d.bytes()), d.mantissa_bits, hash_values(out, o));
  }
  for (bool fnuz : {false, true}) {
    const size_t nans =
        kernels.float8_values({codes.data(), s, 6, 5, 100, 3, fnuz}, {out.data(), o.dtype, kRows, kCols});
    print("float8_values", o.name, fnuz, int(nans), hash_values(out, o));
  }
  for (bool high_first : {false, true}) {
    kernels.lut_values({codes.data(), s + kCols, s, 64, 10, high_first}, codes.size(), {out.data(), o.dtype});
    print("lut_values", o.name, high_first, 0, hash_values(out, o));
  }
}

}  // namespace

int main() {
  for (const Format& f : kFormats) {
    affine(f);
    float_modes(f);
    searches(f);
    values(f);
    measures(f);
    weighted(f, weights(f));
    for (const Format& b : kFormats) mixed(f, b);
    decoding(f);
  }
  packing();
  repacking();
}
