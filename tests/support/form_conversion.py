"""A quantized model that sees, converted with mlx-vlm's layout, and how exact the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import requant
from requant.libraries import MLX_VLM
from tests.support.library_conversion import loaded
from tests.support.mlx_reference import Weights, load
from tests.support.multimodal_forms import FORMS, write_form

TOKENS = mx.array([[3, 1, 4, 15, 9, 26, 5, 35]])


@dataclass
class Result:
    """What came of a conversion.

    Attributes:
        exactness: What the report says of the coded layers: "exact", "rounded", "re-encoded".
        target: Their quantization in the output.
        value_error: Largest difference of a value to the source's, relative to the layer's
            largest.
        logit_error: The same of the logits and those of the decoded counterpart.
    """

    exactness: str
    target: str
    value_error: float
    logit_error: float


def convert_form(family: str, form: str, work: Path) -> Result:
    """Write a model in a form, convert it and its decoded counterpart, load and run both."""
    written, options = write_form(family, FORMS[form], work), FORMS[form].options
    plan = requant.plan(written.folder, layout="mlx-vlm", **options)
    requant.convert(written.folder, work / "out", layout="mlx-vlm", **options)
    requant.convert(written.dense, work / "reference", layout="mlx-vlm", dequantize=True)
    layers = {x.layer: x for x in plan.layers if x.layer in written.values}
    assert layers.keys() == written.values.keys()
    weights = load(work / "out")
    quantization = json.loads((work / "out" / "config.json").read_text()).get("quantization", {})
    errors = []
    for path, expected in written.values.items():
        decoded = _decoded(weights, path, quantization)
        errors.append(np.abs(decoded - expected).max() / np.abs(expected).max())
    logits = [_logits(work / name) for name in ("out", "reference")]
    return Result(
        exactness=", ".join(sorted({str(x.exactness) for x in layers.values()})),
        target=", ".join(sorted({str(x.target) for x in layers.values()})),
        value_error=float(max(errors)),
        logit_error=float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()),
    )


def _decoded(weights: Weights, path: str, quantization: Mapping[str, Any]) -> np.ndarray:
    """Values of a layer of an output, in float32."""
    with mx.stream(mx.cpu):
        scales, biases = (weights.get(f"{path}.{role}") for role in ("scales", "biases"))
        if scales is None:
            return np.array(weights[f"{path}.weight"].astype(mx.float32))
        of_layer = quantization.get(path, quantization)
        wide = biases is not None
        values = mx.dequantize(
            weights[f"{path}.weight"],
            scales.astype(mx.float32) if wide else scales,
            biases.astype(mx.float32) if wide else None,
            group_size=of_layer["group_size"],
            bits=of_layer["bits"],
            mode=of_layer.get("mode", "affine"),
        )
        return np.array(values.astype(mx.float32))


def _logits(folder: Path) -> np.ndarray:
    """What the text model makes of a few tokens, in float32 on the CPU."""
    with mx.stream(mx.cpu):
        model: nn.Module = loaded(MLX_VLM, folder, only_weights=True)
        model.set_dtype(mx.float32)
        output = model.language_model(TOKENS)
        return np.array(getattr(output, "logits", output).astype(mx.float32))
