// Compiled once for each instruction set, with REQUANT_ISA its name. Everything
// but the table is in an unnamed namespace and no standard inline function is
// used, so the linker cannot pick one set's code for another.

#include "kernels.h"

#include "affine.h"
#include "decode.h"
#include "gguf.h"
#include "gptq.h"
#include "measure.h"
#include "minifloat.h"
#include "pack.h"
#include "repack.h"
#include "column_sums.h"
#include "search_affine.h"
#include "search_float.h"
#include "values.h"

namespace {

using requant::Affine;
using requant::AffineTensors;
using requant::Bitfield;
using requant::ConstAffineTensors;
using requant::ConstEncoded;
using requant::ConstFloatTensors;
using requant::ConstMatrix;
using requant::ConstValues;
using requant::Dtype;
using requant::Elements;
using requant::Encoded;
using requant::EncodingError;
using requant::Float8Blocks;
using requant::FloatTensors;
using requant::GgufBlocks;
using requant::GptqGroup;
using requant::GptqRefinement;
using requant::IntegerCodes;
using requant::LutBlocks;
using requant::Matrix;
using requant::Mode;
using requant::OutRows;
using requant::PackedColumns;
using requant::PackedRows;
using requant::Search;
using requant::SpacedRows;
using requant::Target;
using requant::Values;

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

void affine_quantize_dispatch(ConstMatrix w, Affine mode, AffineTensors out) {
  const size_t groups = w.rows * (w.cols / mode.group_size);
  with_dtype(w.dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    switch (mode.group_size) {
      case 32: return affine_quantize<T, 32>(w.data, groups, mode.bits, out.words, out.scales, out.biases);
      case 64: return affine_quantize<T, 64>(w.data, groups, mode.bits, out.words, out.scales, out.biases);
      case 128: return affine_quantize<T, 128>(w.data, groups, mode.bits, out.words, out.scales, out.biases);
    }
  });
}

void affine_dequantize_dispatch(ConstAffineTensors in, Affine mode, Matrix out) {
  const size_t groups = out.rows * (out.cols / mode.group_size);
  const void *scales = in.scales.data, *biases = in.biases.data;
  with_dtype(in.scales.dtype, [&](auto s) {
    with_dtype(in.biases.dtype, [&](auto b) {
      with_dtype(out.dtype, [&](auto o) {
        using S = typename decltype(s)::Type;
        using B = typename decltype(b)::Type;
        using Out = typename decltype(o)::Type;
        using P = typename Promoted<S, B>::Type;
        switch (mode.group_size) {
          case 32: return affine_dequantize<S, B, P, Out, 32>(in.words, scales, biases, groups, mode.bits, out.data);
          case 64: return affine_dequantize<S, B, P, Out, 64>(in.words, scales, biases, groups, mode.bits, out.data);
          case 128: return affine_dequantize<S, B, P, Out, 128>(in.words, scales, biases, groups, mode.bits, out.data);
        }
      });
    });
  });
}

size_t mx_quantize_dispatch(ConstMatrix w, int bits, FloatTensors out) {
  const size_t groups = w.rows * (w.cols / 32);
  return with_dtype(w.dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    return bits == 4 ? mx_quantize<T, 4>(w.data, groups, out.words, out.scales)
                     : mx_quantize<T, 8>(w.data, groups, out.words, out.scales);
  });
}

void mx_dequantize_dispatch(ConstFloatTensors in, int bits, Matrix out) {
  const size_t groups = out.rows * (out.cols / 32);
  with_dtype(out.dtype, [&](auto o) {
    using Out = typename decltype(o)::Type;
    if (bits == 4)
      mx_dequantize<Out, 4>(in.words, in.scales, groups, out.data);
    else
      mx_dequantize<Out, 8>(in.words, in.scales, groups, out.data);
  });
}

void nvfp4_quantize_dispatch(ConstMatrix w, const float* global_scale, FloatTensors out) {
  with_dtype(w.dtype, [&](auto t) {
    nvfp4_quantize<typename decltype(t)::Type>(w.data, w.rows * (w.cols / 16), out.words, out.scales, global_scale);
  });
}

void nvfp4_dequantize_dispatch(ConstFloatTensors in, const float* global_scale, Matrix out) {
  const float dec = global_scale != nullptr ? *global_scale / kNvfp4Max : 1.0f;
  with_dtype(out.dtype, [&](auto o) {
    nvfp4_dequantize<typename decltype(o)::Type>(in.words, in.scales, out.rows * (out.cols / 16), dec, out.data);
  });
}

template <class Call>
auto with_weights(const Search& search, Call call) {
  return search.weights != nullptr || search.by_magnitude ? call(Tag<const float*>()) : call(Tag<void>());
}

template <class W>
constexpr bool weighted = !__is_same(typename W::Type, void);

