"""Matrices that cannot be quantized under the source's names, because none ends in ``.weight``.

Loaders look for codes under ``{layer}.weight`` only; stacks of experts are often stored as
``{layer}`` alone. The layout of a library gives them names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from requant.core.dtypes import KERNEL_FLOATS
from requant.core.reasons import Note, NoteCode, ReasonCode
from requant.errors import Problem
from requant.planning.layout_selection import OtherLayout
from requant.planning.target_selection import LayerDecision, TargetSelector
from requant.text import join_first, pluralize

EXPERT = re.compile(r"(^|\.)experts\.")
_MIN_SHARE = 0.1  # of all weights, to be worth a note; experts always are


@dataclass(frozen=True, slots=True)
class UnnamedMatrices:
    """Matrices that cannot be quantized under the source's names."""

    names: tuple[str, ...]  # names of the tensors
    share: float  # their fraction of all weights
    dtype: str  # header name of the dtype that they keep

    @property
    def is_most(self) -> bool:
        """Whether most of the weights cannot be quantized as requested."""
        return self.share > 0.5

    def note(self, other: OtherLayout) -> Note:
        """The note, with the library whose layout gives them names, if there is one."""
        advice = f"no library takes them: {other.rejection}"
        if other.library:
            advice = f"--layout {other.library} gives them such names and quantizes them"
        return Note(NoteCode.UNNAMED_MATRICES, f"{self._describe('stay')}; {advice}.")

    def problem(self, rejection: str) -> Problem:
        """The same as a problem, which stops the conversion."""
        return Problem(
            self.names[0],
            f"{self._describe('would stay')}; a library's layout would name them, but {rejection}. "
            "--layout keep quantizes the other layers all the same, --dequantize none",
        )

    def _describe(self, stay: str) -> str:
        held = pluralize(len(self.names), "tensor")
        return (
            f"{self.share:.0%} of the weights {stay} {self.dtype}: {held} not named .weight "
            f"({join_first(self.names)}), and no loader looks for codes under such names"
        )


def find_unnamed_matrices(
    selector: TargetSelector, decisions: Iterable[LayerDecision]
) -> UnnamedMatrices | None:
    """Return the matrices that a quantization was requested for and that no name makes a layer."""
    if selector.relayout is not None or selector.default is None or selector.options.only:
        return None
    matrices = [x for x in decisions if len(x.layer.shape) > 1]
    unnamed = [x.layer for x in matrices if x.reason_code is ReasonCode.NOT_A_WEIGHT]
    unnamed = [layer for layer in unnamed if layer.dtype in KERNEL_FLOATS]
    total = sum(prod(x.layer.shape) for x in matrices)
    share = sum(prod(layer.shape) for layer in unnamed) / max(total, 1)
    experts = any(EXPERT.search(layer.path) for layer in unnamed)
    if not unnamed or not (experts or share > _MIN_SHARE):
        return None
    return UnnamedMatrices(tuple(x.dense_name for x in unnamed), share, unnamed[0].dtype)
