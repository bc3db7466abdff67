// One group of columns of a layer: codes column by column, the error of each column propagated
// to the later columns.
//
// Rows are independent, and every sum runs in the order of the columns: no result depends on
// how many rows come at once or how wide the vectors are.

#pragma once

#include "floats.h"

namespace {

constexpr int kTile = 512;  // columns of the trailing update that stay in the cache

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
  for (size_t from = end; from < cols; from += kTile) {
    const size_t count = cols - from < size_t(kTile) ? cols - from : size_t(kTile);
    for (size_t r = 0; r < rows; r++) {
      float* REQUANT_RESTRICT row = w + r * cols + from;
      const float* REQUANT_RESTRICT e = errors + r * group;
      for (size_t j = 0; j < group; j += 4) {
        const float* REQUANT_RESTRICT a = propagation + (start + j) * cols + from;
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

}  // namespace
