"""The figures of a conversion, read back from the record (``requant.json``) in its output.

``html`` draws them, ``model_card`` writes them into a model card. Nothing is computed again.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from requant.checkpoints.folder_files import RECORD
from requant.core.types import Source
from requant.errors import CheckpointError, ParseError, Problem, error_action
from requant.output.record import read_record
from requant.quantization.export_options import EXPORT, ExportOptions, split_export
from requant.quantization.options import STATISTICS, ConvertOptions
from requant.reports.report import LayerGroup, group_layers
from requant.text import format_value

SCHEMA_VERSION = 1  # of the output of --json, the same for all commands


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer of a conversion."""

    layer: str
    shape: tuple[int, ...]  # the logical shape
    treatment: str  # quantized, requantized, kept, dequantized or dense
    exactness: str  # exact, rounded or re-encoded
    source: str  # how the source stores it
    target: str  # how the output stores it
    bytes_in: int  # bytes of its tensors in the source
    bytes_out: int  # bytes of its tensors in the output
    reason: str  # the reason of a treatment that was not requested
    bound: str  # the error bound of a rounded layer, in words
    relative_rms: float | None  # measured error of new codes; None where there are none
    max_steps: float | None  # largest error of a value in steps of its group; None likewise

    @property
    def parameters(self) -> int:
        """Logical weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the output."""
        return self.bytes_out

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output per logical weight."""
        return 8 * self.bytes_out / self.parameters if self.parameters else 0.0

    @property
    def kind(self) -> str:
        """The name without block and numbers: "q_proj", "embed_tokens"."""
        names = [part for part in self.layer.split(".") if not part.isdigit()] or [self.layer]
        return ".".join(names[-2:] if names[-1] == "bias" else names[-1:])


@dataclass(frozen=True, slots=True)
class KindSummary:
    """Layers of one kind; errors are None where no new codes were computed."""

    kind: str
    layers: int
    parameters: int
    bytes_in: int
    bytes_out: int
    median_rms: float | None
    worst_rms: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The content of an output's record.

    Attributes:
        output: The folder.
        requant: Version that wrote it.
        plan_hash: SHA-256 of everything that determines the output's bytes.
        source_format: Name of the source's format.
        repository: Id and commit of a source on the hub.
        source_files: Name, bytes and header's SHA-256 of each weight file of the source.
        options: The options of the conversion.
        tensors: Tensors in the output.
        layers: In the order of the source's bytes.
        export: The options of an export; None for a conversion.
    """

    output: str
    requant: str
    plan_hash: str
    source_format: str
    repository: tuple[str, str] | None
    source_files: tuple[tuple[str, int, str], ...]
    options: ConvertOptions
    tensors: int
    layers: tuple[LayerSummary, ...]
    export: ExportOptions | None = None

    @property
    def parameters(self) -> int:
        """Logical weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors."""
        return sum(layer.bytes_in for layer in self.layers)

    @property
    def bytes_out(self) -> int:
        """Bytes of the output's tensors."""
        return sum(layer.bytes_out for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output per logical weight."""
        return 8 * self.bytes_out / self.parameters if self.parameters else 0.0

    @property
    def groups(self) -> list[LayerGroup]:
        """Layers grouped by treatment, source, target and exactness, most bytes first."""
        return group_layers(self.layers)

    @property
    def kinds(self) -> list[KindSummary]:
        """Layers by kind, most bytes of the output first."""
        alike: dict[str, list[LayerSummary]] = defaultdict(list)
        for layer in self.layers:
            alike[layer.kind].append(layer)
        kinds = []
        for kind, layers in alike.items():
            errors = [x.relative_rms for x in layers if x.relative_rms is not None]
            kinds.append(
                KindSummary(
                    kind=kind,
                    layers=len(layers),
                    parameters=sum(x.parameters for x in layers),
                    bytes_in=sum(x.bytes_in for x in layers),
                    bytes_out=sum(x.bytes_out for x in layers),
                    median_rms=median(errors) if errors else None,
                    worst_rms=max(errors, default=None),
                )
            )
        return sorted(kinds, key=lambda kind: -kind.bytes_out)

    @property
    def measured(self) -> list[LayerSummary]:
        """Layers with a measured error, worst first."""
        measured = [layer for layer in self.layers if layer.relative_rms is not None]
        return sorted(measured, key=lambda layer: -(layer.relative_rms or 0.0))

    def command(self, source: str = "", output: str = "OUTPUT") -> str:
        """The command that makes this output again; a ``source`` of "" is that of the hub."""
        command, options = "convert", self.options.command_words()
        if self.export is not None:
            command, options = "export", self.export.command_words()
        words = ["requant", command, source or "SOURCE", output, *options]
        if self.repository is not None and not source:
            words[2] = self.repository[0]
            words += ["--revision", self.repository[1]]
        return shlex.join(words)

    def verify_command(self, source: str = "SOURCE", output: str = "OUTPUT") -> str:
        """The command that repeats the conversion and compares every byte.

        Other files than the source have the names that the conversion was given.
        """
        before = []
        words = ["requant", "verify", source, output]
        if self.options.config_from is not None:
            words += ["--config-from", self.options.config_from]
        if self.options.statistics is not None:
            words += ["--imatrix", self.options.statistics]
        elif self.options.calibrate is not None:  # statistics that were not kept
            before = [shlex.join(self.options.calibration_words(source))]
            words += ["--imatrix", STATISTICS]
        return " && ".join([*before, shlex.join(words)])

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data."""
        return {
            "schema": SCHEMA_VERSION,
            "output": self.output,
            "requant": self.requant,
            "plan_hash": self.plan_hash,
            "source_format": self.source_format,
            "repository": self.repository and list(self.repository),
            "source_files": [list(file) for file in self.source_files],
            "options": self.options.to_dict()
            | ({} if self.export is None else {EXPORT: self.export.to_dict()}),
            "command": self.command(output=self.output),
            "parameters": self.parameters,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "tensors": self.tensors,
            "groups": [asdict(group) for group in self.groups],
            "kinds": [asdict(kind) for kind in self.kinds],
            "layers": [
                asdict(x) | {"kind": x.kind, "bits_per_weight": x.bits_per_weight}
                for x in self.layers
            ],
        }


@error_action("read")
def read_figures(output: Source) -> Figures:
    """Read the figures of a conversion from ``requant.json`` in its output.

    Args:
        output: A folder that ``convert`` wrote.

    Returns:
        Layers with treatment, exactness, sizes in bytes and errors, options and source.

    Raises:
        CheckpointError: It has no record, or an invalid one.

    Example:
        >>> figures = read_figures("output")  # doctest: +SKIP
        >>> [layer.layer for layer in figures.measured[:3]]  # doctest: +SKIP
        ['model.layers.3.self_attn.o_proj', ...]
    """
    place = Path(output)
    record = read_record(place)
    try:
        source = _require(record, "source", dict)
        layers = _require(record, "layers", dict)
        export, options = split_export(_require(record, "options", dict))
        return Figures(
            output=str(place),
            requant=_require(record, "requant", str),
            plan_hash=_require(record, "plan", str),
            source_format=_require(source, "format", str),
            repository=_repository(source.get("repository")),
            source_files=tuple(map(_source_file, _require(source, "files", list))),
            options=ConvertOptions.from_dict(options),
            tensors=len(_require(record, "tensors", dict)),
            layers=tuple(_layer(name, _require(layers, name, dict)) for name in layers),
            export=export,
        )
    except ParseError as error:
        raise CheckpointError(str(place), [Problem(RECORD, str(error))]) from None


def _source_file(entry: Any) -> tuple[str, int, str]:
    name, digest = (_require(entry, key, str) for key in ("name", "header_sha256"))
    return name, _require(entry, "nbytes", int), digest


def _repository(value: Any) -> tuple[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(x) for x in value] != [str, str]:
        raise ParseError(
            f"source.repository: is {format_value(value)}, expected an id and a commit"
        )
    return value[0], value[1]


def _layer(name: str, entry: Mapping[str, Any]) -> LayerSummary:
    keys = ("treatment", "exactness", "source", "target", "reason", "bound")
    words = {key: _require(entry, key, str, name) for key in keys}
    shape = _require(entry, "shape", list, name)
    sizes = {key: _require(entry, key, int, name) for key in ("bytes_in", "bytes_out")}
    if not all(_is_count(number) for number in (*shape, *sizes.values())):
        found = f"shape {shape} and bytes {[*sizes.values()]}"
        raise ParseError(f"layers.{name}: {found} are not counts")
    error = entry.get("error")
    pair = isinstance(error, list) and len(error) == 2 and all(map(_is_figure, error))
    if error is not None and not pair:
        raise ParseError(
            f"layers.{name}.error: is {format_value(error)}, expected two numbers or null"
        )
    rms, steps = error or (None, None)
    return LayerSummary(name, tuple(shape), **words, **sizes, relative_rms=rms, max_steps=steps)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_figure(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared as it is: an integer of a record may be too large for a float.
    return number and -1e300 < value < 1e300  # type: ignore[operator]


_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _require(entry: Any, key: str, kind: type, where: str = "") -> Any:
    """Return a value of the record, if it has the type ``kind``."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        place = f"layers.{where}.{key}" if where else key
        if value is None:
            raise ParseError(f"{place}: is missing; requant of this version writes it")
        raise ParseError(f"{place}: is {format_value(value)}, expected {_TYPES[kind]}")
    return value
