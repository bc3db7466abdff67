"""MLX's own quantized checkpoints: packed codes, scales and, in affine mode, biases.

Value: affine ``w = code * scale + bias``; mxfp4, mxfp8 and nvfp4 ``w = element * scale``.
A row is one little-endian bit stream of codes in uint32 words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import KERNEL_FLOATS, TensorInfo
from requant.core.reasons import Note, NoteCode
from requant.errors import OutOfRangeError, Problem
from requant.formats.base import (
    SourceLayer,
    SourceLayout,
    Tensors,
    dense_layer,
    describe_encoding,
    fallback_for,
    named_parts,
)
from requant.formats.mlx_block import (
    SCALE_BYTES,
    Stated,
    encodings,
    find_block,
    read_block,
    words_for,
)
from requant.formats.tensor_sorter import LayerError
from requant.packings.rotated import ROLES as ROTATION
from requant.packings.rotated import RotatedTriple, read_rotation
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.modes import check_quantization
from requant.text import join_first, pluralize


class Mlx:
    """A folder that MLX tools wrote, detected from the ``quantization`` block of its config."""

    name = "mlx"
    layer_parts = "PATH.weight with PATH.scales (and PATH.biases)"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """MLX folders carry a block without ``quant_method``."""
        where, block = find_block(checkpoint)
        return None if block is None else where

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """Find the triples, check each against its parameters, and leave the rest dense."""
        tensors = checkpoint.tensors
        paths = {name.rpartition(".")[0] for name in tensors}
        block = read_block(*find_block(checkpoint), paths.__contains__)
        layers: list[SourceLayer] = []
        problems = block.problems
        notes: list[Note] = []
        renamed: list[str] = []
        parts_of = _parts(tensors)
        taken = {part.name for parts in parts_of.values() for part in parts.values()}
        for tensor in tensors.values():
            path = tensor.name.removesuffix(".weight")
            if tensor.name not in taken:
                layers.append(dense_layer(tensor))
            elif tensor.name == f"{path}.weight":
                parts = parts_of[path]
                rotation_tensors = {role: parts.pop(role) for role in ROTATION if role in parts}
                declared = block.of(path, encodings(parts))
                if declared not in (None, block.default, block.entries.get(path)):
                    renamed.append(path)
                layer, wrong = _layer(path, parts, declared, notes)
                if layer is not None and rotation_tensors:
                    layer = _rotated(checkpoint, layer, rotation_tensors, wrong)
                problems += wrong
                if layer is not None:
                    layers.append(layer)
        if renamed:
            text = (
                f"{block.where} has {pluralize(len(renamed), 'layer')} under names with another "
                f"prefix ({join_first(renamed)}); their tensors fit what it says, and they are "
                "read so."
            )
            notes.append(Note(NoteCode.OTHER_PREFIX, text))
        rotated = any(layer.rotation_tensors for layer in layers)
        return SourceLayout(
            tuple(layers),
            block.quantization,
            tuple(problems),
            notes=tuple(notes),
            rotation=checkpoint.config.get("rotation") if rotated else None,
        )


def _parts(tensors: Tensors) -> dict[str, dict[str, SourceTensor]]:
    """Layer path -> role -> tensor, for each weight with scales next to it."""
    found: dict[str, dict[str, SourceTensor]] = {}
    for name in tensors:
        path = name.removesuffix(".scales")
        if path == name or f"{path}.weight" not in tensors:
            continue
        roles = ("weight", "scales", "biases", "global_scale", *ROTATION)
        found[path] = named_parts(tensors, path, roles)
    return found


def _layer(
    path: str, parts: Tensors, declared: Stated | None, notes: list[Note]
) -> tuple[SourceLayer | None, list[Problem]]:
    """Hold a triple against its parameters; all that disagrees is listed.

    Where shapes allow one encoding, they are believed over what is said, and where they allow
    one that has every value that is said, over the defaults for what is not.
    """
    if declared is None:  # a problem already
        return None, []
    fitting = encodings(parts)
    quantization = declared.quantization
    if quantization not in fitting:
        agreeing = [each for each in fitting if declared.quantization and declared.agrees(each)]
        believed = agreeing if len(agreeing) == 1 else fitting
        if len(believed) == 1:
            if believed is fitting:
                words = "false" if quantization is None else describe_encoding(quantization, "")
                text = (
                    f"{declared.where} says {words} of {path}, but its tensors leave one reading, "
                    f"{words_for(believed)}, and are believed."
                )
                notes.append(Note(NoteCode.CONFIG_CONTRADICTED, text))
            quantization = believed[0]
    either = f"; its shapes fit {words_for(fitting)}" if len(fitting) > 1 else ""
    if quantization is None:
        message = (
            f"is false, yet {path}.scales is in the checkpoint; say the group_size and bits "
            f"of its codes there, or remove the scales if the weight is dense{either}"
        )
        return None, [Problem(declared.where, message)]
    try:
        check_quantization(quantization.bits, quantization.group_size, quantization.mode.value)
    except OutOfRangeError as error:
        return None, [Problem(f"{declared.where} ({path})", f"{error}{either}")]
    try:
        shape = _logical_shape(path, parts["weight"].info, quantization)
    except LayerError as rejected:
        return None, [Problem(rejected.problem.where, f"{rejected.problem.message}{either}")]
    problems = [
        *_wrong_scales(path, parts, shape, quantization),
        *_wrong_global_scale(path, parts, shape, quantization),
    ]
    if problems and quantization not in fitting and either:
        last = problems[-1]
        problems[-1] = Problem(last.where, f"{last.message} ({declared.where}){either}")
    if problems:
        return None, problems
    dtype = _decoded_dtype(parts, quantization)
    return SourceLayer(path=path, parts=parts, encoding=quantization, shape=shape, dtype=dtype), []


def _logical_shape(path: str, weight: TensorInfo, quantization: Quantization) -> tuple[int, ...]:
    """``(..., out, in)`` of packed words ``(..., out, in * bits / 32)``.

    Raises:
        LayerError: They are not words, or hold no whole groups.
    """
    if weight.dtype != "U32" or len(weight.shape) < 2:
        message = f"{weight}, expected U32 of rank 2 or more next to {path}.scales"
        raise LayerError(f"{path}.weight", message)
    *leading, words = weight.shape
    n_in, remainder = divmod(words * 32, quantization.bits)
    if remainder or n_in % quantization.group_size:
        message = (
            f"{weight}: {words} words hold no whole number of groups of "
            f"{quantization.group_size} at {quantization.bits} bits"
        )
        raise LayerError(f"{path}.weight", message)
    return (*leading, n_in)


def _wrong_scales(
    path: str, parts: Tensors, shape: tuple[int, ...], quantization: Quantization
) -> Iterator[Problem]:
    """The problems of the scales and biases of a layer of this shape."""
    mode, affine = quantization.mode, quantization.mode is QuantMode.AFFINE
    dtypes = KERNEL_FLOATS if affine else SCALE_BYTES
    expected = TensorInfo(dtypes[0], (*shape[:-1], shape[-1] // quantization.group_size))
    for role in ("scales", "biases") if affine else ("scales",):
        if role not in parts:
            yield Problem(f"{path}.{role}", f"is missing (mode {mode})")
            continue
        info = parts[role].info
        if info.shape != expected.shape or info.dtype not in dtypes:
            whose = f"{describe_encoding(quantization, '')} of {parts['weight'].info}"
            yield Problem(f"{path}.{role}", f"{info}, expected {expected} for {whose}")
    if not affine and "biases" in parts:
        yield Problem(f"{path}.biases", f"must not be there: {mode} has scales only")


def _wrong_global_scale(
    path: str, parts: Tensors, shape: tuple[int, ...], quantization: Quantization
) -> Iterator[Problem]:
    """The problems of ``global_scale``, which nvfp4 may have: one number, or one per expert."""
    if "global_scale" not in parts:
        return
    name, info = f"{path}.global_scale", parts["global_scale"].info
    if quantization.mode is not QuantMode.NVFP4:
        yield Problem(name, f"must not be there: {quantization.mode} has no global scale")
    experts = shape[0] if len(shape) > 2 else 1
    if info.dtype != "F32" or info.size not in (1, experts):
        each = f", or one for each of {experts} experts" if experts > 1 else ""
        yield Problem(name, f"{info}, expected one F32{each}")


def _rotated(
    checkpoint: Checkpoint, layer: SourceLayer, rotation_tensors: Tensors, problems: list[Problem]
) -> SourceLayer | None:
    entry = checkpoint.config.get("rotation")
    group = entry.get("group_size") if isinstance(entry, dict) else None
    if not isinstance(group, int) or group < 1:
        message = (
            f"gives no group_size for the rotation of {layer.path}; put the block back that the "
            'conversion wrote, such as {"method": "paroquant", "group_size": 128, "krot": 8}'
        )
        problems.append(Problem("config.json: rotation", message))
        return None
    if layer.encoding is None or layer.encoding.mode is not QuantMode.AFFINE:
        problems.append(Problem(layer.path, "has a rotation, but no affine codes"))
        return None
    columns = layer.shape[-1]
    krot = read_rotation(
        checkpoint, layer.path, rotation_tensors, columns, group, problems=problems
    )
    if krot is None:
        return None
    packing = RotatedTriple(layer.shape, layer.encoding, group, krot)
    return replace(
        layer,
        parts={**layer.parts, **rotation_tensors},
        packing=packing,
        stored_description=f"{describe_encoding(layer.encoding, layer.dtype)} rotated",
        policy=replace(layer.policy, fallback=fallback_for(columns)),
        rotation_tensors=dict(rotation_tensors),
    )


def _decoded_dtype(parts: Tensors, quantization: Quantization) -> str:
    """The dtype that ``mx.dequantize`` gives by default."""
    if quantization.mode is not QuantMode.AFFINE:
        return "F32" if "global_scale" in parts else "BF16"
    scales, biases = parts["scales"].info.dtype, parts["biases"].info.dtype
    return scales if scales == biases else "F32"
