"""Layers in the layouts of AWQ and GPTQ tools, packed bit by bit from the written facts.

Codes are ``(out, in)``, zeros and scales ``(out, groups)``. Nothing here is shared with the
readers under test.
"""

from collections.abc import Iterable

import numpy as np

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a gemm word holds column INTERLEAVED[i]
Tensors = dict[str, np.ndarray]


def stream(codes: Iterable[int], bits: int) -> list[int]:
    """32-bit words of one little-endian bit stream."""
    value = count = 0
    for code in codes:
        value |= int(code) << (bits * count)
        count += 1
    return [(value >> (32 * n)) & 0xFFFFFFFF for n in range(-(-count * bits // 32))]


def streams(rows: np.ndarray, bits: int) -> np.ndarray:
    """A stream a row, int32 as tools store it."""
    words = np.array([stream(row, bits) for row in rows.tolist()], np.uint32)
    return words.reshape(rows.shape[0], -1).view(np.int32)


def gemm(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int = 4) -> Tensors:
    def interleave(matrix: np.ndarray) -> np.ndarray:  # along the outputs, eight at a time
        blocks = matrix.reshape(matrix.shape[0], -1, 8)[:, :, INTERLEAVED]
        return streams(blocks.reshape(matrix.shape), bits)

    return {
        "qweight": interleave(codes.T.copy()),
        "qzeros": interleave(zeros.T.copy()),
        "scales": scales.T.copy(),
    }


def gemv(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Tensors:
    out, n_in = codes.shape
    groups = zeros.shape[1]
    group = n_in // groups
    multiple = {64: 2, 32: 4}.get(group, 1)
    width = -(-(-(-groups // 8)) // multiple) * multiple  # noqa: B002
    padded_zeros = np.zeros((out, 8 * width), np.int64)
    padded_zeros[:, :groups] = zeros
    padded_scales = np.zeros((out, 8 * width), scales.dtype)
    padded_scales[:, :groups] = scales
    return {
        "qweight": streams(codes, 4),
        "qzeros": streams(padded_zeros, 4),
        "scales": padded_scales,
    }


def fast(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, role: str) -> Tensors:
    out, n_in = codes.shape
    words = np.zeros((out // 4, n_in), np.uint16)
    for row in range(out):
        for k in range(n_in):
            word = 64 * (k // 64) + 16 * (row % 4) + 8 * ((k % 64) // 32) + k % 8
            words[row // 4, word] |= int(codes[row, k]) << (4 * ((k % 32) // 8))
    groups = zeros.shape[1]
    multiple = {64: 2, 32: 4}.get(n_in // groups, 1)
    height = 8 * (-(-(-(-groups // 8)) // multiple) * multiple)  # noqa: B002
    biases = (-(scales.astype(np.float32) * zeros.astype(np.float32))).astype(scales.dtype)
    stored = {"scales": scales, role: biases}
    tensors = {"qweight": words.view(np.int16)}
    for name, values in stored.items():
        tensors[name] = np.zeros((height, out), scales.dtype)
        tensors[name][:groups] = values.T
    return tensors


def marlin(codes: np.ndarray, scales: np.ndarray, names: tuple[str, str]) -> Tensors:
    out, n_in = codes.shape
    words = np.zeros((n_in // 16, 2 * out), np.uint32)
    for row in range(n_in // 16):
        for tile in range(out // 64):
            for lane in range(32):
                for t in range(4):
                    n = 64 * tile + 16 * t + lane // 4
                    k = 16 * row + 2 * (lane % 4)
                    held = [(k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)]
                    held += [(k + 1, n), (k + 9, n), (k + 1, n + 8), (k + 9, n + 8)]
                    word = sum(int(codes[b, a]) << (4 * i) for i, (a, b) in enumerate(held))
                    words[row, 128 * tile + 4 * lane + t] = word
    true = scales.T
    stored = np.empty_like(true)
    for column in range(out):
        if true.shape[0] > 1:
            base, i, j = column // 64 * 64, (column % 64) // 8, column % 8
            stored[:, column] = true[:, base + i + 8 * j]
        else:
            base, i, t = column // 32 * 32, (column % 32) // 8, column % 8
            stored[:, column] = true[:, base + 2 * i + [0, 1, 8, 9, 16, 17, 24, 25][t]]
    return {names[0]: words.view(np.int32), names[1]: stored}


def planes(row: Iterable[int], bits: int) -> list[int]:
    """Words of blocks of 32 codes, plane by plane; the last block may be short."""
    codes = [int(code) for code in row]
    words: list[int] = []
    for first in range(0, len(codes), 32):
        block = codes[first : first + 32] + [0] * 32
        low = 0
        for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
            per_word = 32 // width
            for word in range(width):
                held = block[word * per_word : (word + 1) * per_word]
                mask = (1 << width) - 1
                words.append(sum(((c >> low) & mask) << (width * j) for j, c in enumerate(held)))
            low += width
    return words


def gptq(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    bits: int,
    *,
    planar: bool = False,
    stored_minus: int = 0,
) -> Tensors:
    """``zeros - stored_minus`` goes into the file, modulo 2^bits."""
    fields = (zeros - stored_minus) % (1 << bits)

    def pack(rows: np.ndarray) -> np.ndarray:
        if not planar:
            return streams(rows, bits)
        width = -(-rows.shape[1] * bits // 32)
        words = np.array([planes(row, bits)[:width] for row in rows.tolist()], np.uint32)
        return words.view(np.int32)

    return {
        "qweight": np.ascontiguousarray(pack(codes).T),
        "qzeros": pack(fields.T.copy()),
        "scales": scales.T.copy(),
    }
