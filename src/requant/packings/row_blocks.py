"""Rows of a matrix that lie in different bits of the same packed rows (HQQ, BitNet).

A run of rows is in one block of packed rows, or at the end of one and the beginning of the
next: then it is cut twice out of the same tensor, under two roles.
"""

from __future__ import annotations

from requant.kernels.repack import RowBlocks, row_blocks_into
from requant.packings.base import Array, Parts, Rect

NEXT = "_next"
"""Ends the role under which a tensor is cut a second time."""


def block_cuts(
    role: str, blocks: RowBlocks, rows: int, start: int, stop: int, width: int
) -> dict[str, Rect]:
    """The rectangles of a packed tensor ``role`` that rows ``start`` to ``stop`` need.

    ``rows`` is the height of the whole matrix, ``width`` the length of a packed row.

    Example: 10 rows in two blocks lie in 5 packed rows. Rows 3 to 7 are the end of the first block,
    packed rows 3 to 5 under ``role``, and the start of the second, 0 to 2 under ``role_next``.
    """
    block = blocks.block(rows)
    first, inner = divmod(start, block)
    last, end = (stop - 1) // block, (stop - 1) % block + 1
    if first == last:
        return {role: Rect((inner, end), (0, width))}
    if last == first + 1 and end <= inner:
        return {role: Rect((inner, block), (0, width)), f"{role}{NEXT}": Rect((0, end), (0, width))}
    return {role: Rect((0, block), (0, width))}


def block_codes(
    role: str, blocks: RowBlocks, rows: int, start: int, parts: Parts, out: Array
) -> None:
    """Fill ``out``, uint8 ``(rows wanted, columns)``, from what ``block_cuts`` asked for."""
    cuts = block_cuts(
        role, blocks, rows, start=start, stop=start + out.shape[0], width=out.shape[1]
    )
    done = 0
    for cut_role in (role, f"{role}{NEXT}"):
        if cut_role in cuts:
            first, last = cuts[cut_role].rows
            count = last - first if len(cuts) > 1 else out.shape[0]
            piece = out[done : done + count]
            row_blocks_into(parts[cut_role], blocks, rows, start + done, piece, first=first)
            done += count
