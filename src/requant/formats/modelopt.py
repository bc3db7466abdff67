"""NVIDIA ModelOpt folders: NVFP4, FP8, MXFP4, MXFP8, INT4 and INT8 weights.

The config is in config.json or, in older folders, in hf_quant_config.json alone. Tensors
determine how a layer is stored; where the algorithm that the config names contradicts them, the
layer is rejected here, and read by ``other_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS
from requant.formats.base import SourceLayer, SourceLayout, Tensors
from requant.formats.layer_names import layer_names
from requant.formats.modelopt_layers import make_layer, stored_kind, transposed_experts
from requant.formats.quantization_block import QuantizationBlock, find_quantization_block
from requant.formats.tensor_sorter import LayerError, TensorSorter
from requant.text import format_value

# quant_algo -> how its layers are stored.
_ALGORITHMS: Final = {
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"), "nvfp4"),
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), "fp8"),
    **dict.fromkeys(("FP8_PB_WO", "FP8_PB_REAL", "FP8_BLOCK_SCALES"), "fp8"),
    "MXFP8": "mxfp8",
    **dict.fromkeys(("W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8", "W4A16_MXFP4", "MXFP4"), "mxfp4"),
    **dict.fromkeys(("W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ"), "int4"),
    **dict.fromkeys(("W8A16", "INT8_WO", "INT8_SQ", "W8A8_SQ_PER_CHANNEL"), "int8"),
}
_MIXED: Final = "MIXED_PRECISION"
_ROLES: Final = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
_LOW_RANK: Final = (".svdquant_lora_a", ".svdquant_lora_b")


class ModelOpt:
    """A folder with ``quant_method: modelopt``, or with an hf_quant_config.json."""

    name = "modelopt"
    layer_parts = "PATH.weight with PATH.weight_scale"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """The config names it; otherwise scales of NVFP4 next to bytes decide."""
        block = find_quantization_block(checkpoint)
        if block is not None:
            if block.method.startswith("modelopt"):
                return f"{block.where}: quant_method {block.method}"
            alone = not block.method and isinstance(block.get("quantization"), Mapping)
            return block.where if alone or (not block.method and block.get("quant_algo")) else None
        parts = layer_names(checkpoint.tensors).tensors
        return next((part.name for name, part in parts.items() if _is_nvfp4(name, parts)), None)

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        return _Reader(checkpoint).read()


def _is_nvfp4(name: str, parts: Tensors) -> bool:
    """Whether this is a tensor scale, or the E4M3 scale of bytes."""
    path, _, role = name.rpartition(".")
    codes = parts.get(f"{path}.weight")
    adjacent_bytes = codes is not None and codes.info.dtype == "U8"
    e4m3 = role == "weight_scale" and parts[name].info.dtype == "F8_E4M3"
    return role == "weight_scale_2" or (e4m3 and adjacent_bytes)


class _Reader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.sorter = checkpoint, TensorSorter.by_role(checkpoint)
        block = find_quantization_block(checkpoint) or QuantizationBlock("hf_quant_config.json", {})
        self.found = block = block.inner
        self.algorithm = self._algorithm(block.get("quant_algo"), f"{block.where}.quant_algo")
        self.by_layer = self._by_layer()

    def read(self) -> SourceLayout:
        sorter = self.sorter
        layers = sorter.layers_with(_ROLES)
        sorter.read_ahead(layers.values(), ("weight_scale_2",))
        for path, parts in layers.items():
            if len(parts) > 1 and "weight" in parts and parts["weight"].info.dtype not in FLOATS:
                sorter.make(path, parts, self._layer)
        sorter.drop_runtime_scales()
        self._check_loose()
        if not sorter.quantized and self.algorithm:
            message = f"is {self.algorithm}, but no layer has a weight_scale"
            sorter.no_layer(f"{self.found.where}.quant_algo", message)
        return sorter.layout()

    def _algorithm(self, value: Any, where: str) -> str:
        """A known algorithm in upper case; "" where the config is silent."""
        if value is None:
            return ""
        name = str(value).upper()
        if name == "NVFP4_SVD":
            self.sorter.problem(where, "is NVFP4_SVD: its low-rank branch has no place in MLX")
        elif name not in (*_ALGORITHMS, _MIXED):
            self.sorter.problem(
                where, f"is {format_value(value)}; known are {', '.join(_ALGORITHMS)}, {_MIXED}"
            )
        return name

    def _by_layer(self) -> dict[str, str]:
        """``quantized_layers``: layer path -> algorithm."""
        table = self.found.get("quantized_layers")
        where = f"{self.found.where}.quantized_layers"
        if table is None:
            return {}
        if not isinstance(table, Mapping):
            self.sorter.problem(where, f"is {format_value(table)}, expected an object")
            return {}
        return {
            path: self._algorithm(declared.get("quant_algo"), f"{where}[{path!r}].quant_algo")
            for path, declared in table.items()
            if isinstance(declared, Mapping)
        }

    def _check_loose(self) -> None:
        """Report low-rank branches, and note layers that are dense though named."""
        sorter = self.sorter
        for tensor in sorter.left:
            if tensor.name.endswith(_LOW_RANK):
                message = "is a part of NVFP4_SVD's low-rank branch, which is not read"
                sorter.problem(tensor.name, message)
        sorter.note_dense(f"{self.found.where}.quantized_layers", self.by_layer)

    def _layer(self, path: str, parts: Tensors) -> SourceLayer:
        experts = transposed_experts(self.sorter, path, parts)
        if experts is not None:
            return experts.stack(self._layer(path, experts.one()))
        kind = stored_kind(path, parts)
        named = self.by_layer.get(path, "" if self.algorithm == _MIXED else self.algorithm)
        if _ALGORITHMS.get(named, kind) != kind:
            where = "quantized_layers" if path in self.by_layer else "quant_algo"
            message = f"is stored as {kind}, but {self.found.where}.{where} says {named}"
            raise LayerError(path, message)
        return make_layer(self.sorter, kind, path, parts)
