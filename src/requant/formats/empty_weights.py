"""Tensors without values where a model has a layer: what a save of sharded weights leaves.

A process that holds a part of a model writes ``[0]`` for what the others hold, unless the parts
are gathered first (FSDP, DeepSpeed ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS
from requant.errors import Problem
from requant.formats.base import SourceLayout
from requant.formats.scale_names import Role, parse_scale_name
from requant.text import pluralize_are

_WEIGHTS = (".weight", ".bias", ".qweight", ".weight_packed", ".W_q", "_blocks", "._weight_qdata")
_VALUES = (Role.SCALE, Role.TENSOR_SCALE, Role.ZERO, Role.INPUT_SCALE)


def empty_weights(checkpoint: Checkpoint, layout: SourceLayout) -> Iterator[Problem]:
    """Every weight, scale or other tensor of a layer that holds no values.

    Buffers of integers may be empty, and what no layer needs.
    """
    dropped = {name for name, _ in layout.dropped}
    coded = {
        part.name for layer in layout.layers if layer.is_quantized for part in layer.parts.values()
    }
    empty = []
    for name, tensor in checkpoint.tensors.items():
        if 0 not in tensor.info.shape or name in dropped:
            continue
        scale = parse_scale_name(name)
        named = name.endswith(_WEIGHTS) or (scale is not None and scale.role in _VALUES)
        if name in coded or named or tensor.info.dtype in FLOATS or "F8" in tensor.info.dtype:
            empty.append(tensor)
    if not empty:
        return
    of_all = f"{pluralize_are(len(empty), 'tensor')} empty, of {len(checkpoint.tensors):,}"
    yield Problem(
        "weights",
        f"{of_all}: such files are written where each process holds a part of the model and the "
        "parts are not gathered. Save again with FSDP's FULL_STATE_DICT, or DeepSpeed's "
        "stage3_gather_16bit_weights_on_model_save or zero_to_fp32.py",
    )
    for tensor in empty:
        yield Problem(tensor.name, f"{tensor.info} holds no values")
