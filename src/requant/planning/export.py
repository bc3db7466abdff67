"""Plan an export: the affine layers of an MLX folder in the format of another tool.

Codes and scales stay as they are. The class of a layer depends on its biases, so its scales and
biases are read here, block by block, before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any, Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor, cut
from requant.core.dtypes import NUMPY_DTYPE
from requant.core.reasons import Reason, ReasonCode
from requant.errors import CheckpointError, Problem
from requant.formats import SourceLayer
from requant.formats.base import describe_encoding
from requant.formats.quantization_block import without_blocks
from requant.formats.stale_blocks import read_source
from requant.layouts.head_names import find_pair, flags, is_head
from requant.packings.base import EXACT, Exactness, Fidelity, rounded
from requant.packings.zero_points import ZeroPoints, examine_zeros
from requant.planning import export_compressed_tensors as compressed_tensors
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned
from requant.planning.shard_layout import assign_offsets
from requant.planning.steps import layer_steps
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.export_options import ExportOptions, Otherwise
from requant.quantization.options import ConvertOptions
from requant.quantization.roles import ROLES
from requant.text import join_or, pluralize_are

SAME_NAMES: Final = frozenset(
    {
        *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite"),
        *("helium", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3"),
        *("seed_oss", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Values of ``model_type`` whose tensors have the same names, shapes and values in mlx-lm's folders
as in transformers'."""

_BLOCK_VALUES = 1 << 20  # scales, and as many biases, that are held at a time
_EMBEDDING, _ROUTER = re.compile(ROLES["embedding"]), re.compile(ROLES["router"])


@dataclass(frozen=True, slots=True)
class _Decision:
    """What becomes of a layer."""

    layer: SourceLayer
    target: Quantization | None  # that of the codes that are kept; None is dense
    fidelity: Fidelity = EXACT
    reason: Reason | None = None  # why codes of the source do not stay
    zeros: ZeroPoints | None = None


def plan_export(
    checkpoint: Checkpoint, options: ExportOptions, *, keeps_names: bool = False
) -> Planned:
    """Plan the export of an MLX folder; its scales and biases are read.

    Args:
        checkpoint: The source.
        options: The format, and what becomes of layers that it cannot hold.
        keeps_names: Whether the source is known to have transformers' names; else ``model_type``
            must be one of ``SAME_NAMES``.

    Raises:
        CheckpointError: With all problems of the source, and under ``Otherwise.REFUSE`` every
            layer that the format cannot hold.
    """
    read = read_source(checkpoint)
    source, layout = read.checkpoint, read.layout
    problems = list(layout.problems)
    if not problems and read.format != "mlx":
        problems.append(_not_mlx(source, read.format))
    if not problems and not keeps_names:
        problems += _other_names(source)
    if problems:
        raise CheckpointError(str(source.source), problems, "exported")
    decisions = []
    for layer in layout.layers:
        decision = _decide(source, layer)
        decisions.append(decision)
        code = None if decision.reason is None else decision.reason.code
        if code is ReasonCode.NOT_IN_FORMAT and options.otherwise is Otherwise.REFUSE:
            problems.append(Problem(layer.path, f"{decision.reason}; {_ADVICE}"))
    if source.opened.damaged:
        problems += source.opened.damaged.values()
    if not problems and all(decision.target is None for decision in decisions):
        message = f"no layer has codes that {options.to} holds: the result would be dense"
        problems.append(Problem(str(source.source), f"{message}; {_DENSE_ADVICE}"))
    if problems:
        raise CheckpointError(str(source.source), problems, "exported")
    return _planned(source, decisions, options, layout.notes)


_ADVICE = (
    "--otherwise dense decodes such layers; or convert the model it was made from to 4 or 8 bits"
)
_DENSE_ADVICE = "requant convert SOURCE OUTPUT --dequantize makes a dense folder"


