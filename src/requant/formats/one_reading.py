"""Whether the tensors of a layer leave one reading, where the config does not say which it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from requant.core.dtypes import FLOATS
from requant.formats.base import SourceLayer
from requant.formats.gptq_awq_config import METHODS
from requant.formats.input_scaled import InputScaled
from requant.formats.quantization_block import ALIASES, QuantizationBlock
from requant.packings.base import Packing
from requant.packings.bitsandbytes import BnbInt8
from requant.packings.experts import StackedExperts
from requant.packings.floats import Float8, MxBlocks
from requant.packings.torchao import Swizzled

# What shapes determine too; where the two contradict each other, shapes are believed.
_DERIVED_FROM_SHAPES: Final = frozenset((*ALIASES["bits"], *ALIASES["group_size"], "quant_algo"))
# Integer layers with these names are the format's own; where its config demands a tensor that is
# missing (zeros, an order of inputs), they are not what they seem.
OWN_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(METHODS, (".qweight", ".B")),
    **dict.fromkeys(("compressed-tensors", "modelopt", "quark"), (".weight_scale",)),
}
_ASYMMETRIC: Final = {"symmetric": False, "sym": False, "zero_point": True, "desc_act": True}
_IN_ORDER: Final = ("weight", "static", "none", "false")  # values of "actorder"
# Formats that read bytes of other kinds next to a scale.
_OF_BYTES: Final = ("compressed-tensors", "modelopt", "quark", "bitnet", "bitsandbytes", "torchao")
_FLOAT8_WORDS: Final = ("fp8", "float8", "e4m3")
_USUAL_BLOCK: Final = 128  # rows and columns with one scale, of FP8 in blocks
_DEEPEST: Final = 8  # levels of a block


def is_certain(
    layer: SourceLayer, claimed_by: str, siblings: Collection[str], others: bool
) -> bool:
    """Whether tensors of common names and dtypes leave no second reading.

    ``layer`` is as a reader made it that the config does not describe, in a folder of the format
    ``claimed_by``; ``siblings`` are the names of tensors that are left, and ``others`` whether
    other tensors of the folder are called FP8.
    """
    weight, scale = layer.parts.get("weight"), layer.parts.get("scale")
    if weight is None:
        return True
    bytes_too = claimed_by in _OF_BYTES
    if isinstance(layer.packing, BnbInt8):  # a scale that is renamed would make it so
        return not bytes_too or f"{layer.path}.weight_format" in siblings
    if isinstance(layer.packing, Float8) and scale is not None:
        # One number in the form of a grid may be what is left of the scales of blocks.
        in_blocks = max(weight.info.shape[-2:]) > _USUAL_BLOCK
        if scale.info.size == 1 and len(scale.info.shape) > 1 and in_blocks:
            return False
    elif not (isinstance(layer.packing, MxBlocks) and layer.packing.bits == 8):
        return True
    if weight.info.dtype != "U8":
        return True
    inverse = scale is not None and scale.name.endswith("_inv")
    return inverse and not bytes_too and not others


def holds_float8(packing: Packing | None) -> bool:
    """Whether the codes of a packing are FP8, within packings that wrap another too."""
    while isinstance(packing, StackedExperts | InputScaled | Swizzled):
        packing = packing.layer
    return isinstance(packing, Float8) or (isinstance(packing, MxBlocks) and packing.bits == 8)


def is_float8_of_bytes(layer: SourceLayer) -> bool:
    """Whether a layer is read as FP8 by the config's word alone: bytes next to a float scale."""
    weight, scale = layer.parts.get("weight"), layer.parts.get("scale")
    if not isinstance(layer.packing, Float8) or weight is None or scale is None:
        return False
    of_floats = scale.info.dtype in FLOATS and not scale.name.endswith("_inv")
    return weight.info.dtype == "U8" and of_floats


def in_other_blocks(block: QuantizationBlock | None, layers: Iterable[SourceLayer]) -> list[str]:
    """FP8 layers whose grid of scales is not that of the blocks that the config names."""
    declared = None if block is None else block.get("weight_block_size")
    if not isinstance(declared, list) or len(declared) != 2:
        return []
    packed = ((layer.path, layer.packing) for layer in layers)
    return [
        path
        for path, packing in packed
        if isinstance(packing, Float8)
        and packing.tile[1] != packing.columns
        and list(packing.tile) != declared
    ]


def demands_more(block: Mapping[str, Any]) -> bool:
    """Whether a config mentions layers that have more tensors than codes and scales."""
    for part in _parts(block):
        if any(key in part and part[key] is value for key, value in _ASYMMETRIC.items()):
            return True
        order = part.get("actorder")
        if order is not None and str(order).lower() not in _IN_ORDER:
            return True
    return False


def declares_float8(block: Mapping[str, Any]) -> bool:
    """Whether a config mentions FP8 anywhere, in any tool's words."""
    for part in _parts(block):
        if part.get("type") == "float" and part.get("num_bits") == 8:
            return True
        texts = [*part, *(value for value in part.values() if isinstance(value, str))]
        if any(word in text.lower() for text in texts for word in _FLOAT8_WORDS):
            return True
    return False


def _parts(block: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The block, and every object in it."""
    left: list[Any] = [block]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def without_shape_derived(block: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A block without bits, groups and algorithms, at any depth that tools write them."""
    return {
        key: without_shape_derived(value, depth + 1)
        if isinstance(value, Mapping) and depth < _DEEPEST
        else value
        for key, value in block.items()
        if key not in _DERIVED_FROM_SHAPES
    }
