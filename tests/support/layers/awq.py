"""AutoAWQ layers for the tests of the core: words in both orders, and a layer of zeros."""

import numpy as np

from requant.weights.awq import AwqLoadConfig

# AutoAWQ's own order: the lowest nibble of a word holds output 0, the next output 2, ...
OUTPUT_IN_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = AwqLoadConfig(group_size=32)


def awq_words(codes):
    """(rows, 8 n) codes -> (rows, n) AutoAWQ words, int32."""
    codes = np.asarray(codes, np.uint32)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, output in enumerate(OUTPUT_IN_NIBBLE):
        words |= codes[:, output::8] << np.uint32(4 * nibble)
    return words.view(np.int32)


def mlx_words(codes):
    """(rows, 8 n) codes -> (rows, n) words, first code in the lowest bits."""
    codes = np.asarray(codes, np.uint32)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble in range(8):
        words |= codes[:, nibble::8] << np.uint32(4 * nibble)
    return words


def stored(lib, name="up", *, n_in=64, words=2, groups=2, dtype="float16", zeros=True, value=0.5):
    """An AWQ layer; every code is 0, every zero 0."""
    parts = {
        f"{name}.qweight": lib.make(np.zeros((n_in, words)), "int32"),
        f"{name}.scales": lib.make(np.full((groups, 8 * words), value), dtype),
    }
    if zeros:
        parts[f"{name}.qzeros"] = lib.make(np.zeros((groups, words)), "int32")
    return parts
