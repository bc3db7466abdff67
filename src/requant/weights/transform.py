"""``transform_weights``: any quantized weight map in memory becomes MLX's.

The formats and packings are those of the pipeline; only the rows come from arrays, not files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np

from requant.checkpoints.adapters import problems_in
from requant.checkpoints.checkpoint import Checkpoint, OpenedSource, SourceTensor, StoredTensor
from requant.core.dtypes import HEADER_NAME, NUMPY_DTYPE, TensorInfo
from requant.core.regex import regex_time_budget
from requant.errors import CheckpointError, InvariantError, UnsupportedDtypeError
from requant.execution.damaged_scales import damaged_parts
from requant.formats import SourceLayer, read_layout
from requant.formats.empty_weights import empty_weights
from requant.kernels import quantize as native
from requant.kernels.backend import Array, Backend, Weights, backend_for
from requant.packings.base import Packing
from requant.planning.steps import output_tensor_infos
from requant.planning.target_fitting import fit_group_size
from requant.quantization.config import PerLayerQuantization, Quantization
from requant.text import pluralize

# Rows are decoded in pieces of about this many values: one piece stays in a cache.
_PIECE_VALUES = 1 << 21


@regex_time_budget()
def transform_weights(
    weights: Weights,
    quantization_config: Mapping[str, Any],
    *,
    otherwise: Quantization | Literal["dense"] | None = None,
) -> tuple[dict[str, Array], PerLayerQuantization]:
    """Turn a quantized weight map of any supported format into MLX's layers.

    Stored codes are moved bit for bit where a mode of MLX holds them; a layer that none holds
    is decoded and encoded again as ``requant convert`` does it by default, or left dense.
    Unlike ``transform_awq_weights`` this evaluates the quantized layers of MLX arrays, one at
    a time.

    Args:
        weights: Tensor name -> array, all of one library. float8 tensors may be ml_dtypes
            arrays, or uint8 as ``mx.load`` gives them.
        quantization_config: The ``quantization_config`` block of the source's config.json.
        otherwise: The target of layers that require an explicit choice (FP8 with scales that no
            mode of MLX holds): a quantization (with the largest group that divides a row), or
            "dense".

    Returns:
        A new weight map of the library that came in, and the quantization of its layers.
        Tensors of no quantized layer are the same arrays.

    Raises:
        CheckpointError: Everything that is wrong with the map, by tensor and key.
        InvariantError: The map mixes array libraries, layers require ``otherwise`` and it is not
            given, or scales hold NaN or infinity.
        UnsupportedDtypeError: A value is an array of neither library.

    Example:
        >>> import numpy as np
        >>> weights = {
        ...     "up.qweight": np.full((32, 1), 0x75316420, np.int32),  # codes 0 to 7
        ...     "up.qzeros": np.full((1, 1), 0x44444444, np.int32),  # every zero is 4
        ...     "up.scales": np.full((1, 8), 0.5, np.float16),
        ... }
        >>> block = {"quant_method": "awq", "bits": 4, "group_size": 32}
        >>> converted, quantization = transform_weights(weights, block)
        >>> quantization.quantization
        Quantization(group_size=32, bits=4, mode=<QuantMode.AFFINE: 'affine'>)
        >>> converted["up.biases"].ravel().tolist()
        [-2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
    """
    library = backend_for(weights)
    checkpoint = _checkpoint_of(weights, library, quantization_config)
    layout = read_layout(checkpoint)[1]
    empty = empty_weights(checkpoint, layout)
    if problems := [*problems_in(weights), *empty, *layout.problems]:
        raise CheckpointError("weights", problems)
    undecided = [
        layer.path
        for layer in layout.layers
        if layer.policy.requires_choice and layer.default_target is None
    ]
    if undecided and otherwise is None:
        more = f" (and {pluralize(len(undecided) - 1, 'more layer')})" if len(undecided) > 1 else ""
        raise InvariantError(
            f"has codes that no mode of MLX holds{more}; say what they become: "
            "otherwise=Quantization.affine(64, 4), or otherwise='dense'",
            layer=undecided[0],
        )
    result: dict[str, Array] = {}
    per_layer: dict[str, Quantization] = {}
    for layer in layout.with_act_order_folded(lambda _: True).layers:
        if layer.policy.requires_choice and isinstance(otherwise, Quantization):
            fallback = fit_group_size(layer.shape[-1], otherwise)[0]
            layer = replace(layer, policy=replace(layer.policy, fallback=fallback))
        if layer.packing is None:
            result |= {
                part.name: _in_order(weights[part.name], layer, library.name)
                for part in layer.parts.values()
            }
            target = layer.encoding
        else:
            target = layer.default_target
            if target == layer.encoding:
                result |= {
                    f"{layer.path}.{role}": weights[part.name]
                    for role, part in layer.rotation_tensors.items()
                }
            for name, array in _transform(checkpoint, layer, layer.packing):
                result[name] = array if library.name == "numpy" else _to_mlx(array)
        if target is not None:
            per_layer[layer.path] = target
    return result, PerLayerQuantization.from_layers(per_layer)


def _in_order(array: Array, layer: SourceLayer, library: str) -> Array:
    """An array of the layer, its rows in the order that the output wants."""
    if layer.row_order is None:
        return array
    if library == "numpy":
        return array[layer.row_order.rows]
    import mlx.core as mx

    return mx.take(array, mx.array(layer.row_order.rows), axis=0)


def _checkpoint_of(weights: Weights, library: Backend, block: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint whose tensors are arrays."""
    tensors = {
        name: StoredTensor(
            name, TensorInfo(_header_name(library, name, array), library.shape(array)), "", 0
        )
        for name, array in weights.items()
    }
    return Checkpoint(
        files=(),
        tensors=MappingProxyType(tensors),
        config={"quantization_config": dict(block)},
        config_text="",
        side_files=(),
        left_out=(),
        opened=_Arrays(weights),
    )


class _Arrays(OpenedSource):
    """The tensors of a checkpoint in memory: there are no files to read."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(Path(os.devnull))
        self._weights = weights

    def read_small_tensor(self, tensor: SourceTensor) -> np.ndarray:
        """The array as NumPy sees it."""
        array, dtype = self._weights[tensor.name], NUMPY_DTYPE[tensor.info.dtype]
        if isinstance(array, np.ndarray):
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        import mlx.core as mx

        if dtype == NUMPY_DTYPE["BF16"]:
            return np.asarray(array.view(mx.uint16)).view(dtype)
        return np.asarray(array)


def _header_name(library: Backend, name: str, array: Array) -> str:
    """The dtype as a safetensors header spells it."""
    word = library.dtype(array)
    try:
        return HEADER_NAME[np.dtype(getattr(ml_dtypes, word, word.rstrip("_")))]
    except (KeyError, TypeError):
        raise UnsupportedDtypeError(
            "tensor", word, sorted(HEADER_NAME.values()), layer=name
        ) from None


class _NewBuffers:
    """Scratch memory that is never reused."""

    def take(self, role: str, dtype: str, rows: int, row_bytes: int) -> np.ndarray:
        width = row_bytes // NUMPY_DTYPE[dtype].itemsize
        return np.empty((rows, width), NUMPY_DTYPE[dtype])


def _transform(
    checkpoint: Checkpoint, layer: SourceLayer, packing: Packing
) -> Iterator[tuple[str, np.ndarray]]:
    """The layer's tensors in MLX's layout."""
    target = layer.default_target
    infos = output_tensor_infos(layer.shape, layer.dtype, target)
    out = {role: np.empty(info.shape, NUMPY_DTYPE[info.dtype]) for role, info in infos.items()}
    flat = {role: array.reshape(packing.rows, -1) for role, array in out.items()}
    matrices = {
        role: _matrix(checkpoint.read_small_tensor(part.name)) for role, part in layer.parts.items()
    }
    names, scratch = {role: part.name for role, part in layer.parts.items()}, _NewBuffers()
    for start, stop in _pieces(packing):
        parts = {
            role: np.ascontiguousarray(matrices[role][slice(*cut.rows), slice(*cut.columns)])
            for role, cut in packing.required_rects(start, stop).items()
        }
        damaged = damaged_parts(packing, names, parts, start, stop)
        if damaged.damaged:
            raise InvariantError(damaged.damage, layer=damaged.damaged_tensor)
        rows = {role: array[start:stop] for role, array in flat.items()}
        if target is not None and target == layer.encoding:
            packing.repack(parts, start, stop, rows, scratch)
            continue
        dense = rows["weight"]
        if target is not None:
            dense = np.empty((stop - start, packing.columns), NUMPY_DTYPE[layer.dtype])
        packing.decode(parts, start, stop, dense, scratch)
        if target is not None:
            native.quantize_into(dense, target, native.QuantizedTensors.from_roles(rows))
    for role, array in out.items():
        if layer.row_order is not None:
            array = array[layer.row_order.rows]
        yield layer.dense_name if target is None else f"{layer.path}.{role}", array


def _pieces(packing: Packing) -> Iterator[tuple[int, int]]:
    unit = packing.row_unit
    rows = max(_PIECE_VALUES // max(packing.columns, 1) // unit, 1) * unit
    for first in range(0, packing.rows, packing.matrix_rows):
        for start in range(first, min(first + packing.matrix_rows, packing.rows), rows):
            yield start, min(start + rows, first + packing.matrix_rows, packing.rows)


def _matrix(array: np.ndarray) -> np.ndarray:
    """The array as packings cut it: rows of the last axis; a vector is one row."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _to_mlx(array: np.ndarray) -> Any:
    import mlx.core as mx

    if array.dtype == NUMPY_DTYPE["BF16"]:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)