void affine_search_dispatch(ConstMatrix w, Affine mode, Search search, AffineTensors out) {
  const size_t per_row = w.cols / mode.group_size, groups = w.rows * per_row;
  with_dtype(w.dtype, [&](auto t) {
    with_weights(search, [&](auto h) {
      using T = typename decltype(t)::Type;
      constexpr bool W = weighted<decltype(h)>;
      const auto take = [&](auto kernel) {
        kernel(w.data, groups, per_row, mode.bits, search, out.words, out.scales, out.biases);
      };
      switch (mode.group_size) {
        case 32: return take(affine_search<T, 32, W>);
        case 64: return take(affine_search<T, 64, W>);
        case 128: return take(affine_search<T, 128, W>);
      }
    });
  });
}

size_t mx_search_dispatch(ConstMatrix w, int bits, Search search, FloatTensors out) {
  const size_t per_row = w.cols / 32, groups = w.rows * per_row;
  return with_dtype(w.dtype, [&](auto t) {
    return with_weights(search, [&](auto h) {
      using T = typename decltype(t)::Type;
      constexpr bool W = weighted<decltype(h)>;
      const auto take = [&](auto kernel) {
        return kernel(w.data, groups, per_row, search, out.words, out.scales);
      };
      return bits == 4 ? take(mx_search<T, 4, W>) : take(mx_search<T, 8, W>);
    });
  });
}

void nvfp4_search_dispatch(ConstMatrix w, const float* global_scale, Search search, FloatTensors out) {
  const size_t per_row = w.cols / 16, groups = w.rows * per_row;
  with_dtype(w.dtype, [&](auto t) {
    with_weights(search, [&](auto h) {
      nvfp4_search<typename decltype(t)::Type, weighted<decltype(h)>>(
          w.data, groups, per_row, search, out.words, out.scales, global_scale);
    });
  });
}

template <bool ENCODE>
void measure_dispatch(ConstMatrix w, Target target, Encoded codes, EncodingError& error) {
  const size_t groups = w.rows * (w.cols / target.group_size);
  with_dtype(w.dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    if (target.mode == Mode::Nvfp4) return measure_nvfp4<T, ENCODE>(w.data, groups, codes, error);
    if (target.mode == Mode::Mx)
      return target.bits == 4 ? measure_mx<T, 4, ENCODE>(w.data, groups, codes, error)
                              : measure_mx<T, 8, ENCODE>(w.data, groups, codes, error);
    switch (target.group_size) {
      case 32: return measure_affine<T, 32, ENCODE>(w.data, groups, target.bits, codes, error);
      case 64: return measure_affine<T, 64, ENCODE>(w.data, groups, target.bits, codes, error);
      case 128: return measure_affine<T, 128, ENCODE>(w.data, groups, target.bits, codes, error);
    }
  });
}

void measure_codes_dispatch(ConstMatrix w, Target target, ConstEncoded codes, EncodingError& error) {
  // Nothing is written without ENCODE.
  const Encoded same = {const_cast<uint32_t*>(codes.words), const_cast<void*>(codes.scales),
                        const_cast<void*>(codes.biases)};
  measure_dispatch<false>(w, target, same, error);
}

void gptq_group_dispatch(const GptqGroup& g) {
  gptq_group(g.w, g.rows, g.cols, g.start, g.size, g.bits, g.scales, g.biases, g.propagation, g.codes, g.errors);
}

void gptq_refine_dispatch(const GptqRefinement& x) {
  with_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    using Stored = typename T::Stored;
    gptq_refine<T>(x.w, x.rows, x.cols, x.size, x.bits, x.sweeps, x.hessian, x.codes, static_cast<Stored*>(x.scales),
                   static_cast<Stored*>(x.biases), x.gradients, x.changes);
  });
}

void pack_words_dispatch(const uint8_t* codes, size_t rows, size_t cols, int bits, uint32_t* words) {
  pack_codes(bits, codes, rows * cols, reinterpret_cast<uint8_t*>(words));
}

void unpack_words_dispatch(const uint32_t* words, size_t rows, size_t cols, int bits, uint8_t* codes) {
  unpack_codes(bits, reinterpret_cast<const uint8_t*>(words), rows * cols, codes);
}

size_t cast_dispatch(ConstValues src, size_t count, Values dst) {
  return with_dtype(src.dtype, [&](auto s) {
    return with_dtype(dst.dtype, [&](auto d) {
      return cast_values<typename decltype(s)::Type, typename decltype(d)::Type>(src.data, count, dst.data);
    });
  });
}

size_t count_nonfinite_dispatch(ConstValues w, size_t count) {
  return with_dtype(w.dtype, [&](auto t) { return count_nonfinite<typename decltype(t)::Type>(w.data, count); });
}

ptrdiff_t first_nonfinite_dispatch(ConstValues w, size_t count) {
  return with_dtype(w.dtype, [&](auto t) { return first_nonfinite<typename decltype(t)::Type>(w.data, count); });
}

void transpose_dispatch(const Elements& src, OutRows out) {
  switch (src.item_bytes) {
    case 1: return transpose<uint8_t>(src.data, src.rows, src.cols, out);
    case 2: return transpose<uint16_t>(src.data, src.rows, src.cols, out);
    case 4: return transpose<uint32_t>(src.data, src.rows, src.cols, out);
  }
}

