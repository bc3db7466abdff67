"""The measured candidates of each layer, in memory and in the file that a resumed run reads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Errors = Mapping[str, tuple[float, float]]
"""Candidate of a layer -> its squared error, summed over the weights, and the squared weights."""

_SAVE_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A quantization of a layer, its size and its quantization error."""

    spec: str  # as in an override ("4:64")
    nbytes: int  # of its tensors in the output
    error: float  # squared error of its weights, summed
    energy: float  # squared weights, summed; 0 where the codes stay what they are


@dataclass(frozen=True, slots=True)
class Measured:
    """The candidates of each layer, and what does not depend on the budget."""

    parameters: int  # weights of the model, as ``bits_per_weight`` counts them
    fixed_bytes: int  # bytes of what no candidate changes
    fixed: Mapping[str, str]  # layers that the options determine, with their spec
    layers: Mapping[str, tuple[Candidate, ...]]  # the other ones, with their candidates
    tied_groups: tuple[tuple[str, ...], ...]  # the same layers in runs that take one candidate


class MeasuredErrors:
    """The errors of the layers that were measured so far.

    They are written to a file every ten seconds, or less often where that takes long, so that a
    stopped run resumes with them.

    Args:
        file: Read if it has the same key; None keeps nothing.
        key: A hash of all that the errors depend on.
    """

    def __init__(self, file: Path | None, key: str) -> None:
        self.layers: dict[str, Errors] = {}
        self._file, self._key = file, key
        self._due_s = time.monotonic() + _SAVE_INTERVAL_S
        if file is not None:
            self._load(file)

    def _load(self, file: Path) -> None:
        """Read the file; one that holds none, or those of another key, is as good as none."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(file.read_bytes())
            if data["key"] == self._key:
                self.layers = {
                    layer: {spec: (float(x), float(y)) for spec, (x, y) in errors.items()}
                    for layer, errors in data["layers"].items()
                }

    def add(self, layer: str, errors: Errors) -> None:
        """Add a layer."""
        self.layers[layer] = errors
        if time.monotonic() >= self._due_s:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all.

        A disk that cannot be written is not an error: the next run measures again.
        """
        began = time.monotonic()
        if self._file is not None:
            fresh = self._file.with_name(self._file.name + ".new")
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                fresh.write_text(json.dumps({"key": self._key, "layers": self.layers}))
                fresh.replace(self._file)
        now = time.monotonic()
        self._due_s = now + max(_SAVE_INTERVAL_S, 20 * (now - began))


def measurements_path(output: Path) -> Path:
    """The file next to ``output`` that holds measurements for a resumed run."""
    return output.parent / f".{output.name}.requant-measured"
