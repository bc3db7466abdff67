"""The source formats: one module for each tool, imported when a checkpoint may be of its format.

A *format* claims a checkpoint and sorts its tensors into layers (``base.Format``). A *packing*
(``requant.packings``) says how the rows of a layer are computed from its tensors. ::

    format                            modules, in the order in which a folder is read
    mlx                               mlx, mlx_block
    awq, gptq, auto-round, paroquant  gptq_awq, gptq_awq_config, gptq_awq_rules, gptq_awq_layouts,
                                      gptq_act_order
    compressed-tensors                compressed_tensors, compressed_tensors_config
    modelopt                          modelopt, modelopt_layers
    those with a module each          gguf, fp8, mxfp4, hqq, bitsandbytes, bitnet, metal, fp_quant,
                                      quark, torchao
    formats of other packages         plugins
    how formats are recognized        known
    what no format claims             dense

Shared by several of them: ``base`` (what a format returns), ``quantization_block`` (the block of
the config), ``tensor_sorter`` (tensors into layers, problems), ``scale_names`` and ``layer_names``
(what tools call the parts of layers), ``stacks`` and ``expert_shapes`` (fused experts);
``integer_layers``, ``float8_layers`` and ``nvfp4_layers`` (one kind of code, of any tool),
``matrix_scales``, ``input_scaled`` (with a scale for each input), ``widening`` (codes in more bits
or smaller groups) and ``members`` (layers of different kinds in one).

Around every format: ``stale_blocks`` reads a checkpoint and finds blocks whose codes are gone;
``empty_weights`` finds weights without values; ``other_layers``, with ``one_reading``,
``unread_qweights`` and ``exclusions``, reads what the config does not describe; ``unclaimed``
and ``unsupported_stacks`` reject codes that no layer takes.
"""

from __future__ import annotations

from dataclasses import replace

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Note, NoteCode
from requant.errors import CheckpointError, Problem
from requant.formats.base import DefaultPolicy, Format, SourceLayer, SourceLayout
from requant.formats.dense import Dense
from requant.formats.exclusions import with_exclusions
from requant.formats.known import FORMATS
from requant.formats.plugins import plugged_in
from requant.formats.quantization_block import (
    QuantizationBlock,
    contradicted_keys,
    contradicting,
    find_quantization_block,
    float_form,
    with_block,
)
from requant.formats.unclaimed import check_unclaimed
from requant.formats.unsupported_stacks import external_stacks

__all__ = [
    "FORMATS",
    "DefaultPolicy",
    "Format",
    "SourceLayer",
    "SourceLayout",
    "detect",
    "read_layout",
]

_DENSE = Dense()


def detect(checkpoint: Checkpoint) -> Format:
    """Find the format of a checkpoint from its config and tensor names.

    Built-in formats are asked first, then those of other packages (``plugins``); what none of them
    claims is dense.

    Raises:
        CheckpointError: No built-in format claims it, and a package's format cannot be loaded.
    """
    for known in FORMATS:
        if known.claims(checkpoint):
            return known
    external, problems = plugged_in()
    if problems:
        raise CheckpointError(str(checkpoint.path), problems)
    return next((known for known in external if known.claims(checkpoint)), _DENSE)


def read_layout(checkpoint: Checkpoint) -> tuple[Format, SourceLayout]:
    """Find the format of a checkpoint and read its layers, each by what its tensors are.

    Where several quantization blocks contradict each other, the one counts that fits the tensors;
    where more than one does, and they lead to other values, the layout has a problem.
    What no layer takes is looked at for codes, whichever the format is (``unclaimed``).

    Raises:
        CheckpointError: As ``detect``.
    """
    format, layout, against = _read(checkpoint)
    first = find_quantization_block(checkpoint)
    others = contradicting(checkpoint)
    if first is None or not others:
        return format, layout
    best = (first, format, layout, against)
    for other in others:
        known, made, wrong = _read(with_block(checkpoint, other, other.block))
        if (bool(made.problems), wrong) < (bool(best[2].problems), best[3]):
            best = (other, known, made, wrong)
            continue
        both = not made.problems and not best[2].problems and wrong == best[3]
        if both and _readings(made) != _readings(best[2]):
            message = f"{_contradict(best[0], other)}, and the tensors fit both"
            problem = Problem(best[0].where, f"{message}: remove the one that is stale")
            return format, replace(best[2], problems=(problem,))
    counts, known, made, _ = best
    if counts is not first:
        note = Note(
            NoteCode.CONTRADICTING_BLOCKS,
            f"{first.where} {_contradict(first, counts)}: the tensors fit {counts.where}, which "
            "counts.",
        )
        made = replace(made, notes=(*made.notes, note))
    return known, made


def _read(checkpoint: Checkpoint) -> tuple[Format, SourceLayout, int]:
    """Format, layers, and how many of these the config describes wrongly."""
    format, against = detect(checkpoint), 0
    if format in FORMATS and checkpoint.gguf is None:
        from requant.formats.other_layers import read_each_layer  # imports several readers

        layout, against = read_each_layer(format, FORMATS, checkpoint)
    else:
        layout = format.read(checkpoint)
    layout = check_unclaimed(checkpoint, layout, format)
    if external := tuple(external_stacks(checkpoint, layout)):
        layout = replace(layout, problems=(*layout.problems, *external))
    floats = float_form(checkpoint)
    if floats and not layout.problems and not any(layer.is_quantized for layer in layout.layers):
        return Dense(floats), layout, against
    return format, with_exclusions(checkpoint, layout), against


def _readings(layout: SourceLayout) -> list[tuple[object, ...]]:
    """The fields that decide the values of each layer."""
    return [(x.path, x.parts, x.packing, x.encoding) for x in layout.layers]


def _contradict(one: QuantizationBlock, other: QuantizationBlock) -> str:
    keys = ", ".join(contradicted_keys(one, other))
    return f"and {other.where} contradict each other ({keys})"
