"""GPTQ and AutoAWQ "gemm" as an export writes them: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

``formats.gptq_awq`` reads them. Rows of these tensors are inputs, or words and groups of them;
columns are outputs. Scales are float16, the dtype of the tools' kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from requant.core.dtypes import TensorInfo
from requant.packings.exported import (
    AwqWords,
    AwqZeros,
    GptqWords,
    GptqZeros,
    GroupIndex,
    GroupScales,
)
from requant.planning.export_targets import HeldLayer, LayerWriter, TargetFormat, export_step
from requant.planning.plan import Step
from requant.quantization.config import Quantization, QuantMode


class GptqWriter(LayerWriter):
    """Layers of GPTQModel and AutoGPTQ, with inputs in the order of their groups.

    ``checkpoint_format`` is "gptq", whose zero fields are less one and which most tools read,
    unless a zero point is 0: readers disagree about the field below it, so that all
    are written as "gptq_v2", whose fields are the zero points.
    """

    def __init__(self, layers: Sequence[HeldLayer]) -> None:
        super().__init__(layers)
        self.minus_one = all(x.zeros.lowest > 0 for x in layers)
        self.symmetric = all(x.zeros.all_middle(x.written.bits) for x in layers)

    def steps(self, layer: HeldLayer) -> Iterator[Step]:
        matrix, bits = layer.matrix(), layer.written.bits
        out_features, in_features, groups = matrix.out_features, matrix.in_features, matrix.groups
        qweight = TensorInfo("I32", (in_features * bits // 32, out_features))
        yield export_step(layer, "qweight", qweight, GptqWords(matrix))
        qzeros = TensorInfo("I32", (groups, out_features * bits // 32))
        zeros = GptqZeros(matrix, self.minus_one)
        yield export_step(layer, "qzeros", qzeros, zeros)
        scales = TensorInfo(layer.scale_dtype, (groups, out_features))
        yield export_step(layer, "scales", scales, GroupScales(matrix))
        index = GroupIndex(in_features, layer.written.group_size)
        info = TensorInfo("I32", (in_features,))
        yield export_step(layer, "g_idx", info, index)

    def block(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The most frequent width and group are the default, ``dynamic`` names other layers."""
        counts = Counter[Quantization]()
        for layer in self.layers:
            counts[layer.written] += 1
        default = min(counts, key=lambda x: (-counts[x], x.bits, x.group_size))
        dynamic: dict[str, Any] = {
            f"-:^{re.escape(path)}$": {} for path in ignored if path != "lm_head"
        }
        for layer in self.layers:
            if layer.written != default:
                other = {"bits": layer.written.bits, "group_size": layer.written.group_size}
                dynamic[f"+:^{re.escape(layer.layer.path)}$"] = other
        return {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size,
            "desc_act": False,
            "sym": self.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.minus_one else "gptq_v2",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


class AwqWriter(LayerWriter):
    """Layers of AutoAWQ in the order "gemm", all in groups of one size."""

    @classmethod
    def settled(cls, layers: Sequence[HeldLayer]) -> list[HeldLayer]:
        """All in the smallest group, whose scales and zero points are those of the larger."""
        size = min((x.written.group_size for x in layers), default=0)
        return [replace(x, written=replace(x.written, group_size=size)) for x in layers]

    def steps(self, layer: HeldLayer) -> Iterator[Step]:
        matrix = layer.matrix()
        words, groups = matrix.out_features // 8, matrix.groups
        qweight = TensorInfo("I32", (matrix.in_features, words))
        yield export_step(layer, "qweight", qweight, AwqWords(matrix))
        qzeros = TensorInfo("I32", (groups, words))
        yield export_step(layer, "qzeros", qzeros, AwqZeros(matrix))
        scales = TensorInfo(layer.scale_dtype, (groups, matrix.out_features))
        yield export_step(layer, "scales", scales, GroupScales(matrix))

    def block(self, ignored: Sequence[str]) -> dict[str, Any]:
        """One width and one group for all layers."""
        dense = [path for path in ignored if path != "lm_head"]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.layers[0].written.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense or None,
        }


GPTQ: Final = TargetFormat(
    "gptq", GptqWriter, {QuantMode.AFFINE: (2, 3, 4, 8)}, scale_dtypes=("F16",), output_bits=32
)
AWQ: Final = TargetFormat(
    "awq", AwqWriter, {QuantMode.AFFINE: (4,)}, scale_dtypes=("F16",), output_bits=32
)
