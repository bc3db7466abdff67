"""FP8 and MX layers of any tool: which part of a weight a scale belongs to, and what MLX holds.

MXFP4, MXFP6 and MXFP8 have a scale of E8M0 for each 32 inputs, as in MLX.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import frexp, prod
from typing import Any, NamedTuple

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import TensorInfo
from requant.core.reasons import Reason, ReasonCode
from requant.core.sharing import shared
from requant.formats.base import DefaultPolicy, SourceLayer, packed_layer
from requant.formats.quantization_block import is_count
from requant.formats.stacks import Experts, are_transposed
from requant.formats.tensor_sorter import LayerError, TensorSorter, unexpected
from requant.packings.floats import MXFP8, Float8, MxBlocks, Mxfp6Blocks, exponent_bytes

# mx.load gives E4M3 as plain bytes.
FLOAT8 = ("F8_E4M3", "F8_E4M3FNUZ", "U8")
EXPONENTS = ("U8", "F8_E8M0")
SCALES = ("F32", "BF16", "F16", *EXPONENTS)
_USUAL_TILES = ((1, 32), (128, 128), (32, 32))


def mx_layer(
    path: str, weight: SourceTensor, scale: SourceTensor, dtype: str, bits: int, element: str = ""
) -> SourceLayer:
    """Describe a layer of bytes ``(..., out, in * bits / 8)`` with scales ``(..., out, in / 32)``.

    Elements of 6 bits are "e2m3" or "e3m2"; ``dtype`` is that of the decoded values.
    """
    *leading, n_out, nbytes = weight.info.shape
    rows, n_in = prod(leading) * n_out, nbytes * 8 // bits
    packing = (
        Mxfp6Blocks(rows, n_in, n_out, element)
        if bits == 6
        else MxBlocks(rows, n_in, n_out, bits, nbytes)
    )
    parts, stored = {"weight": weight, "scale": scale}, f"mxfp{bits} {element}".rstrip()
    shape = (*leading, n_out, n_in)
    return packed_layer(path, parts, shape, shared(packing), dtype=dtype, stored=stored)


def block_pair(value: Any) -> tuple[int, int] | None:
    """Rows and columns of a block as a config gives them; None unless it is two counts."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_count, value)):
        return None
    return value[0], value[1]


