"""Tensors of layers and of stacks under one set of names, whatever their tools call them.

A reader knows the parts of a layer by role: ``{path}.weight`` or ``{path}.weight_packed``,
``{path}.weight_scale``, ``{path}.weight_scale_2``, ``{path}.qweight``, ``{path}.scales`` and so
on. Other spellings are found by ``scale_names`` and get these names here::

    experts.gate_up_proj_packed        experts.gate_up_proj.weight_packed
    experts.gate_up_proj_scale_inv     experts.gate_up_proj.weight_scale
    experts.w13_weight_scale_2         experts.w13.weight_scale_2
    experts.w2_qzeros                  experts.w2.qzeros
    q_proj.weight_scale_inv            q_proj.weight_scale

A tensor keeps its own name in ``SourceTensor.name``, for messages and for the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from requant.checkpoints.checkpoint import SourceTensor
from requant.core.dtypes import FLOATS
from requant.formats.base import SourceLayer, Tensors
from requant.formats.scale_names import Role, ScaleNames, parse_scale_name
from requant.packings.experts import StackedExperts

# What ends the name of codes -> role. The stacks of fused experts have no module of their own,
# so that their tensors are joined with "_", or are the path itself.
_DOTTED: Final = {
    **dict.fromkeys((".weight_packed", ".packed"), "weight_packed"),
    **{".weight": "weight", ".qweight": "qweight"},
}
_JOINED: Final = {  # the first that fits counts
    **dict.fromkeys(("_weight_packed", "_packed"), "weight_packed"),
    **{"_qweight": "qweight", "_weight": "weight", "": "weight"},
}
_OF_WORDS: Final = {  # next to qweight: AWQ and GPTQ
    **dict.fromkeys(("scale", "scales"), "scales"),
    **dict.fromkeys(("zero_point", "zero_points", "zeros", "qzeros"), "qzeros"),
    "scaled_zeros": "scaled_zeros",
    "g_idx": "g_idx",
}
_OF_WEIGHT: Final = {
    **dict.fromkeys(
        ("scale", "scales", "scale_inv", "scales_inv", "qscale", "qscale_weight"), "weight_scale"
    ),
    **dict.fromkeys(("scale_2", "scales_2"), "weight_scale_2"),
    "global_scale": "weight_global_scale",
    **dict.fromkeys(("zero_point", "zero_points", "zp"), "weight_zero_point"),
    "g_idx": "weight_g_idx",
    "shape": "weight_shape",
    "pre_quant_scale": "pre_quant_scale",
}
_VLLM: Final = re.compile(r"(?:^|\.)w(?:1|2|3|13)$")
"""Paths whose dense tensor ends in ``_weight``."""


@dataclass(frozen=True)
class LayerNames:
    """A checkpoint's tensors by the names of the parts of layers."""

    tensors: Tensors  # every tensor, under its own name where that is none of another spelling
    # path -> the name of the dense weight, where it is not ``{path}.weight``
    own: Mapping[str, str]
    # pairs of names that represent the same part of a layer
    twice: tuple[tuple[str, str], ...] = ()

    def called(self, layer: SourceLayer) -> SourceLayer:
        """The layer with the name of its dense weight, where that is not a ``{path}.weight``.

        A stack that is stored transposed is not called so: as ``(experts, out, in)`` it is not what
        has that name.
        """
        own, packing = self.own.get(layer.path, ""), layer.packing
        transposed = isinstance(packing, StackedExperts) and packing.is_transposed
        if not own or transposed or packing is None or layer.name:
            return layer
        return replace(layer, name=own)


def layer_names(tensors: Tensors) -> LayerNames:
    """Find the layers and stacks of codes among ``tensors``, and name their parts by role."""
    siblings, renamed = ScaleNames(tensors), dict[str, str]()
    own = dict[str, str]()
    for name, tensor in tensors.items():
        found = _codes(name, tensor, siblings)
        if found is None:
            continue
        path, role = found
        renamed[name] = part = _same_text(f"{path}.{role}", name)
        if name not in (f"{path}.weight", part):
            own[path] = f"{path}_weight" if _VLLM.search(path) else path
        roles = _OF_WORDS if role == "qweight" else _OF_WEIGHT
        for scale in siblings.of_path(path):
            if scale.word in roles:
                part = _same_text(f"{path}.{roles[scale.word]}", scale.name)
                renamed.setdefault(scale.name, part)
        shape = f"{path}_shape"  # of llm-compressor's stacks
        if role == "weight_packed" and shape in tensors:
            renamed.setdefault(shape, f"{path}.weight_shape")
    named: dict[str, SourceTensor] = {}
    twice: list[tuple[str, str]] = []
    for name, tensor in tensors.items():
        part = renamed.get(name, name)
        if part in named:
            twice.append((named[part].name, name))
            part = name
        named[part] = tensor
    return LayerNames(named, own, tuple(twice))


def _same_text(part: str, name: str) -> str:
    """``part``, as the object ``name`` where both are equal: most names stay as they are."""
    return name if part == name else part


def _codes(name: str, tensor: SourceTensor, siblings: ScaleNames) -> tuple[str, str] | None:
    """Path and role of a tensor of codes; None for any other."""
    info = tensor.info
    if info.dtype in FLOATS or info.dtype == "BOOL":
        return None
    for ending, role in _DOTTED.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    if len(info.shape) < 3 or parse_scale_name(name) is not None:
        return None
    for ending, role in _JOINED.items():
        path = name.removesuffix(ending)
        if name.endswith(ending) and any(
            scale.word in (*_OF_WORDS, *_OF_WEIGHT) for scale in siblings.of_path(path, Role.SCALE)
        ):
            return path, role
    return None
