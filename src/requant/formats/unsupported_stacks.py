"""Stacks of experts under the names of ModelOpt, ``X`` with ``X_weight_scale``, in other folders.

The name of the scale is all that determines how a stack without ``.weight`` is stored. Where the
config names another tool, or of another kind of codes, nothing says that the name means what it
means in ModelOpt's folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.errors import Problem
from requant.formats.base import SourceLayout
from requant.formats.quantization_block import find_quantization_block

# What ModelOpt's quant_algo says of the dtype of codes: beginnings of algorithms.
_FLOAT8: Final = ("FP8", "MXFP8", "MIXED")
_INT8: Final = ("W8A", "INT8", "MIXED")


def external_stacks(checkpoint: Checkpoint, layout: SourceLayout) -> Iterator[Problem]:
    """The stacks that were read by a name of their scale that is another tool's."""
    block = find_quantization_block(checkpoint)
    if block is None:
        return
    declared = _algorithms(block.block)
    for layer in layout.layers:
        parts = {part.name: part for part in layer.parts.values()} if layer.is_quantized else {}
        for name, codes in parts.items():
            scale = f"{name}_weight_scale"
            if scale not in parts or _is_declared(codes.info.dtype, block.method, declared):
                continue
            yield Problem(
                name,
                f"{codes.info} with {scale} next to it has the names of a stack of ModelOpt, but "
                f"{block.where} says nothing of such layers; if its values are codes times "
                f"scales, call the scale {name}_scale",
            )


def _algorithms(block: Mapping[str, object]) -> tuple[str, ...]:
    """Every ``quant_algo`` of a block, those of single layers too."""
    own = block.get("quant_algo")
    nested = [value for value in block.values() if isinstance(value, Mapping)]
    found = tuple(x for part in nested for x in _algorithms(part))
    return (*([own] if isinstance(own, str) else []), *found)


def _is_declared(dtype: str, method: str, algorithms: tuple[str, ...]) -> bool:
    """Whether a ModelOpt config mentions codes of this dtype."""
    if not (method.startswith("modelopt") or (not method and algorithms)):
        return False
    kinds = {"I8": _INT8}.get(dtype, _FLOAT8 if dtype.startswith("F8_") else ())
    return not kinds or any(word.upper().startswith(kinds) for word in algorithms)
