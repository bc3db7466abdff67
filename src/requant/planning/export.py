"""Plan an export: the layers of a checkpoint in the format of another tool, with their codes.

Codes and scales stay as they are. The class of an affine layer depends on its biases, so its scales
and biases are read here, block by block, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import NoteCode, ReasonCode
from requant.errors import CheckpointError, Problem
from requant.formats.base import describe_encoding
from requant.formats.quantization_block import without_blocks
from requant.formats.stale_blocks import read_source
from requant.layouts.expert_names import EXPERT_NAMES, split_stacks
from requant.layouts.head_names import find_pair, flags
from requant.packings.base import EXACT, rounded
from requant.planning.export_compressed_tensors import COMPRESSED_TENSORS, MXFP4, NVFP4
from requant.planning.export_decisions import EMBEDDING, Decider, Decision, fidelity_of
from requant.planning.export_gptq_awq import AWQ, GPTQ
from requant.planning.export_targets import LayerWriter
from requant.planning.plan import LayerPlan, Plan, Step, Treatment
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned
from requant.planning.shard_layout import assign_offsets
from requant.planning.steps import fidelity as step_fidelity
from requant.planning.steps import layer_steps
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.export_options import ExportFormat, ExportOptions, Otherwise
from requant.quantization.options import ConvertOptions

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
    decide = Decider(source, FORMATS[options.to], options.otherwise)
    split = split_stacks(layout.layers, source.config)
    decisions = [decide(layer) for layer in split]
    for decision in decisions:
        code = None if decision.reason is None else decision.reason.code
        is_left_out = decision.held is None and options.otherwise is not Otherwise.DENSE
        if code is ReasonCode.NOT_IN_FORMAT and is_left_out:
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


# -- the plan --------------------------------------------------------------------------------------


def _planned(
    source: Checkpoint,
    format: str,
    decisions: list[Decision],
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


def _layer_steps(decision: Decision, writer: LayerWriter) -> Iterator[Step]:
    if decision.held is None:
        return layer_steps(decision.layer, None, decision.layer.dtype, ConvertOptions())
    return writer.steps(decision.held)


def _layer_plan(decision: Decision, steps: list[Step], options: ExportOptions) -> LayerPlan:
    layer, held = decision.layer, decision.held
    treatment = Treatment.DENSE if not layer.is_quantized else Treatment.DEQUANTIZED
    described, fidelity = layer.dtype, EXACT
    if held is not None:
        treatment = Treatment.REQUANTIZED if held.is_encoded_again else Treatment.KEPT
        fidelity = fidelity_of(held)
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


def _ignored(source: Checkpoint, decisions: list[Decision]) -> list[str]:
    """Paths of the linear layers that are dense, that of a tied head included."""
    layers = [x.layer for x in decisions]
    dense = [x.layer for x in decisions if x.held is None and x.layer.is_weight]
    ignored = [x.path for x in dense if len(x.shape) == 2 and not EMBEDDING.search(x.path)]
    pair = find_pair(layers)
    tied = any(is_tied for _, is_tied in flags(source.config))
    if tied or (pair is not None and pair.head is None):
        ignored.append("lm_head")
    return list(dict.fromkeys(ignored))
