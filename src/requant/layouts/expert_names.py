"""Stacks of experts under mlx-lm's names as the single matrices that transformers' folders have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from requant.checkpoints.checkpoint import ComputedTensor, JoinedTensor, SourceTensor, cut
from requant.core.dtypes import TensorInfo
from requant.formats import SourceLayer

_PLAIN: Final = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_NUMBERED: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERT_NAMES: Final = {
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe"), _PLAIN),
    **dict.fromkeys(("mixtral", "phimoe"), _NUMBERED),
}
"""``model_type`` -> name in a stack -> name in an expert, of models in which mlx-lm changes nothing
but ``PATH.experts.N.NAME`` into ``PATH.switch_mlp.NAME``."""

_STACK = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)")


def split_stacks(layers: Iterable[SourceLayer], config: Mapping[str, Any]) -> Iterator[SourceLayer]:
    """The same layers with each stack of a known model as one layer an expert."""
    names = EXPERT_NAMES.get(config.get("model_type", ""))
    for layer in layers:
        match = _STACK.fullmatch(layer.path)
        if names is None or match is None or len(layer.shape) != 3 or layer.packing is not None:
            yield layer
            continue
        for number in range(layer.shape[0]):
            path = f"{match[1]}.experts.{number}.{names[match[2]]}"
            parts = {
                role: _matrix(part, number, f"{path}.{role}") for role, part in layer.parts.items()
            }
            yield replace(layer, path=path, parts=parts, shape=layer.shape[1:])


def _matrix(tensor: SourceTensor, number: int, name: str) -> JoinedTensor:
    """Matrix ``number`` of a stack under a name of its own."""
    assert not isinstance(tensor, ComputedTensor)
    info = TensorInfo(tensor.info.dtype, tensor.info.shape[1:])
    start = number * info.nbytes
    return JoinedTensor(name, info, tuple(cut(tensor, start, start + info.nbytes)))
