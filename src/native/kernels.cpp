// Compiled once for each instruction set, with REQUANT_ISA its name. Everything
// but the table is in an unnamed namespace and no standard inline function is
// used, so the linker cannot pick one set's code for another.

#include "kernels.h"

#include "affine.h"
#include "decode.h"
#include "gguf.h"
#include "gptq.h"
#include "minifloat.h"
#include "pack.h"
#include "repack.h"
#include "search_affine.h"
#include "search_float.h"
#include "values.h"

namespace {

using requant::Dtype;

template <class T>
struct Tag {
  using Type = T;
};

template <class Call>
REQUANT_INLINE auto with_dtype(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::F16: return call(Tag<F16>());
    case Dtype::BF16: return call(Tag<BF16>());
    default: return call(Tag<F32>());
  }
}

template <class S, class B>
struct Promoted {
  using Type = F32;
};
template <class S>
struct Promoted<S, S> {
  using Type = S;
};

void affine_quantize_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, int group_size, int bits,
                              uint32_t* words, void* scales, void* biases) {
  const size_t groups = rows * (cols / group_size);
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    switch (group_size) {
      case 32: return affine_quantize<T, 32>(w, groups, bits, words, scales, biases);
      case 64: return affine_quantize<T, 64>(w, groups, bits, words, scales, biases);
      case 128: return affine_quantize<T, 128>(w, groups, bits, words, scales, biases);
    }
  });
}

void affine_dequantize_dispatch(const uint32_t* words, const void* scales, Dtype scales_dtype, const void* biases,
                                Dtype biases_dtype, size_t rows, size_t cols, int group_size, int bits, void* out,
                                Dtype out_dtype) {
  const size_t groups = rows * (cols / group_size);
  with_dtype(scales_dtype, [&](auto s) {
    with_dtype(biases_dtype, [&](auto b) {
      with_dtype(out_dtype, [&](auto o) {
        using S = typename decltype(s)::Type;
        using B = typename decltype(b)::Type;
        using Out = typename decltype(o)::Type;
        using P = typename Promoted<S, B>::Type;
        switch (group_size) {
          case 32: return affine_dequantize<S, B, P, Out, 32>(words, scales, biases, groups, bits, out);
          case 64: return affine_dequantize<S, B, P, Out, 64>(words, scales, biases, groups, bits, out);
          case 128: return affine_dequantize<S, B, P, Out, 128>(words, scales, biases, groups, bits, out);
        }
      });
    });
  });
}

size_t mx_quantize_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, int bits, uint32_t* words,
                            uint8_t* scales) {
  const size_t groups = rows * (cols / 32);
  return with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    return bits == 4 ? mx_quantize<T, 4>(w, groups, words, scales) : mx_quantize<T, 8>(w, groups, words, scales);
  });
}

void mx_dequantize_dispatch(const uint32_t* words, const uint8_t* scales, size_t rows, size_t cols, int bits, void* out,
                            Dtype out_dtype) {
  const size_t groups = rows * (cols / 32);
  with_dtype(out_dtype, [&](auto o) {
    using Out = typename decltype(o)::Type;
    if (bits == 4)
      mx_dequantize<Out, 4>(words, scales, groups, out);
    else
      mx_dequantize<Out, 8>(words, scales, groups, out);
  });
}

void nvfp4_quantize_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, uint32_t* words, uint8_t* scales,
                             const float* global_scale) {
  with_dtype(dtype, [&](auto t) {
    nvfp4_quantize<typename decltype(t)::Type>(w, rows * (cols / 16), words, scales, global_scale);
  });
}

void nvfp4_dequantize_dispatch(const uint32_t* words, const uint8_t* scales, size_t rows, size_t cols,
                               const float* global_scale, void* out, Dtype out_dtype) {
  const float dec = global_scale != nullptr ? *global_scale / kNvfp4Max : 1.0f;
  with_dtype(out_dtype, [&](auto o) {
    nvfp4_dequantize<typename decltype(o)::Type>(words, scales, rows * (cols / 16), dec, out);
  });
}

template <class Call>
auto with_weights(const float* weights, Call call) {
  return weights != nullptr ? call(Tag<const float*>()) : call(Tag<void>());
}

template <class W>
constexpr bool weighted = !__is_same(typename W::Type, void);

