"""The measured candidates of each layer, in memory and in the file that a resumed run reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path


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
    sizes: Mapping[str, int]  # how many weights these hold
    tied_groups: tuple[tuple[str, ...], ...]  # the same layers in runs that take one candidate

    @classmethod
    def load(cls, file: Path, key: str) -> Measured | None:
        """Read measurements; None where the file holds none, or those of another key."""
        try:
            data = json.loads(file.read_bytes())
            if data.pop("key") != key:
                return None
            layers = {x: tuple(Candidate(*y) for y in rows) for x, rows in data["layers"].items()}
            tied_groups = tuple(map(tuple, data["tied_groups"]))
            return cls(**(data | {"layers": layers, "tied_groups": tied_groups}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, file: Path, key: str) -> None:
        """Write the measurements, whole or not at all.

        A disk that cannot be written is not an error: the next run measures again.
        """
        layers = {layer: [*map(astuple, found)] for layer, found in self.layers.items()}
        fresh = file.with_name(file.name + ".new")
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps({"key": key} | asdict(self) | {"layers": layers}))
            fresh.replace(file)


def measurements_path(output: Path) -> Path:
    """The file next to ``output`` that holds measurements for a resumed run."""
    return output.parent / f".{output.name}.requant-measured"
