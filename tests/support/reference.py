"""MLX's CPU numerics in NumPy, one operation at a time, written from their description.

Independent of the kernels and slow: what the kernels must equal, bit for bit. Values are
float32; ``T`` is the dtype of the weight and ``T(x)`` rounds to nearest even into it.
"""

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def wide(x):
    return x.astype(np.float32)


def rounded(x, dtype):
    """T(x), kept as float32."""
    return x.astype(np.float32).astype(dtype).astype(np.float32)


# ---------------------------------------------------------------- packing
def pack(codes, bits):
    """Codes (rows, n) as a little-endian bit stream of uint32 words."""
    rows, n = codes.shape
    planes = (codes[:, :, None] >> np.arange(bits)) & 1
    planes = planes.astype(np.uint8).reshape(rows, n * bits)
    stream = np.packbits(planes, axis=1, bitorder="little")
    return np.ascontiguousarray(stream).view(np.uint32).reshape(rows, n * bits // 32)


def unpack(words, bits):
    rows = words.shape[0]
    stream = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little"
    ).reshape(rows, words.shape[1] * 32 // bits, bits)
    return (stream.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.uint8)


# ---------------------------------------------------------------- affine
def affine_quantize(w, group_size, bits):
    """Codes (rows, n), and scales and biases in the dtype of w."""
    rows, n = w.shape
    x = wide(w).reshape(-1, group_size)
    hi = np.full(len(x), -np.inf, np.float32)
    lo = np.full(len(x), np.inf, np.float32)
    for column in x.T:
        hi = np.where(column > hi, column, hi)
        lo = np.where(column < lo, column, lo)
    eps, top = np.float32(1e-7), np.float32(2**bits - 1)
    if bits == 1:
        s = hi - lo
        s = np.where(s < eps, eps, s)
        beta = lo
    else:
        s = (hi - lo) / top
        s = np.where(s < eps, eps, s)
        low = np.abs(lo) > np.abs(hi)
        edge = np.where(low, lo, hi)
        s = np.where(low, s, -s)
        k = np.rint(edge / s)
        s, beta = np.where(k != 0, edge / k, s), np.where(k != 0, edge, np.float32(0))
    t = np.rint((x - beta[:, None]) / s[:, None])
    t = np.where(np.isnan(t), 0, np.clip(t, 0, top))
    shape = (rows, n // group_size)
    return (
        t.astype(np.uint8).reshape(rows, n),
        s.astype(w.dtype).reshape(shape),
        beta.astype(w.dtype).reshape(shape),
    )


def affine_dequantize(codes, scales, biases, group_size, dtype=None):
    rows, n = codes.shape
    promoted = scales.dtype if scales.dtype == biases.dtype else F32
    q = wide(codes).reshape(rows, -1, group_size)
    product = rounded(q * wide(scales)[:, :, None], scales.dtype)
    value = rounded(product + wide(biases)[:, :, None], promoted)
    return value.reshape(rows, n).astype(promoted).astype(dtype or promoted)


# ---------------------------------------------------------------- 8- and 4-bit floats
def decode_e4m3(code):
    code = np.asarray(code, np.uint8)
    field, m = (code >> 3) & 15, (code & 7).astype(np.float32)
    tiny = m * np.float32(2.0**-9)
    value = np.where(field == 0, tiny, np.ldexp(m + 8, field.astype(np.int32) - 10))
    value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


_E4M3_GRID = decode_e4m3(np.arange(0x7F)).astype(np.float64)


def encode_e4m3(x):
    """Nearest on the grid, a tie to the even code; NaN and everything from 448 on is 0x7e."""
    x = np.asarray(x, np.float32)
    a = np.abs(x).astype(np.float64)
    a = np.where(np.isnan(a), 448, np.minimum(a, 448))
    above = np.clip(np.searchsorted(_E4M3_GRID, a), 1, len(_E4M3_GRID) - 1)
    down, up = a - _E4M3_GRID[above - 1], _E4M3_GRID[above] - a
    code = np.where(down < up, above - 1, above)
    code = np.where(down == up, np.where(above % 2 == 0, above, above - 1), code)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def encode_e2m1(v):
    """Entry at the least distance (a float32 subtraction), the first on a tie; NaN gives 0."""
    distance = np.abs(np.asarray(v, np.float32)[..., None] - E2M1)
    return np.where(np.isnan(distance).any(-1), 0, distance.argmin(-1)).astype(np.uint8)


def e8m0(byte):
    """2^(byte - 127) in float32; 255 gives inf."""
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), np.asarray(byte, np.int32) - 127).astype(np.float32)


# ---------------------------------------------------------------- float modes
def mx_quantize(w, bits):
    """Codes, E8M0 bytes, and how many groups were flushed; w must be finite."""
    rows, n = w.shape
    x = wide(w).reshape(-1, 32)
    s = rounded(np.abs(x).max(-1) / np.float32(6 if bits == 4 else 448), w.dtype)
    mantissa, exponent = np.frexp(s.astype(np.float64))
    e = np.where(s == 0, 0, np.where(mantissa == 0.5, exponent - 1, exponent))
    flush = e < -127
    e = np.where(flush, 0, e)
    # Ordinary float64 holds the quotient, so only T rounds it.
    v = np.ldexp(x.astype(np.float64), -e[:, None]).astype(np.float32)
    v = rounded(v, w.dtype)
    codes = encode_e2m1(v) if bits == 4 else encode_e4m3(v)
    codes = np.where(flush[:, None], np.uint8(0), codes)
    return codes.reshape(rows, n), (e + 127).astype(np.uint8).reshape(rows, -1), int(flush.sum())


def mx_dequantize(codes, scales, bits, dtype):
    rows, n = codes.shape
    scale = rounded(e8m0(scales), dtype)[:, :, None]
    element = (E2M1[codes] if bits == 4 else decode_e4m3(codes)).reshape(rows, -1, 32)
    return (element * scale).reshape(rows, n).astype(dtype)


def nvfp4_quantize(w, global_scale=None):
    rows, n = w.shape
    x = wide(w).reshape(-1, 16)
    s = rounded(np.abs(x).max(-1) / np.float32(6), w.dtype)
    enc = np.float32(1) if global_scale is None else np.float32(2688) / np.float32(global_scale)
    scales = encode_e4m3(s * enc)
    v = rounded(x / decode_e4m3(scales)[:, None], w.dtype) * enc
    return encode_e2m1(v).reshape(rows, n), scales.reshape(rows, -1)


def nvfp4_dequantize(codes, scales, dtype, global_scale=None):
    rows, n = codes.shape
    scale = decode_e4m3(scales)[:, :, None]
    if global_scale is not None:
        scale = scale * (np.float32(global_scale) / np.float32(2688))
        dtype = F32
    return (E2M1[codes].reshape(rows, -1, 16) * scale).reshape(rows, n).astype(dtype)
