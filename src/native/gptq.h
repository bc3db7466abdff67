// GPTQ's steps over one group of columns of a layer.
//
// gptq_group: codes column by column, the error of each column propagated to the later columns.
// gptq_refine: scale, bias and codes of a group again, with all errors of the row known: what lowers the
// squared error of the layer's outputs, e H e^T for the errors e of a row and the Hessian H.
//
// Rows are independent, and every sum runs in the order of the columns: no result depends on
// how many rows come at once or how wide the vectors are.

#pragma once

#include "floats.h"

namespace {

constexpr int kTile = 512;         // columns of the trailing update that stay in the cache
constexpr int kRefinedGroup = 128;  // the largest
constexpr int kRefinePasses = 2;   // of a group, at one visit

// target[:, from:to] -= factors @ matrix[start:start + group, from:to]. target: rows x cols; matrix:
// cols x cols; factors: rows x group.
inline void subtract_products(float* REQUANT_RESTRICT target, size_t rows, size_t cols,
                              const float* REQUANT_RESTRICT matrix, size_t start, size_t group,
                              const float* REQUANT_RESTRICT factors, size_t first, size_t to) {
  for (size_t from = first; from < to; from += kTile) {
    const size_t count = to - from < size_t(kTile) ? to - from : size_t(kTile);
    for (size_t r = 0; r < rows; r++) {
      float* REQUANT_RESTRICT row = target + r * cols + from;
      const float* REQUANT_RESTRICT e = factors + r * group;
      for (size_t j = 0; j < group; j += 4) {
        const float* REQUANT_RESTRICT a = matrix + (start + j) * cols + from;
        const float* REQUANT_RESTRICT b = a + cols;
        const float* REQUANT_RESTRICT c = b + cols;
        const float* REQUANT_RESTRICT d = c + cols;
        const float ea = e[j], eb = e[j + 1], ec = e[j + 2], ed = e[j + 3];
        for (size_t i = 0; i < count; i++)
          row[i] = (((row[i] - ea * a[i]) - eb * b[i]) - ec * c[i]) - ed * d[i];
      }
    }
  }
}

// w: rows x cols, changed in place. propagation: cols x cols, row j holds how much of column j's error
// each later column takes (upper triangle, the diagonal aside). scales, biases: one a row.
// codes: rows x group.
inline void gptq_group(float* REQUANT_RESTRICT w, size_t rows, size_t cols, size_t start, size_t group, int bits,
                       const float* REQUANT_RESTRICT scales, const float* REQUANT_RESTRICT biases,
                       const float* REQUANT_RESTRICT propagation, uint8_t* REQUANT_RESTRICT codes,
                       float* REQUANT_RESTRICT errors) {
  const float n = float((1 << bits) - 1);
  const size_t end = start + group;
  for (size_t r = 0; r < rows; r++) {
    float* REQUANT_RESTRICT row = w + r * cols;
    float* REQUANT_RESTRICT error = errors + r * group;
    const float scale = scales[r], bias = biases[r];
    for (size_t j = start; j < end; j++) {
      float t = scale != 0.0f ? (row[j] - bias) / scale : 0.0f;
      t = t > 0.0f ? t : 0.0f;
      t = t < n ? t : n;
      const float code = (t + kRoundMagic) - kRoundMagic;
      const float product = code * scale;
      const float e = row[j] - (product + bias);
      codes[r * group + (j - start)] = uint8_t(code);
      error[j - start] = e;
      const float* REQUANT_RESTRICT share = propagation + j * cols;
      for (size_t c = j + 1; c < end; c++) row[c] -= e * share[c];
    }
  }
  subtract_products(w, rows, cols, propagation, start, group, errors, end, cols);
}

// The parts of one row that a group covers, and the Hessian's: h[i] is row i of its block on the diagonal.
struct RefinedGroup {
  float w[kRefinedGroup], codes[kRefinedGroup], errors[kRefinedGroup], gradient[kRefinedGroup];
  float scale, bias;
};

// Errors become those of the codes, scale and bias; the gradient follows.
inline void renew_errors(RefinedGroup& x, size_t group, const float* REQUANT_RESTRICT hessian, size_t cols) {
  for (size_t i = 0; i < group; i++) {
    const float product = x.codes[i] * x.scale;
    const float e = x.w[i] - (product + x.bias);
    const float change = x.errors[i] - e;
    x.errors[i] = e;
    const float* REQUANT_RESTRICT h = hessian + i * cols;
    for (size_t k = 0; k < group; k++) x.gradient[k] -= change * h[k];
  }
}

// Scale and bias by least squares with the codes as they are; kept if they lower the error after rounding.
// sums: of the rows of the Hessian's block.
template <class T>
inline void refit_scale(RefinedGroup& x, size_t group, const float* REQUANT_RESTRICT hessian, size_t cols,
                        const float* REQUANT_RESTRICT sums) {
  float products[kRefinedGroup];
  for (size_t k = 0; k < group; k++) products[k] = 0.0f;
  for (size_t i = 0; i < group; i++) {
    const float code = x.codes[i];
    const float* REQUANT_RESTRICT h = hessian + i * cols;
    for (size_t k = 0; k < group; k++) products[k] += code * h[k];
  }
  double qq = 0, q1 = 0, ones = 0, qg = 0, g1 = 0;
  for (size_t i = 0; i < group; i++) {
    const double code = double(x.codes[i]), gradient = double(x.gradient[i]);
    qq += code * double(products[i]);
    q1 += code * double(sums[i]);
    ones += double(sums[i]);
    qg += code * gradient;
    g1 += gradient;
  }
  const double determinant = qq * ones - q1 * q1;
  if (!(determinant > 1e-6 * (qq * ones))) return;
  const float scale = T::round(x.scale + float((qg * ones - g1 * q1) / determinant));
  const double slope = double(scale) - double(x.scale);
  const float bias = T::round(x.bias + float((g1 - slope * q1) / ones));
  const double shift = double(bias) - double(x.bias);
  const double change = (slope * (slope * qq - 2.0 * qg) + shift * (shift * ones - 2.0 * g1)) + 2.0 * (slope * (shift * q1));
  const bool is_finite = (bits_of(scale) & kAbs32) < kInf32 && (bits_of(bias) & kAbs32) < kInf32;
  if (!(change < 0.0) || scale == 0.0f || !is_finite) return;
  x.scale = scale;
  x.bias = bias;
  renew_errors(x, group, hessian, cols);
}

// Each code as it is best while all others stay.
inline void refine_codes(RefinedGroup& x, size_t group, float n, const float* REQUANT_RESTRICT hessian, size_t cols) {
  for (size_t i = 0; i < group; i++) {
    const float* REQUANT_RESTRICT h = hessian + i * cols;
    const float step = x.scale * h[i];
    if (step == 0.0f) continue;
    const float quotient = x.gradient[i] / step;
    float t = x.codes[i] + quotient;
    if (t != t) continue;
    t = t > 0.0f ? t : 0.0f;
    t = t < n ? t : n;
    const float code = (t + kRoundMagic) - kRoundMagic;
    if (code == x.codes[i]) continue;
    const float product = code * x.scale;
    const float e = x.w[i] - (product + x.bias);
    const float change = x.errors[i] - e;
    x.codes[i] = code;
    x.errors[i] = e;
    for (size_t k = 0; k < group; k++) x.gradient[k] -= change * h[k];
  }
}

// w: rows x cols, as it was before GPTQ. codes: rows x cols; scales, biases: rows x cols / group; all changed
// in place. hessian: cols x cols, symmetric, zeros for inputs whose codes stay. gradients: rows x cols and
// changes: rows x group, for the function's use.
template <class T>
inline void gptq_refine(const float* REQUANT_RESTRICT w, size_t rows, size_t cols, size_t group, int bits, int sweeps,
                        const float* REQUANT_RESTRICT hessian, uint8_t* REQUANT_RESTRICT codes,
                        typename T::Stored* REQUANT_RESTRICT scales, typename T::Stored* REQUANT_RESTRICT biases,
                        float* REQUANT_RESTRICT gradients, float* REQUANT_RESTRICT changes) {
  const float n = float((1 << bits) - 1);
  const size_t groups = cols / group;
  RefinedGroup x;
  const auto load = [&](size_t r, size_t number) {
    x.scale = T::load(scales[r * groups + number]);
    x.bias = T::load(biases[r * groups + number]);
    for (size_t i = 0; i < group; i++) {
      const size_t at = r * cols + number * group + i;
      x.w[i] = w[at];
      x.codes[i] = float(codes[at]);
      const float product = x.codes[i] * x.scale;
      x.errors[i] = x.w[i] - (product + x.bias);
    }
  };
  for (size_t i = 0; i < rows * cols; i++) gradients[i] = 0.0f;
  for (size_t number = 0; number < groups; number++) {
    for (size_t r = 0; r < rows; r++) {
      load(r, number);
      for (size_t i = 0; i < group; i++) changes[r * group + i] = -x.errors[i];
    }
    subtract_products(gradients, rows, cols, hessian, number * group, group, changes, 0, cols);
  }
  for (int sweep = 0; sweep < sweeps; sweep++)
    for (size_t number = 0; number < groups; number++) {
      const size_t start = number * group;
      const float* block = hessian + start * cols + start;
      float sums[kRefinedGroup];
      for (size_t k = 0; k < group; k++) sums[k] = 0.0f;
      for (size_t i = 0; i < group; i++)
        for (size_t k = 0; k < group; k++) sums[k] += block[i * cols + k];
      for (size_t r = 0; r < rows; r++) {
        float* REQUANT_RESTRICT change = changes + r * group;
        load(r, number);
        for (size_t i = 0; i < group; i++) {
          change[i] = x.errors[i];
          x.gradient[i] = gradients[r * cols + start + i];
        }
        if (x.scale != 0.0f)
          for (int pass = 0; pass < kRefinePasses; pass++) {
            refit_scale<T>(x, group, block, cols, sums);
            refine_codes(x, group, n, block, cols);
          }
        scales[r * groups + number] = T::store(x.scale);
        biases[r * groups + number] = T::store(x.bias);
        for (size_t i = 0; i < group; i++) {
          codes[r * cols + start + i] = uint8_t(x.codes[i]);
          change[i] -= x.errors[i];
        }
      }
      // Groups that are visited again need the gradient; in the last sweep those after this one do.
      const size_t first = sweep + 1 < sweeps ? 0 : start + group;
      subtract_products(gradients, rows, cols, hessian, start, group, changes, first, cols);
    }
}

}  // namespace