@lru_cache(maxsize=1 << 12)
def tile_of(
    shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of the tiles that ``scale`` divides a weight into, or None.

    Args:
        shape: Of the weight, ``(..., out, in)``.
        scale: Of its scales: one number, one a matrix, ``(..., out)`` or ``(..., out, 1)``,
            for stacks one each for gate and up, ``(..., 2)``, or a grid
            ``(..., ceil(out / high), ceil(in / wide))``, also as ``(..., high, 1, wide, 1)``.
        block: The tile that the config names.
    """
    *leading, n_out, n_in = shape
    matrices, count = prod(leading), prod(scale)
    grid = tuple(scale)
    if count == 1:
        due = (1,) if block is None else (-(-n_out // block[0]), -(-n_in // block[1]))
        # A lone number laid out as a grid of blocks is one block's scale, not the whole weight's.
        return None if len(grid) > 1 and prod(due) > 1 else (matrices * n_out, n_in)
    if len(grid) == len(leading) + 4 and (grid[-3], grid[-1]) == (1, 1):
        grid = (*grid[:-4], grid[-4], grid[-2])
    if grid in ((*leading, n_out), (*leading, n_out, 1)):
        return 1, n_in
    if count == matrices and grid[: len(leading)] == tuple(leading):
        return n_out, n_in
    # Gate and up of a stack, one number each; (1, 2) may be a grid of blocks of one matrix.
    if matrices > 1 and grid == (*leading, 2) and n_out % 2 == 0:
        return n_out // 2, n_in
    for high, wide in ((block,) if block else ()) + _USUAL_TILES:
        if grid == (*leading, -(-n_out // high), -(-n_in // wide)):
            return high, wide
    return None


class _Stored(NamedTuple):
    """How an FP8 layer is stored, whichever its path and tensors are."""

    packing: Float8
    description: str
    policy: DefaultPolicy


def float8_layer(
    checkpoint: Checkpoint,
    path: str,
    weight: SourceTensor,
    scale: SourceTensor,
    tile: tuple[int, int],
    dtype: str,
) -> SourceLayer:
    """Describe an FP8 layer; its scales are read to see whether mxfp8 holds it exactly.

    ``scale`` has a number for each ``tile`` (rows and columns) of ``weight``, ``(..., out, in)``,
    in order; a tile over all matrices has the rows of all. ``dtype`` is that of the decoded values.
    """
    shape = weight.info.shape
    if tile == (1, 32) and scale.info.dtype in EXPONENTS and shape[-1] % 32 == 0:
        return mx_layer(path, weight, scale, dtype, bits=8)
    stored = _stored(weight.info, scale.info, tile, dtype)
    if stored.packing.fits_mxfp8 and _powers_of_two(checkpoint, scale, weight):
        stored = _stored(weight.info, scale.info, tile, dtype, exact=True)
    return SourceLayer(
        path=path,
        parts={"weight": weight, "scale": scale},
        encoding=MXFP8 if stored.packing.exact else None,
        shape=shape,
        dtype=dtype,
        packing=stored.packing,
        stored_description=stored.description,
        policy=stored.policy,
    )


@lru_cache(maxsize=1 << 12)
def _stored(
    weight: TensorInfo, scale: TensorInfo, tile: tuple[int, int], dtype: str, exact: bool = False
) -> _Stored:
    rows, columns = prod(weight.shape[:-1]), weight.shape[-1]
    matrix = rows if scale.size == 1 else weight.shape[-2]
    width = scale.shape[-1] if scale.shape else 1
    packing = shared(Float8(rows, columns, matrix, tile, width, exact=exact))
    high, wide = tile
    if (high, wide) == (1, columns):
        scales = "one scale a channel"
    elif (high, wide) == (matrix, columns):
        scales = "one scale a tensor"
    else:
        scales = f"one scale for {high}x{wide}"
    kind = "e4m3fnuz" if weight.dtype == "F8_E4M3FNUZ" else "e4m3"
    description = shared(f"fp8 {kind}, {scales}")
    if exact:
        return _Stored(packing, description, DefaultPolicy())
    reason = "no mode of MLX holds FP8 with such scales"
    requires_choice = (
        f"is stored as {description}; {reason}, so say what it becomes: add --bits 8 (8.5 bits a "
        "weight), --mode mxfp8 (8.25), --bits 4 (4.5) or --dequantize "
        f"({'32' if dtype == 'F32' else '16'})"
    )
    policy = DefaultPolicy(
        reason=Reason(ReasonCode.NO_MLX_MODE, reason), requires_choice=requires_choice
    )
    return _Stored(packing, description, shared(policy))


def float8_stack(
    sorter: TensorSorter,
    path: str,
    weight: SourceTensor,
    scale: SourceTensor,
    *,
    block: tuple[int, int] | None = None,
    dtype: str = "",
    transposed: bool = False,
) -> SourceLayer:
    """Describe an FP8 layer, or a stack of them, by the shapes of its weight and scale.

    ``weight`` is FP8 ``(..., out, in)``, or a stack ``(experts, in, out)``, which the tool says
    (``transposed``) or the shapes do; ``scale`` is as in ``tile_of``, of such a stack with its axes
    exchanged, or one an output. ``block`` is the tile that the config names, ``dtype`` that of the
    decoded values; "" for the model's.

    Raises:
        LayerError: The scales fit no tiling.
    """
    shape, dtype = weight.info.shape, dtype or sorter.dtype
    if len(shape) < 2 or 0 in shape:
        raise unexpected(weight, "a matrix or a stack of matrices")
    if scale.info.dtype not in SCALES:
        raise unexpected(scale, f"a scale of dtype {', '.join(SCALES)}")
    transposed = len(shape) == 3 and (transposed or sorter.orientation.is_transposed(path, shape))
    tile = None if transposed else tile_of(shape, scale.info.shape, block)
    if tile is not None:
        return float8_layer(sorter.checkpoint, path, weight, scale=scale, tile=tile, dtype=dtype)
    if transposed or are_transposed(weight.info, scale.info):
        return _transposed_stack(sorter, path, weight, scale=scale, block=block, dtype=dtype)
    high, wide = block or (128, 128)
    grid = [*shape[:-2], -(-shape[-2] // high), -(-shape[-1] // wide)]
    fits = f"{scale.info} fits no tiling of {weight.name} {list(shape)}"
    raise LayerError(scale.name, f"{fits}; expected {grid} for {high}x{wide} blocks")


def _transposed_stack(
    sorter: TensorSorter,
    path: str,
    weight: SourceTensor,
    scale: SourceTensor,
    block: tuple[int, int] | None,
    dtype: str,
) -> SourceLayer:
    count, n_in, n_out = weight.info.shape
    grid = scale.info.shape
    # fbgemm stores (experts, out, 1) too, the order of an output's scale in the values.
    in_order = len(grid) != 3 or grid == (count, n_out, 1)
    transposed = ("weight",) if in_order else ("weight", "scale")
    experts = Experts.of(count, {"weight": weight, "scale": scale}, transposed)
    one = experts.one()
    tile = tile_of(one["weight"].info.shape, one["scale"].info.shape, block and block[::-1])
    if tile is None:
        expected = f"[{count}, 1, {n_out}], [{count}, {n_out}, 1] or one number an expert"
        raise unexpected(scale, f"{expected} for {weight.info}, stored as [experts, in, out]")
    layer = float8_layer(
        sorter.checkpoint, path, one["weight"], scale=one["scale"], tile=tile, dtype=dtype
    )
    stack = experts.stack(layer)
    if path != weight.name:
        return stack
    # A model class is shown the values as they lie, under the name that it knows.
    rows, matrix, tile = count * n_in, n_in, tile[::-1]
    if scale.info.size == 1:
        matrix, tile = rows, (rows, n_out)
    in_place = Float8(rows, n_out, matrix, tile, grid[-1] if grid else 1)
    policy = replace(stack.policy, fallback=stack.encoding)
    named = replace(
        stack, shape=weight.info.shape, packing=in_place, encoding=None, policy=policy, name=path
    )
    return replace(stack, as_named=named)


def _powers_of_two(checkpoint: Checkpoint, scale: SourceTensor, weight: SourceTensor) -> bool:
    if weight.info.dtype == "F8_E4M3FNUZ":
        return False
    if scale.info.dtype in EXPONENTS:
        return True
    values = checkpoint.read_small_tensor(scale.name)
    # Almost always the first scale tells, and it is much faster to look at than all.
    if values.size and frexp(float(values.flat[0]))[0] != 0.5:
        return False
    return exponent_bytes(values) is not None
