"""ParoQuant's rotations: inputs are scaled and rotated in pairs before the quantized product.

``krot`` rounds; in each, the inputs of a group are paired off and each pair is rotated by an
angle (z-lab/paroquant, paroquant/optim/rotation.py)::

    x = x * channel_scales
    (x_i, x_j) = (cos a * x_i + sin a * x_j, cos a * x_j - sin a * x_i)

The same rotations, in reverse, applied to the rows of the weight give the plain weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
from requant.core.dtypes import FLOATS, TensorInfo
from requant.errors import Problem
from requant.kernels import quantize as native
from requant.packings.awq import AwqGemm
from requant.packings.base import Array, Packing, Parts, Rect, Scratch, Triple
from requant.quantization.config import Quantization

Tensors = Mapping[str, SourceTensor]
ROLES = ("theta", "pairs", "channel_scales")
# One rotation for all experts of a layer: before gate and up, and before down.
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<projection>gate|up|down)_proj")
_SHARED = re.compile(r".+\.experts\.(?:gate_up|down)_weight_(?:theta|pairs|channel_scales)")


def shared_rotation(path: str) -> dict[str, str]:
    """Role -> tensor of the rotation that an expert's layer shares; empty for other layers."""
    found = _EXPERT.fullmatch(path)
    if found is None:
        return {}
    before = "down" if found["projection"] == "down" else "gate_up"
    return {role: f"{found['experts']}.{before}_weight_{role}" for role in ROLES}


def is_shared_rotation(name: str) -> bool:
    """Whether a tensor is a part of a rotation that experts share."""
    return _SHARED.fullmatch(name) is not None


def read_rotation(
    checkpoint: Checkpoint,
    path: str,
    tensors: Tensors,
    n_in: int,
    group: int,
    problems: list[Problem],
) -> int | None:
    """Check the three tensors of a rotation; returns its rounds, or None with problems.

    ``tensors`` are ``theta`` floats ``[krot, in / 2]``, ``pairs`` int16 ``[krot, in]``, counted
    within a group, and ``channel_scales`` floats ``[1, in]`` or ``[in]``. A round must pair each
    input of a ``group`` once.
    """
    before = len(problems)
    krot = _rounds(tensors)
    _check_shapes(path, tensors, krot, n_in, problems)
    if group % 2 or n_in % group:
        problems.append(Problem(path, f"{n_in} inputs are not made of groups of {group}"))
    if len(problems) == before:
        _check_rounds(checkpoint, tensors, krot, group, problems)
    return krot if len(problems) == before else None


def _rounds(tensors: Tensors) -> int:
    """The first axis of ``theta``, or of ``pairs`` where that is missing; 0 where none tells."""
    for role in ("theta", "pairs"):
        if role in tensors:
            shape = tensors[role].info.shape
            return shape[0] if len(shape) == 2 else 0
    return 0


