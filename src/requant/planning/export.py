"""Plan an export: the layers of a checkpoint in the format of another tool, with their codes.

Codes and scales stay as they are. The class of an affine layer depends on its biases, so its scales
and biases are read here, block by block, before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor, log10
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import NoteCode, Reason, ReasonCode
from requant.errors import CheckpointError, Problem
from requant.formats import SourceLayer
from requant.formats.base import describe_encoding
from requant.formats.quantization_block import without_blocks
from requant.formats.stale_blocks import read_source
from requant.layouts.expert_names import EXPERT_NAMES, split_stacks
from requant.layouts.head_names import find_pair, flags, is_head
from requant.packings.base import EXACT, Exactness, Fidelity, IntegerPacking, rounded
from requant.packings.zero_points import ZeroPoints
from requant.planning.export_compressed_tensors import COMPRESSED_TENSORS, MXFP4, NVFP4
from requant.planning.export_gptq_awq import AWQ, GPTQ
from requant.planning.export_targets import HeldLayer, LayerWriter, TargetFormat
from requant.planning.export_zeros import read_zeros, stored_scale_dtype
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned
from requant.planning.shard_layout import assign_offsets
from requant.planning.steps import fidelity as step_fidelity
from requant.planning.steps import layer_steps
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.export_options import ExportFormat, ExportOptions, Otherwise
from requant.quantization.options import ConvertOptions
from requant.quantization.roles import ROLES
from requant.text import pluralize_are

FORMATS: Final = {
    ExportFormat.COMPRESSED_TENSORS: COMPRESSED_TENSORS,
    ExportFormat.GPTQ: GPTQ,
    ExportFormat.AWQ: AWQ,
    ExportFormat.MXFP4: MXFP4,
    ExportFormat.NVFP4: NVFP4,
}

SAME_NAMES: Final = frozenset(
    {
        *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite"),
        *("helium", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3"),
        *("seed_oss", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Values of ``model_type`` whose tensors have the same names, shapes and values in mlx-lm's folders
as in transformers'."""

_EMBEDDING, _ROUTER = re.compile(ROLES["embedding"]), re.compile(ROLES["router"])


@dataclass(frozen=True, slots=True)
class _Decision:
    """What becomes of a layer."""

    layer: SourceLayer
    held: HeldLayer | None  # with its codes; None is dense
    reason: Reason | None = None  # why codes of the source do not stay, or are in more bits


def plan_export(
    checkpoint: Checkpoint, options: ExportOptions, *, keeps_names: bool = False
) -> Planned:
    """Plan the export of a checkpoint; scales and biases of its layers are read.

    Args:
        checkpoint: The source.
        options: The format, and what becomes of layers that it cannot hold.
        keeps_names: Whether an MLX folder is known to have transformers' names; else ``model_type``
            must be one of ``SAME_NAMES``.

    Raises:
        CheckpointError: With all problems of the source, and under ``Otherwise.REFUSE`` every
            layer that the format cannot hold.
    """
    read = read_source(checkpoint)
    source, layout = read.checkpoint, read.layout
    problems = list(layout.problems)
    if not problems and read.format in _WITHOUT_CODES:
        problems.append(_no_codes(source))
    if not problems:
        notes = (note for note in source.notes if note.code in _OTHER_NAMES)
        problems += [Problem(str(source.source), note.text) for note in notes]
    if not problems and read.format in _MLX_NAMES and not keeps_names:
        problems += _other_names(source)
    if problems:
        raise CheckpointError(str(source.source), problems, "exported")
    decide = _Decider(source, FORMATS[options.to], options.otherwise)
    split = split_stacks(layout.layers, source.config)
    decisions = [decide(layer) for layer in split]
    for decision in decisions:
        code = None if decision.reason is None else decision.reason.code
        is_refused = decision.held is None and options.otherwise is not Otherwise.DENSE
        if code is ReasonCode.NOT_IN_FORMAT and is_refused:
            message = f"{decision.reason}; {_ADVICE[options.otherwise]}"
            problems.append(Problem(decision.layer.path, message))
    if source.opened.damaged:
        problems += source.opened.damaged.values()
    if not problems and all(decision.held is None for decision in decisions):
        message = f"no layer has codes that {options.to} holds: the result would be dense"
        problems.append(Problem(str(source.source), f"{message}; {_DENSE_ADVICE}"))
    if problems:
        raise CheckpointError(str(source.source), problems, "exported")
    return _planned(source, read.format, decisions, options, layout.notes)


