"""Names of scales: what tools call the tensors next to codes, in layers and in stacks.

One list for every reader, and for the check that no codes leave as a dense tensor. A layer is
its *path* (``mlp.experts.gate_up_proj``, ``experts.w13``); its codes and what is next to them
have the path and an ending::

    q_proj.weight           q_proj.weight_scale       q_proj.weight.absmax     q_proj.scales
    experts.w13_weight      experts.w13_weight_scale  experts.w13_weight_scale_2
    experts.gate_up_proj    experts.gate_up_proj_scale_inv
    experts.down_proj_packed   experts.down_proj_scale
    experts.down_proj_blocks   experts.down_proj_scales

so that a scale is found by the path of its codes, whatever joins the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final


class Role(StrEnum):
    """The purpose of a tensor next to codes."""

    SCALE = "scale"  # a factor for a group, tile, row, matrix or tensor
    TENSOR_SCALE = "tensor_scale"  # a second factor, over a matrix or tensor
    ZERO = "zero"  # what is subtracted from codes
    OFFSET = "offset"  # what is added to codes times scales
    INPUT_SCALE = "input_scale"  # a factor for each input, which the weight is divided by
    INDEX = "index"  # which group an input belongs to
    OTHER = "other"  # the shape, table or order of codes


# What tools call them, behind the path and ".", "_" or "._", with or without "weight" between.
_WORDS: Final = {
    **dict.fromkeys(("scale", "scales", "scale_inv", "scales_inv", "absmax", "SCB"), Role.SCALE),
    **dict.fromkeys(("qscale", "qscale_weight", "Wscale"), Role.SCALE),
    **dict.fromkeys(("scale_2", "scales_2", "global_scale"), Role.TENSOR_SCALE),
    **dict.fromkeys(("double_scale", "nested_absmax"), Role.TENSOR_SCALE),
    **dict.fromkeys(("zero_point", "zero_points", "zero", "zeros"), Role.ZERO),
    **dict.fromkeys(("qzeros", "scaled_zeros"), Role.ZERO),
    **dict.fromkeys(("biases", "qbiases"), Role.OFFSET),
    **{"pre_quant_scale": Role.INPUT_SCALE, "g_idx": Role.INDEX},
    **dict.fromkeys(("quant_map", "nested_quant_map", "weight_format"), Role.OTHER),
    **dict.fromkeys(("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"), Role.OTHER),
}
# Words that mean nothing unless "weight" comes before them.
_OF_WEIGHTS: Final = {"shift": Role.ZERO, "zp": Role.ZERO, "amax": Role.SCALE, "shape": Role.OTHER}
# Words that parameters of dense models bear too: RMSNorm's scale, CLIP's logit_scale, the factor
# of Inkling's router (gate.global_scale), FastVLM's layer_scale_2.
_COMMON: Final = frozenset(
    {"scale", "scales", "global_scale", "scale_2", "scales_2", "zero", "zeros", "biases"}
)
_LONGEST_FIRST: Final = tuple(sorted(_WORDS | _OF_WEIGHTS, key=len, reverse=True))
_JOINTS: Final = ("._", ".", "_")
_WEIGHTS: Final = tuple(f"{a}weight{b}" for a in _JOINTS for b in ("_quantizer", ""))
# Endings of codes behind the path; "" is a stack whose name is the path itself.
CODE_ENDINGS: Final = (
    *(".weight", ".weight_packed", ".qweight", ".W_q", ".blocks", ".packed", "._weight_qdata"),
    *("_qdata", ".weight._data", "_weight_packed", "_weight", "_packed", "_qweight", "_blocks", ""),
)


@dataclass(frozen=True, slots=True)
class ScaleName:
    """The parts of the name of a tensor next to codes."""

    name: str  # the whole
    path: str  # of the layer
    role: Role  # its purpose
    word: str  # the last word, without joints: "scale_inv"
    of_weight: bool  # whether "weight" comes before the word

    @property
    def is_certain(self) -> bool:
        """Whether only a quantized layer has a tensor of this name."""
        return self.of_weight or self.word not in _COMMON


def _split(name: str) -> tuple[int, Role, str, bool] | None:
    """What ``_parse_ending`` says of a name."""
    # What a name is called by has three dots at the most, and few endings are different:
    # layers.7.mlp.up_proj.weight_scale is parsed as ..mlp.up_proj.weight_scale once for all layers.
    parts = name.rsplit(".", 3)
    before = parts[0] if len(parts) == 4 else ""
    found = _parse_ending(f".{name[len(before) :]}" if before else name)
    if found is None or found[0] == len(name):
        return None
    return found


def parse_scale_name(name: str) -> ScaleName | None:
    """Split a name; None where it is none of a scale, a zero point or the like."""
    found = _split(name)
    if found is None:
        return None
    end, role, word, of_weight = found
    return ScaleName(name, name[:-end], role, word, of_weight)


@lru_cache(maxsize=1 << 14)
def _parse_ending(name: str) -> tuple[int, Role, str, bool] | None:
    """How many characters follow the path, the role, the word, and whether "weight" is before."""
    if not name.endswith(_LONGEST_FIRST):
        return None
    for word in _LONGEST_FIRST:
        if not name.endswith(word):
            continue
        before = name[: -len(word)]
        joint = next((joint for joint in _JOINTS if before.endswith(joint)), None)
        if joint is None:
            continue
        path, of_weight = before[: -len(joint)], False
        for ending in _WEIGHTS:
            if path.endswith(ending):
                path, of_weight = path[: -len(ending)], True
                break
        role = _WORDS.get(word) or (_OF_WEIGHTS[word] if of_weight else None)
        if role is not None and path:
            return len(name) - len(path), role, word, of_weight
    return None


def code_paths(name: str) -> tuple[str, ...]:
    """The paths that a tensor may be the codes of: ``w13_weight`` is of ``w13``, or its own."""
    return tuple(
        name[: len(name) - len(ending)]
        for ending in CODE_ENDINGS
        if name.endswith(ending) and len(name) > len(ending)
    )


class ScaleNames:
    """The scales among a checkpoint's tensors, found by the codes that they belong to.

    Args:
        names: Of all tensors; looked at once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._adjacent: dict[str, list[ScaleName]] = {}
        for name in sorted(self._names):
            found = _split(name)
            if found is not None:
                end, role, word, of_weight = found
                adjacent = self._adjacent.setdefault(name[:-end], [])
                # One text for the path of all of a layer's scales.
                path = adjacent[0].path if adjacent else name[:-end]
                adjacent.append(ScaleName(name, path, role, word, of_weight))

    def get(self, name: str) -> ScaleName | None:
        """The parts of a name; None unless it is that of a scale, a zero point or the like."""
        return parse_scale_name(name) if name in self._names else None

    def siblings(self, name: str, *roles: Role) -> tuple[ScaleName, ...]:
        """The scales, zero points and the like next to a tensor (of ``roles``, if any)."""
        if not self._adjacent:
            return ()
        return tuple(
            found
            for path in code_paths(name)
            for found in self._adjacent.get(path, ())
            if found.name != name and (not roles or found.role in roles)
        )

    def of_path(self, path: str, *roles: Role) -> tuple[ScaleName, ...]:
        """The scales, zero points and the like of a layer (of ``roles``, if any)."""
        return tuple(x for x in self._adjacent.get(path, ()) if not roles or x.role in roles)

    def codes_of(self, scale: ScaleName) -> str | None:
        """The tensor that a scale belongs to, by its name; None where there is none."""
        each = (f"{scale.path}{ending}" for ending in CODE_ENDINGS)
        return next((name for name in each if name in self._names and name != scale.name), None)

    @property
    def paths(self) -> Iterable[str]:
        """The paths of all layers with a scale, a zero point or the like."""
        return self._adjacent.keys()