def _check_shapes(
    path: str, tensors: Tensors, krot: int, n_in: int, problems: list[Problem]
) -> None:
    """Hold what there is of a rotation against its ``krot`` rounds of ``n_in`` inputs."""
    expected = {
        "theta": (FLOATS, ((krot, n_in // 2),)),
        "pairs": (("I32", "I16"), ((krot, n_in),)),
        "channel_scales": (FLOATS, ((1, n_in), (n_in,))),
    }
    for role, (dtypes, shapes) in expected.items():
        found = tensors.get(role)
        if found is None:
            message = (
                "is missing: a rotation is theta, pairs and channel_scales; take all three from "
                "the checkpoint that the codes are from"
            )
            problems.append(Problem(f"{path}.{role}", message))
        elif found.info.shape not in shapes or found.info.dtype not in dtypes:
            fits = found.info.dtype in dtypes
            wanted = TensorInfo(found.info.dtype if fits else dtypes[-1], shapes[0])
            problems.append(Problem(found.name, f"{found.info}, expected {wanted}"))


def _check_rounds(
    checkpoint: Checkpoint, tensors: Tensors, krot: int, group: int, problems: list[Problem]
) -> None:
    """Every round pairs off the inputs of each group once, or rotates none of them."""
    names = {role: tensor.name for role, tensor in tensors.items()}
    pairs = checkpoint.read_small_tensor(names["pairs"]).astype(np.int64).reshape(krot, -1, group)
    theta = checkpoint.read_small_tensor(names["theta"]).astype(np.float32)
    theta = theta.reshape(krot, -1, group // 2)
    whole = np.sort(pairs, axis=-1) == np.arange(group)
    # A round that rotates nothing may name any pairs, if only they exist.
    no_op = (theta == 0).all(-1) & (pairs >= 0).all(-1) & (pairs < group).all(-1)
    wrong = np.argwhere(~whole.all(-1) & ~no_op)
    if wrong.size:
        turn, number = wrong[0].tolist()
        message = (
            f"round {turn} does not pair off the inputs of group {number}: each of 0 to "
            f"{group - 1} is due once; correct group_size if it is not {group}, else take the "
            "file from its publisher again"
        )
        problems.append(Problem(names["pairs"], message))
    if not np.isfinite(theta).all():
        message = "holds NaN or infinity, which no angle is; take the file from its publisher again"
        problems.append(Problem(names["theta"], message))


def rotation_entry(group: int, krot: int) -> dict[str, Any]:
    """The entry "rotation" of the config of an output with rotated layers."""
    return {"method": "paroquant", "group_size": group, "krot": krot}


def inverse_rotate(rows: Array, parts: Parts, group: int) -> None:
    """Bring rows of a weight, float32 ``(n, in)``, back to the plain inputs, in place."""
    krot, half = parts["theta"].shape
    starts = np.arange(0, 2 * half, group)[:, None]
    pairs = parts["pairs"].astype(np.int64).reshape(krot, -1, group // 2, 2)
    theta = parts["theta"].astype(np.float32)
    for turn in reversed(range(krot)):
        first = (starts + pairs[turn, :, :, 0]).reshape(-1)
        second = (starts + pairs[turn, :, :, 1]).reshape(-1)
        cos, sin = np.cos(theta[turn]), np.sin(theta[turn])
        left, right = rows[:, first], rows[:, second]
        rows[:, first] = cos * left - sin * right
        rows[:, second] = sin * left + cos * right
    rows *= parts["channel_scales"].reshape(-1).astype(np.float32)


def _rotation_cuts(krot: int, columns: int) -> dict[str, Rect]:
    return {
        "theta": Rect((0, krot), (0, columns // 2)),
        "pairs": Rect((0, krot), (0, columns)),
        "channel_scales": Rect((0, 1), (0, columns)),
    }


@dataclass(frozen=True)
class RotatedGemm(AwqGemm):
    """AWQ gemm codes of the rotated weight; their values are those of the plain one."""

    krot: int = 0  # rounds of the rotation

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        return super().required_rects(start, stop) | _rotation_cuts(self.krot, self.columns)

    def stored_codes(self, start: int, stop: int) -> None:
        """None: nobody would look at the numbers of the rotation."""

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        """The plain weight, in float32 and rounded once."""
        wide = scratch.take("rotated", "F32", stop - start, 4 * self.columns)
        super().decode(parts, start, stop, wide, scratch)
        inverse_rotate(wide, parts, self.group)
        out[:] = wide


@dataclass(frozen=True)
class RotatedTriple(Packing):
    """The same in MLX's layout, as an output of requant holds it."""

    # of the weight; outputs and inputs last, experts that share the rotation before
    shape: tuple[int, ...]
    encoding: Quantization  # affine
    group: int  # inputs that are rotated together
    krot: int  # rounds of the rotation

    @property
    def rows(self) -> int:  # type: ignore[override]  # a field of other packings
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.shape[-1]

    @property
    def matrix_rows(self) -> int:
        return self.shape[-2]

    def required_rects(self, start: int, stop: int) -> dict[str, Rect]:
        words = self.columns * self.encoding.bits // 32
        groups = self.columns // self.encoding.group_size
        return {
            "weight": Rect((start, stop), (0, words)),
            "scales": Rect((start, stop), (0, groups)),
            "biases": Rect((start, stop), (0, groups)),
        } | _rotation_cuts(self.krot, self.columns)

    def repack(self, parts: Parts, start: int, stop: int, out: Triple, scratch: Scratch) -> None:
        for role, rows in out.items():
            rows[:] = parts[role]

    def decode(self, parts: Parts, start: int, stop: int, out: Array, scratch: Scratch) -> None:
        wide = scratch.take("rotated", "F32", stop - start, 4 * self.columns)
        tensors = native.QuantizedTensors.from_roles(parts)
        native.dequantize_into(tensors, self.encoding, wide)
        inverse_rotate(wide, parts, self.group)
        out[:] = wide