_MLX_NAMES: Final = ("mlx", "metal")  # formats of folders with names of MLX's classes
_WITHOUT_CODES: Final = ("dense",)
# Notes on GGUF files whose tensors keep names that only llama.cpp knows.
_OTHER_NAMES: Final = (NoteCode.UNKNOWN_ARCHITECTURE, NoteCode.UNKNOWN_TENSOR_NAMES)
_ADVICE: Final = {
    Otherwise.REFUSE: "--otherwise widen takes more bits where the format has them, "
    "--otherwise dense decodes it",
    Otherwise.WIDEN: "the format has no more bits for it; --otherwise dense decodes it",
}
_DENSE_ADVICE = "requant convert SOURCE OUTPUT --dequantize makes a dense folder"


def _no_codes(source: Checkpoint) -> Problem:
    return Problem(
        str(source.source),
        "is dense, and export moves codes. Quantize it first, then export the result: "
        f"requant convert {source.source} FOLDER --layout keep --bits 4",
    )


def _other_names(source: Checkpoint) -> Iterator[Problem]:
    """The problem of a model whose tensors may be other ones in mlx-lm than in transformers."""
    kind = source.config.get("model_type")
    known = sorted({*SAME_NAMES, *EXPERT_NAMES})
    if kind not in known:
        yield Problem(
            "config.json: model_type",
            f"is {kind!r}, whose tensors mlx-lm may rename, stack or change, and export does not "
            f"undo that yet; known are {', '.join(known)}. Of another model, "
            "convert the original with --layout keep, then export the result",
        )


# -- decisions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decider:
    """Decides whether the codes of a layer stay."""

    source: Checkpoint
    target: TargetFormat
    otherwise: Otherwise

    def __call__(self, layer: SourceLayer) -> _Decision:
        if not layer.is_quantized:
            return _Decision(layer, None)
        if not self.target.takes_tokens and (why := _dense_for_readers(layer.path)) is not None:
            return _Decision(layer, None, Reason(ReasonCode.DENSE_FOR_READERS, why))
        if len(layer.shape) != 2:
            stack = f"a stack of matrices, {list(layer.shape)}, which the format stores one by one"
            return _Decision(layer, None, Reason(ReasonCode.NOT_IN_FORMAT, stack))
        codes = layer.encoding
        if codes is None or layer.rotation_tensors:
            known = layer.policy.reason
            text = "its codes are none of MLX's" if known is None else known.text
            return self._other_codes(layer, f"{layer.stored_as}: {text}")
        written, zeros = self.target.scale_dtype(stored_scale_dtype(layer)), ZeroPoints()
        if codes.mode is QuantMode.AFFINE and self.target.integer_zeros:
            zeros = read_zeros(self.source, layer, written)
            self._check_finite(layer, zeros, written)
        held = HeldLayer(layer, codes, codes, scale_dtype=written, zeros=zeros)
        why = self.target.why_not(codes, layer.shape) or _why_no_zeros(zeros, codes.bits)
        if not why:
            return _Decision(layer, held)
        if self.otherwise is Otherwise.WIDEN:
            for wider in self.target.wider(codes):
                fits = zeros.fit(codes.bits, wider.bits)
                if fits and not self.target.why_not(wider, layer.shape):
                    text = f"the same codes in {wider.bits} bits: {why}"
                    reason = Reason(ReasonCode.CODES_WIDENED, text)
                    return _Decision(layer, replace(held, written=wider), reason)
        return self._other_codes(layer, why)

    def _other_codes(self, layer: SourceLayer, why: str) -> _Decision:
        """New codes where they are asked for and the format has them, else none."""
        target = self.target.encoded_again(layer.shape)
        is_plain = "global_scale" not in layer.parts
        if self.otherwise is not Otherwise.WIDEN or target is None or not is_plain:
            return _Decision(layer, None, Reason(ReasonCode.NOT_IN_FORMAT, why))
        held = HeldLayer(
            layer,
            target,
            target,
            scale_dtype=self.target.scale_dtype(layer.dtype),
            zeros=ZeroPoints(lowest=0, highest=(1 << target.bits) - 1),
            is_encoded_again=True,
        )
        return _Decision(layer, held, Reason(ReasonCode.NOT_IN_FORMAT, why))

    def _check_finite(self, layer: SourceLayer, zeros: ZeroPoints, written: str) -> None:
        if zeros.nonfinite:
            message = f"{pluralize_are(zeros.nonfinite, 'scale or bias')} NaN or infinite"
            message = f"{message}. Take the file from its publisher again"
        elif zeros.overflowed:
            found = pluralize_are(zeros.overflowed, "scale")
            message = f"{found} beyond the range of {written}, in which {self.target.name} has them"
        else:
            return
        problem = Problem(layer.path, message)
        raise CheckpointError(str(self.source.source), [problem], "exported")


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
    return f"of {zeros.groups:,} groups {' and '.join(found)}" if found else ""


