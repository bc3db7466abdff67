"""Arrays, values and conversions of MLX and mlx-lm that tests compare with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

Weights = dict[str, mx.array]


def load(folder: Path) -> Weights:
    """Every tensor of an output, read by MLX."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(file))
    return weights


def same(a: mx.array, b: mx.array) -> bool:
    """Equal dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))


def to_mx(array: np.ndarray) -> mx.array:
    """A NumPy array, bfloat16 included, as an MLX array of the same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    """An MLX array as a NumPy array of the same bits."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def as_bytes(array: mx.array) -> bytes:
    """Row-major bytes of an array, without a conversion of values."""
    with mx.stream(mx.cpu):
        return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def differences(ours: Weights, theirs: Weights) -> list[str]:
    """Names that are missing, too many, or hold other bytes."""
    found = [f"missing {name}" for name in sorted(theirs.keys() - ours.keys())]
    found += [f"too many {name}" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"{name}: {a.dtype} {a.shape}, expected {b.dtype} {b.shape}")
        elif as_bytes(a) != as_bytes(b):
            found.append(f"{name}: other bytes")
    return found


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of MLX words: a little-endian bit stream a row."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*words.shape[:-1], -1, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.uint8)


@dataclass
class Affine:
    """One affine layer of an output, split."""

    codes: np.ndarray
    scales: np.ndarray  # float64, repeated to a value a code
    biases: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.codes * self.scales + self.biases


def affine(weights: Mapping[str, np.ndarray], path: str, group: int, bits: int) -> Affine:
    """Split an affine layer; scales and biases widened exactly."""
    scales, biases = (
        weights[f"{path}.{role}"].astype(np.float64).repeat(group, axis=-1)
        for role in ("scales", "biases")
    )
    return Affine(codes_of(weights[f"{path}.weight"], bits), scales, biases)


def float_values(weights: Mapping[str, np.ndarray], path: str, spec: Mapping[str, Any]) -> Any:
    """The values of an mxfp4, mxfp8 or nvfp4 layer, by MLX, in float32."""
    arrays = [mx.array(weights[f"{path}.{role}"]) for role in ("weight", "scales")]
    arguments = {key: spec[key] for key in ("group_size", "bits", "mode")}
    scale = weights.get(f"{path}.global_scale")
    if scale is not None:
        arguments["global_scale"] = mx.array(scale)
    return np.array(mx.dequantize(*arrays, **arguments, dtype=mx.float32))


def mlx_values(weights: Mapping[str, np.ndarray], path: str, spec: Mapping[str, Any]) -> Any:
    """What MLX computes for a layer, as float32; affine in the dtype of its scales."""
    if spec["mode"] != "affine":
        return float_values(weights, path, spec)
    arrays = [to_mx(weights[f"{path}.{role}"]) for role in ("weight", "scales", "biases")]
    values = mx.dequantize(*arrays, group_size=spec["group_size"], bits=spec["bits"])
    return np.array(values.astype(mx.float32))


def by_mlx_lm(source: Path, target: Path, **options) -> Weights:
    import mlx_lm

    mlx_lm.convert(str(source), str(target), **options)
    return load(target)


def assert_same_output(ours: Path, theirs: Path, expected: Weights) -> None:
    """Assert that two folders hold equal tensors, bit for bit, and equal configs."""
    weights = load(ours)
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not same(weights[key], expected[key])] == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1]
