"""Decide what becomes of each layer of an export: its codes, the same in more bits, or new ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil, floor, log10
from typing import Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.reasons import Reason, ReasonCode
from requant.errors import CheckpointError, Problem
from requant.formats import SourceLayer
from requant.layouts.head_names import is_head
from requant.packings.base import EXACT, Exactness, Fidelity, IntegerPacking, rounded
from requant.packings.zero_points import ZeroPoints
from requant.planning.export_targets import HeldLayer, TargetFormat
from requant.planning.export_zeros import read_zeros, stored_scale_dtype
from requant.quantization.config import QuantMode
from requant.quantization.export_options import Otherwise
from requant.quantization.roles import ROLES
from requant.text import pluralize_are

EMBEDDING: Final = re.compile(ROLES["embedding"])
_ROUTER = re.compile(ROLES["router"])


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a layer."""

    layer: SourceLayer
    held: HeldLayer | None  # with its codes; None is dense
    reason: Reason | None = None  # why codes of the source do not stay, or are in more bits


@dataclass(frozen=True, slots=True)
class Decider:
    """Decides whether the codes of a layer stay."""

    source: Checkpoint
    target: TargetFormat
    otherwise: Otherwise

    def __call__(self, layer: SourceLayer) -> Decision:
        if not layer.is_quantized:
            return Decision(layer, None)
        if not self.target.takes_tokens and (why := _dense_for_readers(layer.path)) is not None:
            return Decision(layer, None, Reason(ReasonCode.DENSE_FOR_READERS, why))
        if len(layer.shape) != 2:
            stack = f"a stack of matrices, {list(layer.shape)}, which the format stores one by one"
            return Decision(layer, None, Reason(ReasonCode.NOT_IN_FORMAT, stack))
        codes = layer.encoding
        if codes is None or layer.rotation_tensors:
            known = layer.policy.reason
            text = "its codes are none of MLX's" if known is None else known.text
            return self._other_codes(layer, f"{layer.stored_as}: {text}")
        written, zeros = self.target.scale_dtype(stored_scale_dtype(layer)), ZeroPoints()
        if codes.mode is QuantMode.AFFINE and self.target.integer_zeros:
            zeros = read_zeros(self.source, layer, written)
            self._check_finite(layer, zeros, written)
        held = HeldLayer(layer, codes, codes, scale_dtype=written, zeros=zeros)
        why = self.target.why_not(codes, layer.shape) or _why_no_zeros(zeros, codes.bits)
        if not why:
            return Decision(layer, held)
        if self.otherwise is Otherwise.WIDEN:
            for wider in self.target.wider(codes):
                fits = zeros.fit(codes.bits, wider.bits)
                if fits and not self.target.why_not(wider, layer.shape):
                    text = f"the same codes in {wider.bits} bits: {why}"
                    reason = Reason(ReasonCode.CODES_WIDENED, text)
                    return Decision(layer, replace(held, written=wider), reason)
        return self._other_codes(layer, why)

    def _other_codes(self, layer: SourceLayer, why: str) -> Decision:
        """New codes where they are asked for and the format has them, else none."""
        target = self.target.encoded_again(layer.shape)
        is_plain = "global_scale" not in layer.parts
        if self.otherwise is not Otherwise.WIDEN or target is None or not is_plain:
            return Decision(layer, None, Reason(ReasonCode.NOT_IN_FORMAT, why))
        held = HeldLayer(
            layer,
            target,
            target,
            scale_dtype=self.target.scale_dtype(layer.dtype),
            zeros=ZeroPoints(lowest=0, highest=(1 << target.bits) - 1),
            is_encoded_again=True,
        )
        return Decision(layer, held, Reason(ReasonCode.NOT_IN_FORMAT, why))

    def _check_finite(self, layer: SourceLayer, zeros: ZeroPoints, written: str) -> None:
        if zeros.nonfinite:
            message = f"{pluralize_are(zeros.nonfinite, 'scale or bias')} NaN or infinite"
            message = f"{message}. Take the file from its publisher again"
        elif zeros.overflowed:
            found = pluralize_are(zeros.overflowed, "scale")
            message = f"{found} beyond the range of {written}, in which {self.target.name} has them"
        else:
            return
        problem = Problem(layer.path, message)
        raise CheckpointError(str(self.source.source), [problem], "exported")


def _dense_for_readers(path: str) -> str | None:
    """Why readers of the format want the layer dense; None where they take codes."""
    if EMBEDDING.search(path):
        return "an embedding, which readers of the format take dense"
    if is_head(path):
        return "an output head, which readers of the format take dense"
    if _ROUTER.search(path):
        return "a router, which readers of the format take dense"
    return None


def _why_no_zeros(zeros: ZeroPoints, bits: int) -> str:
    found = []
    if zeros.out_of_range:
        limit = (1 << bits) - 1
        found.append(f"{zeros.out_of_range:,} have a zero point outside 0 to {limit}")
    if zeros.off_grid:
        found.append(f"{zeros.off_grid:,} have a bias that is not a whole number of scales")
    return f"of {zeros.groups:,} groups {' and '.join(found)}" if found else ""


def fidelity_of(held: HeldLayer) -> Fidelity:
    """How the values of a layer with codes compare with the source's."""
    if held.is_encoded_again:
        return Fidelity(Exactness.REENCODED)
    bounds, zeros = [], held.zeros
    if zeros.rounded:
        # One digit, rounded up: layers with nearly the same bound are printed in one line.
        digit = 10.0 ** floor(log10(zeros.max_steps))
        bound = f"{ceil(zeros.max_steps / digit) * digit:.1g}"
        bounds.append(f"biases become -zero * scale, which differs by at most {bound} steps")
    packing = held.layer.packing
    computed = isinstance(packing, IntegerPacking) and packing.computes_scales
    if zeros.scales_rounded or computed:
        bounds.append(rounded("scales", held.scale_dtype).bound)
    if "global_scale" in held.layer.parts:
        bounds.append("tensor scale: 1/8388608 (float32) of itself")
    return Fidelity(Exactness.ROUNDED, "; ".join(bounds)) if bounds else EXACT