def _fidelity(held: HeldLayer) -> Fidelity:
    if held.is_encoded_again:
        return Fidelity(Exactness.REENCODED)
    bounds, zeros = [], held.zeros
    if zeros.rounded:
        # One digit, rounded up: layers with nearly the same bound are printed in one line.
        digit = 10.0 ** floor(log10(zeros.max_steps))
        bound = f"{ceil(zeros.max_steps / digit) * digit:.1g}"
        bounds.append(f"biases become -zero * scale, which differs by at most {bound} steps")
    packing = held.layer.packing
    computed = isinstance(packing, IntegerPacking) and packing.computes_scales
    if zeros.scales_rounded or computed:
        bounds.append(rounded("scales", held.scale_dtype).bound)
    if "global_scale" in held.layer.parts:
        bounds.append("tensor scale: 1/8388608 (float32) of itself")
    return Fidelity(Exactness.ROUNDED, "; ".join(bounds)) if bounds else EXACT


# -- the plan --------------------------------------------------------------------------------------


def _planned(
    source: Checkpoint,
    format: str,
    decisions: list[_Decision],
    options: ExportOptions,
    notes: tuple[Any, ...],
) -> Planned:
    writer_class = FORMATS[options.to].writer
    settled = iter(writer_class.settled([x.held for x in decisions if x.held is not None]))
    decisions = [x if x.held is None else replace(x, held=next(settled)) for x in decisions]
    writer = writer_class([x.held for x in decisions if x.held is not None])
    steps: list[Step] = []
    layers = []
    for decision in decisions:
        own = list(_layer_steps(decision, writer))
        steps += own
        layers.append(_layer_plan(decision, own, options))
    block = writer.block(_ignored(source, decisions))
    shards, placed = assign_offsets(steps, ConvertOptions().shard_size, "pt")
    plan = Plan(
        source=str(source.source),
        format=format,
        files=source.files,
        layers=tuple(layers),
        steps=placed,
        shards=shards,
        config={**without_blocks(source.config), "quantization_config": block},
        quantization=None,
        side_files=(*source.side_files, *sorted(source.opened.generated_files)),
        left_out=source.left_out,
        notes=(*source.notes, *notes),
        repository=source.repository,
        side_bytes=source.opened.size_of(source.side_files),
    )
    return Planned(plan, PlanSource(source))


def _layer_steps(decision: _Decision, writer: LayerWriter) -> Iterator[Step]:
    if decision.held is None:
        return layer_steps(decision.layer, None, decision.layer.dtype, ConvertOptions())
    return writer.steps(decision.held)


def _layer_plan(decision: _Decision, steps: list[Step], options: ExportOptions) -> LayerPlan:
    layer, held = decision.layer, decision.held
    treatment = Treatment.DENSE if not layer.is_quantized else Treatment.DEQUANTIZED
    described, fidelity = layer.dtype, EXACT
    if held is not None:
        treatment = Treatment.REQUANTIZED if held.is_encoded_again else Treatment.KEPT
        fidelity = _fidelity(held)
        described = f"{options.to} {_described(held.written, options.to)}"
    elif layer.is_quantized:
        fidelity = rounded("values", layer.dtype)
    else:
        fidelity = step_fidelity(steps[0])
    return LayerPlan(
        layer=layer.path,
        shape=layer.shape,
        source=layer.stored_as if layer.is_quantized else describe_encoding(None, layer.dtype),
        target=described,
        treatment=treatment,
        exactness=fidelity.exactness,
        nbytes=sum(t.info.nbytes for step in steps for t in step.outputs.values()),
        is_weight=layer.is_weight,
        reason=decision.reason,
        bound=fidelity.bound,
    )


def _described(written: Quantization, to: ExportFormat) -> str:
    mode = "" if written.mode in (QuantMode.AFFINE, to) else f"{written.mode} "
    return f"{mode}{written.bits}-bit g{written.group_size}"


def _ignored(source: Checkpoint, decisions: list[_Decision]) -> list[str]:
    """Paths of the linear layers that are dense, that of a tied head included."""
    layers = [x.layer for x in decisions]
    dense = [x.layer for x in decisions if x.held is None and x.layer.is_weight]
    ignored = [x.path for x in dense if len(x.shape) == 2 and not _EMBEDDING.search(x.path)]
    pair = find_pair(layers)
    tied = any(is_tied for _, is_tied in flags(source.config))
    if tied or (pair is not None and pair.head is None):
        ignored.append("lm_head")
    return list(dict.fromkeys(ignored))
