"""What a dense model predicts on a text, kept as hidden states in a file.

The hidden states after the last block are small next to the logits, which the layers after it make
of them whenever they are needed. The model runs block by block: the weights of one block are in
memory, with embedding and head. A model that cannot be run so is held as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from requant.calibration.blocks import BlockwiseModel, NotBlockwiseError
from requant.calibration.run_folder import HiddenStates, as_output_errors
from requant.calibration.text_model import build_empty_text_model, load_as_stored, plan_text_model
from requant.core.types import Source
from requant.mlx_lm.evaluation import as_backend_errors, log_probabilities
from requant.nn.blas_products import blas_products
from requant.output.record import version
from requant.planning.planner import Planned

if TYPE_CHECKING:
    import mlx.core as mx

_FORMAT = 1  # changes with what a file of hidden states holds


class DensePredictions:
    """The next-token distributions of a model, by window of a text."""

    def __init__(
        self,
        model: Source,
        ids: np.ndarray,
        folder: Path,
        threads: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Run a model over a text, or read what an earlier run left.

        Args:
            model: A dense model, or the one that others are held against.
            ids: Token ids ``(windows, window)``.
            folder: Where the hidden states are kept, under a name that says of what.
            threads: Threads that decode the source.
            progress: Called with the block at hand, how many are done, and of how many.

        Raises:
            CheckpointError: The model cannot be read, or no library takes it.
            BackendError: MLX cannot run it on this machine.
            OutputError: The folder cannot be written.
        """
        self._ids = ids
        planned = plan_text_model(model)
        self._whole = None
        try:
            layered = BlockwiseModel(build_empty_text_model(planned.plan), *planned, threads)
            layered.load_rest()
            first = layered.embed(ids[0, :-1])
            self._dtype, shape = first.dtype, (len(ids), *first.shape[1:])
            place = folder / f"{_key(planned, ids)}.hidden"
            if not place.is_file() or place.stat().st_size != 4 * np.prod(shape):
                self._run(layered, shape, place, progress)
            self._layered, self._states = layered, np.memmap(place, np.float32, "r", shape=shape)
        except NotBlockwiseError:
            self._whole, _ = load_as_stored(model, threads=threads)

    def _run(
        self,
        layered: BlockwiseModel,
        shape: tuple[int, ...],
        place: Path,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        import mlx.core as mx

        inputs = self._ids[:, :-1]
        calls = layered.calls(inputs[0], inputs[-1])
        with as_output_errors(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".hidden-", dir=place.parent) as temporary:
            hidden = HiddenStates(Path(temporary), shape)
            hidden.write(0, (_to_numpy(layered.embed(row)) for row in inputs))
            for number, call in enumerate(calls):
                if progress is not None:
                    progress("block of the reference", number, len(calls))
                with blas_products(), as_backend_errors(), layered.block(number) as block:
                    rows = (mx.array(row[None]).astype(self._dtype) for row in hidden.read(number))
                    outputs = (_to_numpy(layered.step(block, row, call)) for row in rows)
                    hidden.write(number + 1, outputs)
            hidden.keep(len(calls), place)

    def __call__(self, number: int) -> mx.array:
        """Log probabilities of a window, float32 ``(window - 1, vocabulary)``.

        Raises:
            BackendError: MLX cannot run the model on this machine.
        """
        import mlx.core as mx

        row = self._ids[number]
        found: mx.array
        if self._whole is not None:
            found = log_probabilities(self._whole, row)
        else:
            states = mx.array(self._states[number][None]).astype(self._dtype)
            found = log_probabilities(lambda ids: self._layered.finish(row[:-1], states), row)
        return found


def _key(planned: Planned, ids: np.ndarray) -> str:
    """Hash of everything that the hidden states depend on."""
    parts = [_FORMAT, planned.plan.hash, version(), list(ids.shape)]
    return hashlib.sha256(json.dumps(parts).encode() + ids.tobytes()).hexdigest()[:32]


def _to_numpy(x: mx.array) -> np.ndarray:
    import mlx.core as mx

    row: np.ndarray = np.array(x.astype(mx.float32))[0]
    return row
