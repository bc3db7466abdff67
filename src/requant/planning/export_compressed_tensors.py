"""compressed-tensors' ``pack-quantized`` as an export writes it: a layer's tensors, and the block.

``formats.compressed_tensors`` reads it; ``packings.compressed_tensors_export`` packs zero points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from requant.core.dtypes import TensorInfo
from requant.formats import SourceLayer
from requant.packings.base import Packing
from requant.packings.compressed_tensors_export import CtShape, CtZeroPoints
from requant.planning.plan import Operation, OutputTensor, RowMapping, Step
from requant.planning.steps import copy_step
from requant.quantization.config import Quantization, QuantMode

WIDTHS: Final = (4, 8)
"""Bits of the codes that readers of packed integers have kernels for."""


def export_steps(layer: SourceLayer, *, symmetric: bool) -> Iterator[Step]:
    """The steps of one affine layer of two axes; without zero points where it is symmetric."""
    encoding, path = layer.encoding, layer.path
    assert encoding is not None
    out_features, in_features = layer.shape
    words, scales = layer.parts["weight"], layer.parts["scales"]
    packed = TensorInfo("I32", words.info.shape)
    yield copy_step(path, words, OutputTensor(f"{path}.weight_packed", packed))
    scale_step = copy_step(path, scales, OutputTensor(f"{path}.weight_scale", scales.info))
    yield replace(scale_step, scales_of=QuantMode.AFFINE)
    if not symmetric:
        groups = in_features // encoding.group_size
        rows = -(-out_features * encoding.bits // 32)
        zeros = CtZeroPoints(rows, groups, encoding.bits, out_features)
        info = TensorInfo("I32", (rows, groups))
        yield _packed_step(layer, "weight_zero_point", info, zeros, inputs=("scales", "biases"))
    shape = CtShape((out_features, in_features))
    yield _packed_step(layer, "weight_shape", TensorInfo("I64", (2,)), shape)


def _packed_step(
    layer: SourceLayer, role: str, info: TensorInfo, packing: Packing, inputs: tuple[str, ...] = ()
) -> Step:
    return Step(
        layer=layer.path,
        operation=Operation.EXPORT,
        rows=RowMapping(count=packing.rows, columns=packing.columns),
        inputs={name: layer.parts[name] for name in inputs},
        outputs={"weight": OutputTensor(f"{layer.path}.{role}", info)},
        dtype=info.dtype,
        packing=packing,
    )


def quantization_block(
    layers: Mapping[str, Quantization],
    symmetric: Mapping[Quantization, bool],
    ignored: Sequence[str],
) -> dict[str, Any]:
    """The ``quantization_config`` of ``layers``, by path.

    The most frequent scheme is that of the class ``Linear``, others name their layers: in the
    readers a path beats a class. ``ignored`` are the linear layers that are dense.
    """
    paths = defaultdict[Quantization, list[str]](list)
    for path, quantization in layers.items():
        paths[quantization].append(path)
    ranked = sorted(paths, key=lambda x: (-len(paths[x]), x.bits, x.group_size))
    groups = {
        f"group_{number}": {
            "targets": paths[quantization] if number else ["Linear"],
            "weights": _weights(quantization, symmetric=symmetric[quantization]),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, quantization in enumerate(ranked)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(quantization: Quantization, *, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": quantization.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": quantization.group_size,
        "dynamic": False,
        "actorder": None,
    }
