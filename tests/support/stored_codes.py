"""Layers of codes as formats store them, with random codes, and steps over them."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from requant.core.dtypes import TensorInfo
from requant.formats.gguf import GgufBlocks
from requant.formats.widening import MlxRows
from requant.kernels.gguf import BY_NAME
from requant.kernels.quantize import quantize
from requant.packings.awq import AwqFast, AwqGemm, AwqGemv, gemv_width
from requant.packings.base import Packing
from requant.packings.compressed_tensors import CtPacked, packed_words
from requant.packings.compressed_tensors import Zeros as CtZeros
from requant.packings.gptq import Gptq, Zeros
from requant.planning.plan import EncodeParams, Operation, OutputTensor, RowMapping, Step
from requant.quantization.config import Quantization
from tests.support.unit_files import Files

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS, COLUMNS = 192, 256
"""Of a layer; a benchmark takes larger ones."""
Case = tuple[Packing, dict[str, np.ndarray]]


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, np.uint32).view(np.int32)


def scales(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Positive and negative; products with zeros round."""
    return (rng.standard_normal(shape) * 0.03).astype(dtype)


def awq(rng: np.random.Generator, bits: int, group: int, *, zeros: bool = True) -> Case:
    groups = COLUMNS // group
    tensors = {
        "qweight": random_words(rng, COLUMNS, ROWS * bits // 32),
        "scales": scales(rng, groups, ROWS),
    }
    if zeros:
        tensors["qzeros"] = random_words(rng, groups, ROWS * bits // 32)
    return AwqGemm(ROWS, COLUMNS, bits, group, not zeros, "F16", zeros), tensors


def awq_gemv(rng: np.random.Generator) -> Case:
    width = gemv_width(COLUMNS // 64, 64)
    assert width is not None
    return AwqGemv(ROWS, COLUMNS, 4, 64, False, "F16"), {
        "qweight": random_words(rng, ROWS, COLUMNS // 8),
        "qzeros": random_words(rng, ROWS, width),
        "scales": scales(rng, ROWS, 8 * width),
    }


def awq_fast(rng: np.random.Generator) -> Case:
    return AwqFast(ROWS, COLUMNS, 4, 128, False, "F16"), {
        "qweight": random_words(rng, ROWS // 4, COLUMNS // 2).view(np.int16),
        "scales": scales(rng, 8, ROWS),
        "qzeros": scales(rng, 8, ROWS),
    }


def gptq(
    rng: np.random.Generator,
    bits: int,
    group: int = 64,
    stored: Zeros = Zeros.AS_STORED,
    *,
    planar: bool = False,
    zeros: bool = True,
    dtype: str = "F16",
) -> Case:
    groups = COLUMNS // group
    tensors = {
        "qweight": random_words(rng, COLUMNS * bits // 32, ROWS),
        "scales": scales(rng, groups, ROWS, dtype=np.float16 if dtype == "F16" else BF16),
    }
    if zeros:
        tensors["qzeros"] = random_words(rng, groups, ROWS * bits // 32)
    packing = Gptq(ROWS, COLUMNS, bits, group, not zeros, dtype, planar, stored, has_zeros=zeros)
    return packing, tensors


def compressed(
    rng: np.random.Generator, bits: int, zeros: CtZeros, *, padded: bool, matrix: int = ROWS
) -> Case:
    """Matrices of 64 rows, where there are more than one, do not end with a word of zeros."""
    groups, experts = COLUMNS // 32, ROWS // matrix
    tensors = {
        "weight_packed": random_words(rng, ROWS, packed_words(COLUMNS, bits, padded)),
        "weight_scale": scales(rng, ROWS, groups, dtype=BF16),
    }
    if zeros is CtZeros.PACKED:
        high = packed_words(matrix, bits, padded)
        tensors["weight_zero_point"] = random_words(rng, experts * high, groups)
    symmetric = zeros is CtZeros.MIDDLE
    return CtPacked(
        ROWS, COLUMNS, bits, 32, symmetric, "BF16", matrix, 1, groups, zeros, padded
    ), tensors


def gguf(rng: np.random.Generator, name: str) -> Case:
    kind = BY_NAME[name]
    width = COLUMNS // kind.elements * kind.nbytes
    blocks = rng.integers(0, 256, (ROWS, width), np.uint8)
    each = blocks.reshape(ROWS, -1, kind.nbytes)
    if name == "MXFP4":
        each[:, :, 0] = rng.integers(100, 140, each.shape[:2])
    elif name == "NVFP4":
        each[:, :, :4] = rng.integers(0, 0x80, (*each.shape[:2], 4))
    else:  # the high bytes of float16 scales: no infinities
        at = {"Q4_0": [1], "Q4_1": [1, 3], "Q8_0": [1], "Q4_K": [1, 3], "Q6_K": [209]}[name]
        each[:, :, at] = rng.integers(0x20, 0x30, (*each.shape[:2], len(at)))
    packing = GgufBlocks(ROWS, COLUMNS, ROWS, kind.number, width)
    return packing, {"weight": blocks}


def mlx(rng: np.random.Generator, mode: str, bits: int, group: int) -> Case:
    target = Quantization(group, bits, mode)
    made = quantize(rng.standard_normal((ROWS, COLUMNS)).astype(BF16), target)
    tensors = {"weight": made.words, "scales": made.scales}
    if made.biases is not None:
        tensors["biases"] = made.biases
    return MlxRows(ROWS, COLUMNS, target, ("BF16",) * (len(tensors) - 1)), tensors


REPACKED: dict[str, Callable[[np.random.Generator], Case]] = {
    "awq": lambda rng: awq(rng, 4, 64),
    "awq, one group a row": lambda rng: awq(rng, 4, 256),
    "awq, no zeros": lambda rng: awq(rng, 4, 32, zeros=False),
    "awq, 8 bits": lambda rng: awq(rng, 8, 64),
    "awq, 5 bits": lambda rng: awq(rng, 5, 64),
    "awq, 7 bits": lambda rng: awq(rng, 7, 64),
    "awq gemv": awq_gemv,
    "awq gemv_fast": awq_fast,
    "gptq": lambda rng: gptq(rng, 4),
    "gptq v1": lambda rng: gptq(rng, 4, 128, Zeros.PLUS_ONE),
    "gptq v1 by words": lambda rng: gptq(rng, 4, 32, Zeros.WORD_PLUS_ONE),
    "gptq, 2 bits": lambda rng: gptq(rng, 2, 64, Zeros.PLUS_ONE),
    "gptq, 3 bits": lambda rng: gptq(rng, 3, 64, Zeros.WORD_PLUS_ONE),
    "gptq, 8 bits": lambda rng: gptq(rng, 8, 256),
    "gptq, no zeros, bfloat16": lambda rng: gptq(rng, 4, zeros=False, dtype="BF16"),
    "gptq, planes of 7 bits": lambda rng: gptq(rng, 7, planar=True, zeros=False),
    "gptq, planes of 5 bits": lambda rng: gptq(rng, 5, planar=True, zeros=False),
    "compressed-tensors": lambda rng: compressed(rng, 4, CtZeros.MIDDLE, padded=False),
    "compressed-tensors, 3 bits, padded": lambda rng: compressed(
        rng, 3, CtZeros.MIDDLE, padded=True
    ),
    "compressed-tensors, zeros": lambda rng: compressed(
        rng, 4, CtZeros.PACKED, padded=False, matrix=24
    ),
    "compressed-tensors, zeros, 6 bits, padded": lambda rng: compressed(
        rng, 6, CtZeros.PACKED, padded=True, matrix=64
    ),
    "Q4_0": lambda rng: gguf(rng, "Q4_0"),
    "Q4_1": lambda rng: gguf(rng, "Q4_1"),
    "Q8_0": lambda rng: gguf(rng, "Q8_0"),
    "Q4_K": lambda rng: gguf(rng, "Q4_K"),
    "MXFP4": lambda rng: gguf(rng, "MXFP4"),
    "NVFP4": lambda rng: gguf(rng, "NVFP4"),
}
DECODED: dict[str, Callable[[np.random.Generator], Case]] = {
    "affine": lambda rng: mlx(rng, "affine", 3, 64),
    "mxfp4": lambda rng: mlx(rng, "mxfp4", 4, 32),
    "mxfp8": lambda rng: mlx(rng, "mxfp8", 8, 32),
    "nvfp4": lambda rng: mlx(rng, "nvfp4", 4, 16),
    "Q6_K": lambda rng: gguf(rng, "Q6_K"),
    "Q4_0": lambda rng: gguf(rng, "Q4_0"),
}


def step_of(
    files: Files, packing: Packing, operation: Operation, dtype: str = "F16", above: int = 32
) -> Step:
    """All rows of a packing, with so many rows above them in the output."""
    target: Quantization | None = getattr(packing, "encoding", None)
    encode = None
    if operation is Operation.RECODE:
        target = Quantization.affine(32, 8)
        encode = EncodeParams(target=target)
    elif operation is Operation.DECODE:
        target = None
    high = ROWS + above
    infos = {"weight": TensorInfo(dtype, (high, COLUMNS))}
    if target is not None:
        groups = high, COLUMNS // target.group_size
        infos = {"weight": TensorInfo("U32", (high, COLUMNS * target.bits // 32))}
        infos["scales"] = TensorInfo(dtype if target.mode.has_biases else "U8", groups)
        if target.mode.has_biases:
            infos["biases"] = infos["scales"]
    placed, offset = {}, 40
    for role, info in infos.items():
        placed[role] = OutputTensor(f"w.{role}", info, "out", offset)
        offset += info.nbytes + 8
    return Step(
        layer="w",
        operation=operation,
        rows=RowMapping(count=ROWS, columns=COLUMNS, output_row=above),
        inputs=files.inputs,
        outputs=placed,
        encode=encode,
        repack=target if operation is Operation.REPACK else None,
        dtype=dtype,
        packing=packing,
    )