void affine_search_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, int group_size, int bits,
                            const float* weights, bool best, uint32_t* words, void* scales, void* biases) {
  const size_t per_row = cols / group_size, groups = rows * per_row;
  with_dtype(dtype, [&](auto t) {
    with_weights(weights, [&](auto h) {
      using T = typename decltype(t)::Type;
      constexpr bool W = weighted<decltype(h)>;
      switch (group_size) {
        case 32: return affine_search<T, 32, W>(w, groups, per_row, bits, weights, best, words, scales, biases);
        case 64: return affine_search<T, 64, W>(w, groups, per_row, bits, weights, best, words, scales, biases);
        case 128: return affine_search<T, 128, W>(w, groups, per_row, bits, weights, best, words, scales, biases);
      }
    });
  });
}

size_t mx_search_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, int bits, const float* weights,
                          bool best, uint32_t* words, uint8_t* scales) {
  const size_t per_row = cols / 32, groups = rows * per_row;
  return with_dtype(dtype, [&](auto t) {
    return with_weights(weights, [&](auto h) {
      using T = typename decltype(t)::Type;
      constexpr bool W = weighted<decltype(h)>;
      return bits == 4 ? mx_search<T, 4, W>(w, groups, per_row, weights, best, words, scales)
                       : mx_search<T, 8, W>(w, groups, per_row, weights, best, words, scales);
    });
  });
}

void nvfp4_search_dispatch(const void* w, Dtype dtype, size_t rows, size_t cols, const float* weights, bool best,
                           uint32_t* words, uint8_t* scales, const float* global_scale) {
  const size_t per_row = cols / 16, groups = rows * per_row;
  with_dtype(dtype, [&](auto t) {
    with_weights(weights, [&](auto h) {
      nvfp4_search<typename decltype(t)::Type, weighted<decltype(h)>>(w, groups, per_row, weights, best, words, scales,
                                                                      global_scale);
    });
  });
}

void pack_words_dispatch(const uint8_t* codes, size_t rows, size_t cols, int bits, uint32_t* words) {
  pack_codes(bits, codes, rows * cols, reinterpret_cast<uint8_t*>(words));
}

void unpack_words_dispatch(const uint32_t* words, size_t rows, size_t cols, int bits, uint8_t* codes) {
  unpack_codes(bits, reinterpret_cast<const uint8_t*>(words), rows * cols, codes);
}

size_t cast_dispatch(const void* src, Dtype src_dtype, size_t count, void* dst, Dtype dst_dtype) {
  return with_dtype(src_dtype, [&](auto s) {
    return with_dtype(dst_dtype, [&](auto d) {
      return cast_values<typename decltype(s)::Type, typename decltype(d)::Type>(src, count, dst);
    });
  });
}

size_t count_nonfinite_dispatch(const void* w, Dtype dtype, size_t count) {
  return with_dtype(dtype, [&](auto t) { return count_nonfinite<typename decltype(t)::Type>(w, count); });
}

ptrdiff_t first_nonfinite_dispatch(const void* w, Dtype dtype, size_t count) {
  return with_dtype(dtype, [&](auto t) { return first_nonfinite<typename decltype(t)::Type>(w, count); });
}

void group_errors_dispatch(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, size_t count, size_t group_size,
                           float* group_max, double* out) {
  with_dtype(a_dtype, [&](auto s) {
    with_dtype(b_dtype, [&](auto t) {
      using A = typename decltype(s)::Type;
      using B = typename decltype(t)::Type;
      switch (group_size) {
        case 16: return group_errors<A, B, 16>(a, b, count, group_max, out);
        case 32: return group_errors<A, B, 32>(a, b, count, group_max, out);
        case 64: return group_errors<A, B, 64>(a, b, count, group_max, out);
        case 128: return group_errors<A, B, 128>(a, b, count, group_max, out);
      }
    });
  });
}

void transpose_dispatch(const void* src, size_t item_bytes, size_t rows, size_t cols, void* out) {
  switch (item_bytes) {
    case 1: return transpose<uint8_t>(src, rows, cols, out);
    case 2: return transpose<uint16_t>(src, rows, cols, out);
    case 4: return transpose<uint32_t>(src, rows, cols, out);
  }
}

void integer_values_dispatch(const uint8_t* codes, const float* scales, const float* zeros, size_t rows, size_t cols,
                             size_t group, Dtype difference, void* out, Dtype out_dtype) {
  with_dtype(difference, [&](auto d) {
    with_dtype(out_dtype, [&](auto o) {
      integer_values<typename decltype(d)::Type, typename decltype(o)::Type>(codes, scales, zeros, rows, cols, group,
                                                                             out);
    });
  });
}

