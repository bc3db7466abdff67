"""Quantization blocks that outlived their codes: a model that was fused or dequantized since.

A block in the config is stale where every tensor is dense and none is a scale or a zero point.
The checkpoint is then read as a dense one, whatever format the block names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from requant.checkpoints.checkpoint import REMOVED, Checkpoint, Key
from requant.checkpoints.folder_files import CONFIG
from requant.core.dtypes import FLOATS
from requant.core.reasons import Note, NoteCode
from requant.formats import read_layout
from requant.formats.base import SourceLayout
from requant.formats.empty_weights import empty_weights
from requant.formats.quantization_block import QUANTIZATION_KEYS
from requant.formats.scale_names import ScaleNames, parse_scale_name
from requant.formats.tensor_sorter import TensorSorter

# Dense weights under these blocks are rounded while the model runs: without it, another model.
_AT_RUN_TIME: Final = frozenset({"bitnet"})
# What weights, scales and buffers of dense models are stored as; codes take other dtypes.
_DENSE: Final = frozenset({*FLOATS, "I64", "BOOL"})


@dataclass(frozen=True, slots=True)
class Read:
    """A checkpoint as its format read it."""

    checkpoint: Checkpoint  # the same, without a block that is stale
    format: str  # the name of the format; "dense" under a stale block
    evidence: str  # what the format is detected from, as ``Format.claims`` says it
    layout: SourceLayout


def read_source(checkpoint: Checkpoint) -> Read:
    """Read a checkpoint by its format, or as dense where the block in its config is stale."""
    format, layout = read_layout(checkpoint)
    evidence = format.claims(checkpoint) or ""
    damaged = (x for name, x in checkpoint.opened.damaged.items() if parse_scale_name(name))
    if broken := (*empty_weights(checkpoint, layout), *damaged):
        places = {problem.where for problem in broken}
        others = (problem for problem in layout.problems if problem.where not in places)
        layout = replace(layout, problems=(*broken, *others))
        return Read(checkpoint, format.name, evidence, layout)
    quantized = any(layer.is_quantized for layer in layout.layers)
    blocks = tuple(_blocks(checkpoint.config))
    named = blocks or tuple((name,) for name in checkpoint.quantization_files)
    if quantized or not named or checkpoint.gguf is not None or format.name in _AT_RUN_TIME:
        return Read(checkpoint, format.name, evidence, layout)
    if format.name == "dense" or not _is_dense(checkpoint):
        return Read(checkpoint, format.name, evidence, layout)
    if layout.problems:
        sorter = TensorSorter(checkpoint)
        sorter.drop_runtime_scales()
        layout = sorter.layout()
    where = f"{CONFIG}: " * bool(blocks) + " and ".join(map(".".join, named))
    say = "say" if len(named) > 1 else "says"
    text = f"{where} {say} {format.name}, but every tensor is dense"
    note = Note(
        NoteCode.STALE_BLOCK,
        f"{text}: the block is stale and left out, and the weights are taken as dense.",
    )
    layout = replace(layout, quantization=None, notes=(*layout.notes, note))
    checkpoint = checkpoint.corrected(dict.fromkeys(blocks, REMOVED))
    return Read(replace(checkpoint, quantization_files={}), "dense", text, layout)


def _blocks(config: Mapping[str, Any], below: Key = ()) -> Iterator[Key]:
    """The keys of every quantization block, those of nested configs too."""
    for key, value in config.items():
        if key in QUANTIZATION_KEYS and value:
            yield (*below, key)
        elif isinstance(value, Mapping):
            yield from _blocks(value, (*below, key))


def _is_dense(checkpoint: Checkpoint) -> bool:
    """Whether no tensor can be codes, and none is next to codes."""
    tensors = checkpoint.tensors
    if any(x.info.dtype not in _DENSE and len(x.info.shape) > 1 for x in tensors.values()):
        return False
    names = ScaleNames(tensors)
    for scale in filter(None, map(parse_scale_name, tensors)):
        is_matrix = len(tensors[scale.name].info.shape) > 1  # norms have vectors of this name
        if scale.is_certain or is_matrix or names.codes_of(scale):
            return False
    return True