def _not_mlx(source: Checkpoint, format: str) -> Problem:
    is_dense = format == "dense"
    kind = "dense" if is_dense else f"a {format} checkpoint"
    bits = " --bits 4" if is_dense else ""
    return Problem(
        str(source.source),
        f"is {kind}, and export reads MLX folders. Convert it first, then export the result: "
        f"requant convert {source.source} FOLDER --layout keep{bits}",
    )


def _other_names(source: Checkpoint) -> Iterator[Problem]:
    """The problem of a model whose tensors may be other ones in mlx-lm than in transformers."""
    kind = source.config.get("model_type")
    if kind not in SAME_NAMES:
        yield Problem(
            "config.json: model_type",
            f"is {kind!r}, whose tensors mlx-lm may rename, stack or change, and export does not "
            f"undo that yet; known to be equal are {', '.join(sorted(SAME_NAMES))}. Of another "
            "model, convert the original with --layout keep, then export the result",
        )


# -- decisions -------------------------------------------------------------------------------------


def _decide(source: Checkpoint, layer: SourceLayer) -> _Decision:
    """Decide whether the codes of a layer stay."""
    if not layer.is_quantized:
        return _Decision(layer, None)
    if (why := _dense_for_readers(layer.path)) is not None:
        return _dense(layer, ReasonCode.DENSE_FOR_READERS, why)
    encoding = layer.encoding
    if layer.packing is not None or encoding is None or encoding.mode is not QuantMode.AFFINE:
        return _dense(layer, ReasonCode.NOT_IN_FORMAT, f"{layer.stored_as} has no zero points")
    if encoding.bits not in compressed_tensors.WIDTHS:
        widths = join_or([str(bits) for bits in compressed_tensors.WIDTHS])
        why = f"{encoding.bits} bits, the format's readers take {widths}"
        return _dense(layer, ReasonCode.NOT_IN_FORMAT, why)
    if len(layer.shape) != 2:
        why = f"a stack of matrices, {list(layer.shape)}, which the format stores one by one"
        return _dense(layer, ReasonCode.NOT_IN_FORMAT, why)
    zeros = _examine(source, layer, encoding.bits)
    if zeros.nonfinite:
        message = f"{pluralize_are(zeros.nonfinite, 'scale or bias')} NaN or infinite"
        problem = Problem(layer.path, f"{message}. Take the file from its publisher again")
        raise CheckpointError(str(source.source), [problem], "exported")
    if zeros.out_of_range or zeros.off_grid:
        return _dense(layer, ReasonCode.NOT_IN_FORMAT, _why_no_zeros(zeros, encoding.bits))
    return _Decision(layer, encoding, _fidelity(zeros), zeros=zeros)


def _dense(layer: SourceLayer, code: ReasonCode, why: str) -> _Decision:
    return _Decision(layer, None, rounded("values", layer.dtype), Reason(code, why))


def _dense_for_readers(path: str) -> str | None:
    """Why readers of the format want the layer dense; None where they take codes."""
    if _EMBEDDING.search(path):
        return "an embedding, which readers of the format take dense"
    if is_head(path):
        return "an output head, which readers of the format take dense"
    if _ROUTER.search(path):
        return "a router, which readers of the format take dense"
    return None


def _why_no_zeros(zeros: ZeroPoints, bits: int) -> str:
    found = []
    if zeros.out_of_range:
        limit = (1 << bits) - 1
        found.append(f"{zeros.out_of_range:,} have a zero point outside 0 to {limit}")
    if zeros.off_grid:
        found.append(f"{zeros.off_grid:,} have a bias that is not a whole number of scales")
    return f"of {zeros.groups:,} groups {' and '.join(found)}"


def _fidelity(zeros: ZeroPoints) -> Fidelity:
    if not zeros.rounded:
        return EXACT
    # One digit, rounded up: layers with nearly the same bound are printed in one line.
    digit = 10.0 ** floor(log10(zeros.max_steps))
    bound = f"{ceil(zeros.max_steps / digit) * digit:.1g}"
    return Fidelity(
        Exactness.ROUNDED, f"biases become -zero * scale, which differs by at most {bound} steps"
    )


