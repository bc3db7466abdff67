"""compressed-tensors as an export writes it: integers, MXFP4, MXFP8 and NVFP4.

``formats.compressed_tensors`` reads it. Words and scales are MLX's own bytes: at 4 and 8 bits both
formats store a row as one little-endian stream of unsigned codes, and the elements and scales of
MXFP4, MXFP8 and NVFP4 are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from requant.core.dtypes import TensorInfo
from requant.packings.exported import ColumnZeros, RowScales, RowWords, Shape, TensorScale
from requant.planning.export_targets import (
    HeldLayer,
    LayerWriter,
    TargetFormat,
    export_step,
    moved_step,
)
from requant.planning.plan import Step
from requant.quantization.config import Quantization, QuantMode


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the layers of a mode are stored and described."""

    format: str
    words: tuple[str, str, int]  # suffix and dtype of the codes, and bits of one element
    scale_dtype: str = ""  # of the scales; as they are stored for affine ones
    settings: Mapping[str, Any] | None = None  # of ``weights`` in the config


_SCHEMES: Final = {
    QuantMode.AFFINE: _Scheme("pack-quantized", ("weight_packed", "I32", 32)),
    QuantMode.MXFP4: _Scheme(
        "mxfp4-pack-quantized",
        ("weight_packed", "U8", 8),
        "U8",
        {"strategy": "group", "scale_dtype": "torch.uint8"},
    ),
    QuantMode.MXFP8: _Scheme(
        "mxfp8-quantized",
        ("weight", "F8_E4M3", 8),
        "U8",
        {"strategy": "group", "scale_dtype": "torch.uint8"},
    ),
    QuantMode.NVFP4: _Scheme(
        "nvfp4-pack-quantized",
        ("weight_packed", "U8", 8),
        "F8_E4M3",
        {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
    ),
}


class CompressedTensorsWriter(LayerWriter):
    """Layers with ``weight_packed`` or ``weight``, ``weight_scale`` and what else a scheme has."""

    def __init__(self, layers: Sequence[HeldLayer]) -> None:
        super().__init__(layers)
        # Layers that run as one (q, k and v) need one scheme: zero points for all or none.
        found = defaultdict[Quantization, bool](lambda: True)
        for x in layers:
            found[x.written] &= x.zeros.all_middle(x.written.bits)
        self.symmetric = dict(found)

    def steps(self, layer: HeldLayer) -> Iterator[Step]:
        matrix, written = layer.matrix(), layer.written
        rows, columns = matrix.out_features, matrix.in_features
        scheme = _SCHEMES[written.mode]
        suffix, dtype, bits = scheme.words
        words = TensorInfo(dtype, (rows, columns * written.bits // bits))
        stored = scheme.scale_dtype or layer.scale_dtype
        scales = TensorInfo(stored, (rows, matrix.groups))
        if matrix.packing is None:
            yield moved_step(layer, "weight", suffix, words)
            yield moved_step(layer, "scales", "weight_scale", scales)
        else:
            yield export_step(layer, suffix, words, RowWords(matrix))
            yield export_step(layer, "weight_scale", scales, RowScales(matrix))
        if written.mode is QuantMode.NVFP4:
            factor = TensorScale("global_scale" in layer.layer.parts)
            yield export_step(layer, "weight_global_scale", TensorInfo("F32", (1,)), factor)
        if written.mode is not QuantMode.AFFINE:
            return
        if not self.symmetric[written]:
            zeros = ColumnZeros(matrix)
            info = TensorInfo("I32", (zeros.rows, zeros.columns))
            yield export_step(layer, "weight_zero_point", info, zeros)
        shape = Shape((rows, columns))
        yield export_step(layer, "weight_shape", TensorInfo("I64", (2,)), shape)

    def block(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The most frequent scheme is that of the class ``Linear``, others name their layers.

        In the readers a path beats a class.
        """
        paths = defaultdict[Quantization, list[str]](list)
        for layer in self.layers:
            paths[layer.written].append(layer.layer.path)
        ranked = sorted(paths, key=lambda x: (-len(paths[x]), x.mode, x.bits, x.group_size))
        formats = {_SCHEMES[quantization.mode].format for quantization in ranked}
        groups = {
            f"group_{number}": {
                "targets": paths[quantization] if number else ["Linear"],
                "weights": self._weights(quantization),
                "input_activations": None,
                "output_activations": None,
                "format": _SCHEMES[quantization.mode].format,
            }
            for number, quantization in enumerate(ranked)
        }
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _weights(self, quantization: Quantization) -> dict[str, Any]:
        settings = _SCHEMES[quantization.mode].settings
        return {
            "num_bits": quantization.bits,
            "type": "int" if settings is None else "float",
            "symmetric": settings is not None or self.symmetric[quantization],
            "strategy": "group",
            "group_size": quantization.group_size,
            "dynamic": False,
            "actorder": None,
            **(settings or {}),
        }


_FLOATS: Final = {QuantMode.MXFP4: (4,), QuantMode.MXFP8: (8,), QuantMode.NVFP4: (4,)}

COMPRESSED_TENSORS: Final = TargetFormat(
    "compressed-tensors",
    CompressedTensorsWriter,
    # Readers have kernels for these widths of packed integers.
    {QuantMode.AFFINE: (4, 8), **_FLOATS},
)
MXFP4: Final = TargetFormat("mxfp4", CompressedTensorsWriter, {QuantMode.MXFP4: (4,)})
NVFP4: Final = TargetFormat("nvfp4", CompressedTensorsWriter, {QuantMode.NVFP4: (4,)})
