"""Between steps 2 and 3: a checkpoint under the names that mlx-lm would give its tensors.

What mlx-lm merely moves (renamed, stacked, split) stays bytes of the source files; what its
model class computes is computed when the run comes to it, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.checkpoint import (
    Checkpoint,
    ComputedTensor,
    FileRange,
    JoinedTensor,
    SourceTensor,
    StoredTensor,
)
from requant.errors import CheckpointError, Problem, RequantError, UsageError
from requant.mlx_lm_classes import WITHOUT_A_CLASS, why_no_class
from requant.schema import Quantization

if TYPE_CHECKING:
    from requant.mlx_lm_layout import MlxLmLayout


@dataclass(frozen=True)
class Relayout:
    """What mlx-lm decides about a checkpoint, and its tensors under mlx-lm's names.

    Attributes:
        checkpoint: The source with renamed, joined and computed tensors.
        layout: mlx-lm's names, choice of layers and config.
        original: The source as it is stored.
    """

    checkpoint: Checkpoint
    layout: MlxLmLayout
    original: Checkpoint = field(repr=False)

    def compute(self, name: str) -> np.ndarray:
        """The bytes of a computed tensor, evaluated by the model's own rule."""
        import mlx.core as mx

        array = self.layout.compute(name, self._load)
        flat = mx.view(mx.reshape(array, (-1,)), mx.uint8)
        return np.array(flat)

    def _load(self, name: str) -> Any:
        """A source tensor as ``mx.load`` gives it, read from its file."""
        import mlx.core as mx

        from requant.mlx_lm_layout.pipeline import MLX_DTYPE

        stored = self.original.tensors[name]
        assert isinstance(stored, StoredTensor)
        path = self.original.path / stored.file
        raw = np.fromfile(path, np.uint8, stored.info.nbytes, offset=stored.offset)
        array = mx.view(mx.array(raw), MLX_DTYPE[stored.info.dtype])
        return mx.reshape(array, stored.info.shape)


def relayout(
    checkpoint: Checkpoint, quantization: Quantization | None, dtype: str | None
) -> Relayout:
    """Lay a checkpoint out as mlx-lm would.

    Raises:
        CheckpointError: mlx-lm is not installed, does not know the model, or would itself
            fail on this checkpoint.
    """
    if why := why_no_class(checkpoint.config):
        raise _refusal(checkpoint, f"{why}. {WITHOUT_A_CLASS}")
    try:
        from mlx_lm.utils import load_config

        from requant.mlx_lm_layout import mlx_lm_layout
    except Exception as error:  # mlx-lm raises limits of the process while it is imported
        message = f"mlx-lm cannot be imported ({error}). {WITHOUT_A_CLASS}"
        raise _refusal(checkpoint, message) from error
    infos = {name: tensor.info for name, tensor in checkpoint.tensors.items()}
    try:
        # Not our own reading of config.json: mlx-lm adds what generation_config.json says.
        config = load_config(checkpoint.path)
        layout = mlx_lm_layout(config, infos, quantization=quantization, dtype=dtype)
    except UsageError:
        raise
    except RequantError as error:
        raise _refusal(checkpoint, str(error)) from error
    if layout.mangled:
        problems = [
            Problem(layer, "mlx-lm would do arithmetic on its packed codes; --dequantize it first")
            for layer in layout.mangled
        ]
        raise CheckpointError(str(checkpoint.path), problems)
    tensors = MappingProxyType(_renamed(checkpoint.tensors, layout))
    return Relayout(replace(checkpoint, tensors=tensors), layout, checkpoint)


def _refusal(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(str(checkpoint.path), [Problem("--layout mlx-lm", why)])


def _renamed(stored: Mapping[str, SourceTensor], layout: MlxLmLayout) -> dict[str, SourceTensor]:
    """mlx-lm's name -> where its bytes come from."""
    from requant.mlx_lm_layout import Moved

    found: dict[str, SourceTensor] = {}
    for name, output in layout.tensors.items():
        if not isinstance(output, Moved):
            found[name] = ComputedTensor(name, output.info, output.inputs)
            continue
        ranges: list[FileRange] = []
        for extent in output.extents:
            tensor = stored[extent.tensor]
            assert isinstance(tensor, StoredTensor)
            offset, nbytes = tensor.offset + extent.start, extent.stop - extent.start
            last = ranges[-1] if ranges else None
            if last and (last.file, last.offset + last.nbytes) == (tensor.file, offset):
                ranges[-1] = FileRange(tensor.file, last.offset, last.nbytes + nbytes)
            else:
                ranges.append(FileRange(tensor.file, offset, nbytes))
        if len(ranges) == 1:
            found[name] = StoredTensor(name, output.info, ranges[0].file, ranges[0].offset)
        else:
            found[name] = JoinedTensor(name, output.info, tuple(ranges))
    return found
