"""``inspect``: list the layers, files and problems of a checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from requant.checkpoints.checkpoint import SourceFile
from requant.core.regex import regex_time_budget
from requant.core.types import Source
from requant.errors import Problem, error_action
from requant.formats.stale_blocks import read_source
from requant.quantization.config import PerLayerQuantization
from requant.sources.hub_repository import find_repository
from requant.sources.open import as_checkpoint


@dataclass(frozen=True, slots=True)
class Stored:
    """A layer, or a tensor outside of layers, as the source stores it."""

    layer: str
    encoding: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a checkpoint."""

    source: str
    format: str
    evidence: str  # what the format was detected from
    model_type: str
    files: tuple[SourceFile, ...]
    layers: tuple[Stored, ...]
    quantization: PerLayerQuantization | None
    side_files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]

    @property
    def parameters(self) -> int:
        """Number of logical weights."""
        return sum(prod(layer.shape) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def encodings(self) -> dict[str, tuple[int, int, int]]:
        """Encoding to numbers of layers, parameters and bytes; largest first."""
        layers, sizes, nbytes = Counter[str](), Counter[str](), Counter[str]()
        for layer in self.layers:
            layers[layer.encoding] += 1
            sizes[layer.encoding] += prod(layer.shape)
            nbytes[layer.encoding] += layer.nbytes
        return {key: (layers[key], sizes[key], size) for key, size in nbytes.most_common()}

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON data."""
        return {
            "source": self.source,
            "format": self.format,
            "evidence": self.evidence,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "bits_per_weight": 8 * self.nbytes / self.parameters if self.parameters else 0.0,
            "quantization": self.quantization and self.quantization.to_dict(),
            "files": [asdict(file) for file in self.files],
            "layers": [asdict(layer) for layer in self.layers],
            "side_files": list(self.side_files),
            "left_out": [list(pair) for pair in self.left_out],
            "problems": [asdict(problem) for problem in self.problems],
        }


@error_action("inspected")
@regex_time_budget()
def inspect(
    source: Source,
    config_from: Source | None = None,
    revision: str | None = None,
    mmproj: str | None = None,
) -> Inspection:
    """List the content of a checkpoint; only headers and JSON are read.

    Problems of the format (a missing scale, a wrong shape) are listed in the result.

    Args:
        source: Folder, GGUF file, or ``org/name`` on the hub, as ``convert`` takes it.
        config_from: For GGUF, as in ``convert``.
        revision: Of a repository on the hub: branch, tag or commit.
        mmproj: For GGUF, as in ``convert``.

    Returns:
        Format, layers with their encodings, sizes in bytes, and problems.

    Raises:
        CheckpointError: The folder itself cannot be read as a checkpoint.
        HubError: A repository cannot be reached or denies access.

    Example:
        >>> inspection = inspect("Llama-3-8B-AWQ")  # doctest: +SKIP
        >>> inspection.nbytes, inspection.problems  # doctest: +SKIP
    """
    remote = find_repository(source, revision, mmproj)
    found = remote.read_headers(config_from) if remote else Path(source)
    checkpoint = as_checkpoint(found, config_from, mmproj=mmproj)
    read = read_source(checkpoint)
    layout = read.layout
    return Inspection(
        source=str(source),
        format=read.format,
        evidence=read.evidence,
        model_type=str(checkpoint.config.get("model_type", "")),
        files=checkpoint.files,
        layers=tuple(
            Stored(x.path, x.stored_as, x.shape, sum(p.info.nbytes for p in x.parts.values()))
            for x in layout.layers
        ),
        quantization=layout.quantization,
        side_files=(*checkpoint.side_files, *sorted(checkpoint.opened.generated_files)),
        left_out=checkpoint.left_out,
        problems=layout.problems,
    )