def _examine(source: Checkpoint, layer: SourceLayer, bits: int) -> ZeroPoints:
    """Read the scales and biases of a layer, a block at a time."""
    scales, biases = layer.parts["scales"], layer.parts["biases"]
    found = ZeroPoints()
    for start in range(0, scales.info.size, _BLOCK_VALUES):
        stop = min(start + _BLOCK_VALUES, scales.info.size)
        block = [_values(source, tensor, start, stop) for tensor in (scales, biases)]
        found = found.merged(examine_zeros(block[0], block[1], bits, scales.info.dtype))
    return found


def _values(source: Checkpoint, tensor: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Values ``start`` to ``stop`` of a tensor, flat."""
    dtype = NUMPY_DTYPE[tensor.info.dtype]
    ranges = list(cut(tensor, start * dtype.itemsize, stop * dtype.itemsize))
    return np.frombuffer(b"".join(source.opened.read_ranges(ranges)), dtype)


# -- the plan --------------------------------------------------------------------------------------


def _planned(
    source: Checkpoint, decisions: list[_Decision], options: ExportOptions, notes: tuple[Any, ...]
) -> Planned:
    kept = {x.layer.path: x.target for x in decisions if x.target is not None}
    # Layers that run as one (q, k and v) need one scheme: zero points are written for all or none.
    symmetric = {
        target: all(x.zeros.all_middle for x in decisions if x.zeros and x.target == target)
        for target in kept.values()
    }
    steps: list[Step] = []
    layers = []
    for decision in decisions:
        layer, target = decision.layer, decision.target
        if target is None:
            own = list(layer_steps(layer, None, layer.dtype, ConvertOptions()))
        else:
            own = list(compressed_tensors.export_steps(layer, symmetric=symmetric[target]))
        steps += own
        layers.append(_layer_plan(decision, own, options))
    block = compressed_tensors.quantization_block(kept, symmetric, _ignored(source, decisions))
    shards, placed = assign_offsets(steps, ConvertOptions().shard_size, "pt")
    plan = Plan(
        source=str(source.source),
        format="mlx",
        files=source.files,
        layers=tuple(layers),
        steps=placed,
        shards=shards,
        config={**without_blocks(source.config), "quantization_config": block},
        quantization=None,
        side_files=source.side_files,
        left_out=source.left_out,
        notes=(*source.notes, *notes),
        repository=source.repository,
        side_bytes=source.opened.size_of(source.side_files),
    )
    return Planned(plan, PlanSource(source))


def _layer_plan(decision: _Decision, steps: list[Step], options: ExportOptions) -> LayerPlan:
    layer, target = decision.layer, decision.target
    treatment = Treatment.DENSE if not layer.is_quantized else Treatment.DEQUANTIZED
    described = layer.dtype
    if target is not None:
        treatment = Treatment.KEPT
        described = f"{options.to} {target.bits}-bit g{target.group_size}"
    return LayerPlan(
        layer=layer.path,
        shape=layer.shape,
        source=layer.stored_as if layer.is_quantized else describe_encoding(None, layer.dtype),
        target=described,
        treatment=treatment,
        exactness=decision.fidelity.exactness,
        nbytes=sum(t.info.nbytes for step in steps for t in step.outputs.values()),
        is_weight=layer.is_weight,
        reason=decision.reason,
        bound=decision.fidelity.bound,
    )


def _ignored(source: Checkpoint, decisions: list[_Decision]) -> list[str]:
    """Paths of the linear layers that are dense, that of a tied head included."""
    layers = [x.layer for x in decisions]
    dense = [x.layer for x in decisions if x.target is None and x.layer.is_weight]
    ignored = [x.path for x in dense if len(x.shape) == 2 and not _EMBEDDING.search(x.path)]
    pair = find_pair(layers)
    tied = any(is_tied for _, is_tied in flags(source.config))
    if tied or (pair is not None and pair.head is None):
        ignored.append("lm_head")
    return list(dict.fromkeys(ignored))
