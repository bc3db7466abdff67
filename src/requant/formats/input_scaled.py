"""Layers whose inputs are multiplied before the weight is: ModelOpt's and torchao's AWQ scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from requant.checkpoints.checkpoint import SourceTensor
from requant.core.reasons import Reason, ReasonCode
from requant.formats.base import SourceLayer, fallback_for
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, WrappedPacking

_ROLE: Final = "input_scale"


@dataclass(frozen=True)
class InputScaled(WrappedPacking):
    """A packed layer, column ``j`` times ``input_scale[j]``."""

    rows: int
    columns: int
    layer: Packing  # the packing of the weight itself

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return {**self.layer.required_rects(start, stop), _ROLE: Rect((0, 1), (0, self.columns))}

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """The weight's values in float32, times the input's scale; rounded once more."""
        values = scratch.take("unscaled", "F32", stop - start, 4 * self.columns)
        self.layer.decode(parts, start, stop, values, scratch)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller counts infinities
            values *= parts[_ROLE].astype(np.float32).reshape(1, -1)
            out[:] = values


def input_scaled(layer: SourceLayer, scale: SourceTensor) -> SourceLayer:
    """The layer with ``scale``, one number an input, folded into its values.

    No mode of MLX has a scale an input, so that the codes cannot stay.
    """
    assert layer.packing is not None
    rows, columns = layer.packing.rows, layer.shape[-1]
    return replace(
        layer,
        parts={**layer.parts, _ROLE: scale},
        encoding=None,
        packing=InputScaled(rows, columns, layer.packing),
        stored_description=f"{layer.stored_description}, inputs scaled",
        policy=replace(
            layer.policy,
            fallback=None if layer.policy.requires_choice else fallback_for(columns),
            reason=Reason(
                ReasonCode.INPUT_SCALE_FOLDED,
                f"{scale.name.rpartition('.')[2]} is folded into its columns",
            ),
        ),
    )
