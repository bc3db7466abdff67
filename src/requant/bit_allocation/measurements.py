"""The measured candidates of each layer, in memory and in the file that a resumed run reads."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from requant.core.files import fsync, replace_file
from requant.planning.plan import Plan
from requant.quantization.part import Part

Errors = Mapping[str, tuple[float, float]]
"""Candidate of a layer -> its squared error, summed over the weights, and the squared weights."""

_SAVE_INTERVAL_S = 10.0
_OF_PART = "measured"  # files of parts begin so


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
        parts: A folder in which parts keep theirs, which are read too.
    """

    def __init__(self, file: Path | None, key: str, parts: Path | None = None) -> None:
        self.layers: dict[str, Errors] = {}  # of this file and of the parts
        self._file, self._key, self._parts = file, key, parts
        self._due_s = time.monotonic() + _SAVE_INTERVAL_S
        self._own = {} if file is None else self._load(file)
        self.layers |= self._own
        self.read_parts()

    def read_parts(self) -> None:
        """Add what other parts have measured by now."""
        if self._parts is None:
            return
        for file in sorted(self._parts.glob(f"{_OF_PART}.*-of-*.*")):
            self.layers = self._load(file) | self.layers

    def _load(self, file: Path) -> dict[str, Errors]:
        """Read a file; one that holds none, or those of another key, is as good as none."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(file.read_bytes())
            if data["key"] == self._key:
                return {
                    layer: {spec: (float(x), float(y)) for spec, (x, y) in errors.items()}
                    for layer, errors in data["layers"].items()
                }
        return {}

    def add(self, layer: str, errors: Errors) -> None:
        """Add a layer."""
        self.layers[layer] = self._own[layer] = errors
        if time.monotonic() >= self._due_s:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all.

        A disk that cannot be written is not an error: the next run measures again.
        """
        began = time.monotonic()
        if self._file is not None:
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._write(self._file)
        now = time.monotonic()
        self._due_s = now + max(_SAVE_INTERVAL_S, 20 * (now - began))

    def make_durable(self) -> None:
        """Write what a part has measured, if it is anything, so that no stop takes it back.

        Raises:
            OSError: It cannot be written.
        """
        if self._own and self._file is not None:
            self._write(self._file)
            fsync(self._file.parent)

    def _write(self, path: Path) -> None:
        with replace_file(path) as file:
            file.write(json.dumps({"key": self._key, "layers": self._own}).encode())


class PartlyMeasuredError(Exception):
    """A part has measured its layers, other parts have not; nothing can be chosen yet."""

    def __init__(self, plan: Plan, unmeasured: int) -> None:
        super().__init__(f"{unmeasured} layers are not measured yet")
        self.plan, self.unmeasured = plan, unmeasured  # before anything is chosen; layers


def part_measurements_path(parts: Path, part: Part) -> Path:
    """A path for what one run of a part measures, that no other run has."""
    name = f"{_OF_PART}.{part.number}-of-{part.count}.{secrets.token_hex(4)}"
    return parts / name


def measurements_path(output: Path) -> Path:
    """The file next to ``output`` that holds measurements for a resumed run."""
    return output.parent / f".{output.name}.requant-measured"