size_t float8_values_dispatch(const uint8_t* bytes, bool fnuz, const float* scales, size_t rows, size_t cols,
                              size_t scale_cols, size_t block_rows, size_t block_cols, size_t first_row, void* out,
                              Dtype out_dtype) {
  return with_dtype(out_dtype, [&](auto o) {
    using Out = typename decltype(o)::Type;
    return fnuz ? float8_values<E4M3FNUZ, Out>(bytes, scales, rows, cols, scale_cols, block_rows, block_cols,
                                               first_row, out)
                : float8_values<E4M3FN, Out>(bytes, scales, rows, cols, scale_cols, block_rows, block_cols,
                                             first_row, out);
  });
}

void extract_bitfield_dispatch(const void* src, size_t item_bytes, size_t rows, size_t cols, int shift, int bits,
                               uint8_t flip, uint8_t* out, size_t first, size_t step) {
  if (item_bytes == 1)
    extract_bitfield<uint8_t>(src, rows, cols, shift, bits, flip, out, first, step);
  else
    extract_bitfield<uint32_t>(src, rows, cols, shift, bits, flip, out, first, step);
}

void lut_values_dispatch(const uint8_t* bytes, size_t count, bool high_first, const float* codebook,
                         const float* absmax, size_t block, size_t first, void* out, Dtype out_dtype) {
  with_dtype(out_dtype, [&](auto o) {
    lut_values<typename decltype(o)::Type>(bytes, count, high_first, codebook, absmax, block, first, out);
  });
}

template <class T, class = void>
struct IsFp4 {
  static constexpr int kScaleBytes = 0;
};
template <class T>
struct IsFp4<T, decltype(void(T::kScaleBytes))> {
  static constexpr int kScaleBytes = T::kScaleBytes;
};

bool gguf_block_dispatch(int type, requant::GgufBlock& block) {
  return with_block(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kScaleBytes = IsFp4<T>::kScaleBytes;
    block = {T::kElements, T::kBytes, T::kBits, T::kGroup, kScaleBytes != 0, kScaleBytes};
  });
}

void gguf_affine_dispatch(int type, const uint8_t* blocks, size_t count, uint32_t* words, void* scales, void* biases,
                          Dtype dtype) {
  with_block(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (T::kBits != 0)
      with_dtype(dtype,
                 [&](auto s) { gguf_affine<T, typename decltype(s)::Type>(blocks, count, words, scales, biases); });
  });
}

void gguf_fp4_dispatch(int type, const uint8_t* blocks, size_t count, uint32_t* words, uint8_t* scales) {
  with_block(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (IsFp4<T>::kScaleBytes != 0) gguf_fp4<T>(blocks, count, words, scales);
  });
}

void gguf_values_dispatch(int type, const uint8_t* blocks, size_t count, void* out, Dtype dtype) {
  with_block(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    with_dtype(dtype, [&](auto o) { gguf_values<T, typename decltype(o)::Type>(blocks, count, out); });
  });
}

}  // namespace

#define REQUANT_JOIN_(a, b) a##b
#define REQUANT_JOIN(a, b) REQUANT_JOIN_(a, b)
#define REQUANT_TEXT_(a) #a
#define REQUANT_TEXT(a) REQUANT_TEXT_(a)

namespace requant {

extern const Kernels REQUANT_JOIN(kernels_, REQUANT_ISA);
const Kernels REQUANT_JOIN(kernels_, REQUANT_ISA) = {
    REQUANT_TEXT(REQUANT_ISA), affine_quantize_dispatch, affine_dequantize_dispatch,
    mx_quantize_dispatch,      mx_dequantize_dispatch,   nvfp4_quantize_dispatch,
    nvfp4_dequantize_dispatch, affine_search_dispatch,   mx_search_dispatch,
    nvfp4_search_dispatch,     gptq_group,               pack_words_dispatch,
    unpack_words_dispatch,     cast_dispatch,            count_nonfinite_dispatch,
    first_nonfinite_dispatch,  group_errors_dispatch,    transpose_dispatch,
    stream_columns,            planar_columns,           marlin_words,
    awq_gemv_fast_words,       stream_codes,             extract_bitfield_dispatch,
    deinterleave_words,        integer_values_dispatch,  float8_values_dispatch,
    lut_values_dispatch,       gguf_block_dispatch,      gguf_affine_dispatch,
    gguf_fp4_dispatch,         gguf_values_dispatch,
};

}  // namespace requant
