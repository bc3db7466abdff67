"""MXFP4, MXFP6 and MXFP8 layers of any tool: a scale of E8M0 for each 32 inputs, as in MLX."""

from __future__ import annotations

from math import prod

from requant.checkpoints.checkpoint import SourceTensor
from requant.formats.base import SourceLayer, packed_layer
from requant.packings.floats import MxBlocks, Mxfp6Blocks


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
    return packed_layer(path, parts, (*leading, n_out, n_in), packing, dtype=dtype, stored=stored)