void integer_values_dispatch(const IntegerCodes& in, Matrix out) {
  with_dtype(in.difference, [&](auto d) {
    with_dtype(out.dtype, [&](auto o) {
      integer_values<typename decltype(d)::Type, typename decltype(o)::Type>(in.codes, in.scales, in.zeros, out.rows,
                                                                             out.cols, in.group, out.data);
    });
  });
}

size_t float8_values_dispatch(const Float8Blocks& in, Matrix out) {
  return with_dtype(out.dtype, [&](auto o) {
    using Out = typename decltype(o)::Type;
    const auto take = [&](auto kernel) {
      return kernel(in.bytes, in.scales, out.rows, out.cols, in.scale_cols, in.block_rows, in.block_cols, in.first_row,
                    out.data);
    };
    return in.fnuz ? take(float8_values<E4M3FNUZ, Out>) : take(float8_values<E4M3FN, Out>);
  });
}

void stream_columns_dispatch(const PackedColumns& src, bool interleaved, bool is_signed, OutRows out, int out_bits) {
  stream_columns(src.words, src.n_in, src.n_out, src.bits, interleaved, is_signed, out, out_bits);
}

void planar_columns_dispatch(const PackedColumns& src, OutRows out, int out_bits) {
  planar_columns(src.words, src.n_in, src.n_out, src.bits, out, out_bits);
}

void stream_codes_dispatch(const PackedRows& src, uint8_t* codes) {
  stream_codes(src.data, src.rows, src.words, src.bits, src.per_word, src.count, codes);
}

void extract_bitfield_dispatch(const Elements& src, Bitfield field, SpacedRows out) {
  const auto take = [&](auto kernel) {
    kernel(src.data, src.rows, src.cols, field.shift, field.bits, field.flip, out.data, out.first, out.step);
  };
  if (src.item_bytes == 1)
    take(extract_bitfield<uint8_t>);
  else
    take(extract_bitfield<uint32_t>);
}

void column_sums_dispatch(ConstMatrix w, double* magnitudes, double* squares) {
  with_dtype(w.dtype,
             [&](auto t) { column_sums<typename decltype(t)::Type>(w.data, w.rows, w.cols, magnitudes, squares); });
}

void weighted_errors_dispatch(ConstMatrix a, const void* b, size_t group_size, Search search, requant::ErrorSums& sums) {
  with_dtype(a.dtype, [&](auto t) {
    weighted_errors<typename decltype(t)::Type>(a.data, b, a.rows, a.cols, group_size, search.weights,
                                                search.by_magnitude, sums);
  });
}

void lut_values_dispatch(const LutBlocks& in, size_t count, Values out) {
  with_dtype(out.dtype, [&](auto o) {
    lut_values<typename decltype(o)::Type>(in.bytes, count, in.high_first, in.codebook, in.absmax, in.block, in.first,
                                           out.data);
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

void gguf_affine_dispatch(GgufBlocks in, AffineTensors out, Dtype dtype) {
  with_block(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (T::kBits != 0)
      with_dtype(dtype, [&](auto s) {
        gguf_affine<T, typename decltype(s)::Type>(in.data, in.count, out.words, out.scales, out.biases);
      });
  });
}

void gguf_fp4_dispatch(GgufBlocks in, FloatTensors out) {
  with_block(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (IsFp4<T>::kScaleBytes != 0) gguf_fp4<T>(in.data, in.count, out.words, out.scales);
  });
}

void gguf_values_dispatch(GgufBlocks in, Values out) {
  with_block(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    with_dtype(out.dtype, [&](auto o) { gguf_values<T, typename decltype(o)::Type>(in.data, in.count, out.data); });
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
    REQUANT_TEXT(REQUANT_ISA),  affine_quantize_dispatch,   affine_dequantize_dispatch,
    mx_quantize_dispatch,       mx_dequantize_dispatch,     nvfp4_quantize_dispatch,
    nvfp4_dequantize_dispatch,  affine_search_dispatch,     mx_search_dispatch,
    nvfp4_search_dispatch,      measure_dispatch<true>,     measure_codes_dispatch,
    total_errors,               gptq_group_dispatch,        gptq_refine_dispatch,
    pack_words_dispatch,        unpack_words_dispatch,
    cast_dispatch,              count_nonfinite_dispatch,   first_nonfinite_dispatch,
    column_sums_dispatch,       weighted_errors_dispatch,   transpose_dispatch,
    stream_columns_dispatch,
    planar_columns_dispatch,    marlin_words,               awq_gemv_fast_words,
    stream_codes_dispatch,      extract_bitfield_dispatch,  deinterleave_words,
    integer_values_dispatch,    float8_values_dispatch,     lut_values_dispatch,
    gguf_block_dispatch,        gguf_affine_dispatch,       gguf_fp4_dispatch,
    gguf_values_dispatch,
};

}  // namespace requant
