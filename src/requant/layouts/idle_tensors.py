"""Leave out tensors that a model does not compute with, and for which its class has no place.

AutoGPTQ writes a bias of zeros for each layer; layers that predict further tokens (MTP) follow
those that the config counts. A class that does not drop them itself rejects the whole
checkpoint because of them, and only then are they left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, ComputedTensor
from requant.core.reasons import Note, NoteCode
from requant.formats import SourceLayer, SourceLayout
from requant.formats.quantization_block import text_sections
from requant.layouts.left_dense import is_of_a_tower
from requant.text import join_first, pluralize

_BIAS: Final = ".bias"
_LARGEST_BIAS: Final = 4 << 20  # bytes; a bias is read while planning
_NUMBERED: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP: Final = re.compile(r"(?:^|\.)mtp(?:_layers|_block)?\.")
_NAMED: Final = 2  # of many tensors, how many a note names
_ALL_ZERO: Final = "is all zero"
_PREDICTS_MORE: Final = "predicts further tokens (MTP)"


@dataclass(frozen=True, slots=True)
class Reduced:
    """A layout without unused tensors.

    Attributes:
        layout: The rest.
        notes: What was left out.
    """

    layout: SourceLayout
    notes: tuple[Note, ...]


def without_unused_tensors(checkpoint: Checkpoint, layout: SourceLayout) -> Reduced | None:
    """Return the layout without unused tensors; None where it has none.

    Args:
        checkpoint: For the config, and the values of biases.
        layout: Its layers.
    """
    unused = dict(_unused(checkpoint, layout))
    if not unused:
        return None
    layers = tuple(layer for layer in layout.layers if layer.path not in unused)
    removed = [layer for layer in layout.layers if layer.path in unused]
    dropped = tuple((x.name, unused[layer.path]) for layer in removed for x in layer.parts.values())
    notes = []
    for reason in dict.fromkeys(unused.values()):
        names = [name for name, why in dropped if why == reason]
        each = "each of which " if len(names) > 1 else "which "
        text = (
            f"Left out: {pluralize(len(names), 'tensor')} ({join_first(names, _NAMED)}), "
            f"{each}{reason}; the model's class has no place for such."
        )
        notes.append(Note(NoteCode.IDLE_TENSORS, text))
    return Reduced(replace(layout, layers=layers, dropped=(*layout.dropped, *dropped)), (*notes,))


def _unused(checkpoint: Checkpoint, layout: SourceLayout) -> Iterator[tuple[str, str]]:
    """Paths of unused layers, each with the reason."""
    blocks = _block_count(checkpoint.config)
    matrices = {x.path for x in layout.layers if x.is_weight and len(x.shape) > 1}
    for layer in layout.layers:
        numbered = _NUMBERED.search(f"{layer.path}.")
        if is_of_a_tower(layer.path):
            continue
        if _MTP.search(f"{layer.path}.") or (
            blocks is not None and numbered is not None and int(numbered[1]) >= blocks
        ):
            yield layer.path, _PREDICTS_MORE
            continue
        path = layer.path.removesuffix(_BIAS)
        if path != layer.path and path in matrices and _is_zero(checkpoint, layer):
            yield layer.path, _ALL_ZERO


def _block_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers in the config; None where it has none."""
    for part in text_sections(config):
        blocks = part.get("num_hidden_layers")
        if isinstance(blocks, int) and not isinstance(blocks, bool):
            return blocks
    return None


def _is_zero(checkpoint: Checkpoint, layer: SourceLayer) -> bool:
    """Whether a vector holds nothing but zeros."""
    part = layer.parts.get("weight")
    if part is None or isinstance(part, ComputedTensor) or checkpoint.gguf is not None:
        return False
    if layer.is_quantized or layer.packing is not None or len(layer.shape) != 1:
        return False
    if part.info.nbytes > _LARGEST_BIAS:
        return False
    return not np.any(checkpoint.read_small_tensor(part.name).astype(np.float32))
