"""The Plan: frozen data that prints as JSON and says where each byte of the output goes.

``planner`` makes it; ``execution``, ``output`` and ``reports`` read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import prod
from operator import attrgetter
from typing import Any, Final

from requant.checkpoints.checkpoint import SourceFile, SourceTensor
from requant.checkpoints.safetensors_header import build_header
from requant.core.dtypes import NUMPY_DTYPE, TensorInfo
from requant.core.json_pieces import Rows, as_data, compact_pieces
from requant.core.reasons import Note, Reason, ReasonCode
from requant.formats.base import RowOrder
from requant.importance.statistics_file import Importance
from requant.packings.base import Exactness, Packing
from requant.quantization.config import PerLayerQuantization, Quantization, QuantMode

_WIDEST = 4  # bytes of a float32 value


class Operation(StrEnum):
    """The operation on a range of rows."""

    COPY = "copy"  # the bytes as they are
    CAST = "cast"  # each value rounded to another dtype
    ENCODE = "encode"  # dense rows -> codes, scales, biases
    DECODE = "decode"  # codes, scales, biases -> dense rows
    RECODE = "recode"  # decode, then encode, without leaving the worker
    REPACK = "repack"  # codes of another layout -> MLX's words, scales, biases
    EXPORT = "export"  # words, scales and biases -> a tensor of another format


class Treatment(StrEnum):
    """How a layer is converted, in the words of the report."""

    QUANTIZED = "quantized"
    REQUANTIZED = "requantized"
    KEPT = "kept"
    DEQUANTIZED = "dequantized"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output and where its bytes go."""

    name: str
    info: TensorInfo
    file: str = ""
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMapping:
    """The rows that a step computes: where they are in the source, and where in the outputs.

    Row ``r`` of a step, ``0 <= r < count``, is row ``first + r * step`` of the packed layer that
    it is read from, and row ``output_row + r`` of the outputs; with an ``order``, it is row
    ``output_row + order.inverse[r]`` of the outputs instead.

    Example: gate and up of an expert take turns in a stored matrix of 8 rows. Up is ``count=4,
    first=1, step=2``: its rows are the stored rows 1, 3, 5 and 7. As the second of two experts in
    a stack its ``output_row`` is 4, so that they become the rows 4, 5, 6 and 7 of the output.
    """

    count: int  # how many rows
    columns: int  # logical values in a row
    first: int = 0  # first row of the packed layer; 0 without a packing
    step: int = 1  # of the packed layer, from one row to the next
    output_row: int = 0  # row of the outputs that the first row becomes
    # Rows of the outputs in another order than the source's; None for the same.
    order: RowOrder | None = None

    def stored_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the packed layer that the rows ``start`` to ``stop`` are within.

        With ``first=1, step=2``, rows 1 to 3 of the step are the stored rows 3 and 5: (3, 6).
        """
        first = self.first + start * self.step
        return first, first + (stop - start - 1) * self.step + 1


class RowsOf(StrEnum):
    """What the rows of a matrix belong to, which decides what its columns say of its inputs."""

    FEATURES = "features"
    TOKENS = "tokens"  # an embedding or a head


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeParams:
    """How dense rows are encoded."""

    target: Quantization
    search: str = "off"  # how scales are found: "off" as ``mx.quantize`` does, "fast" or "best"
    # Statistics of the inputs, whose mean squares weight the errors in the search; None for none.
    importance: Importance | None = None
    # Without them, the power of each input is estimated from the step's columns; None if all inputs
    # count alike.
    estimate: RowsOf | None = None
    gptq: bool = False  # whether each column's error is compensated in the columns after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation over the rows of one layer's tensors.

    Every output holds ``rows.count`` rows, each a contiguous range of bytes, and so does every
    input but for a packed layer, whose packing knows where its rows are: any range of rows can be
    computed alone. A step may be a piece of a larger tensor; ``rows`` says which.
    """

    layer: str  # path of the layer
    operation: Operation  # what is done to the rows
    rows: RowMapping  # where they are in the source and in the outputs
    inputs: Mapping[str, SourceTensor]  # role -> tensor of the source
    outputs: Mapping[str, OutputTensor]  # role -> tensor of the output
    # MLX's quantization of the inputs; None where they are dense or packed.
    source: Quantization | None = None
    # How codes are computed; None where the operation computes none.
    encode: EncodeParams | None = None
    repack: Quantization | None = None  # REPACK: MLX's quantization of the codes that are moved
    dtype: str = ""  # header name of the values between decoding and encoding
    global_scale: SourceTensor | None = None  # nvfp4: one float32 for all rows, or one an expert
    packing: Packing | None = None  # how the rows of a packed layer come out of the inputs
    scales_of: QuantMode | None = None  # the tensor holds scales or biases of this mode

    def with_outputs(self, outputs: Mapping[str, OutputTensor]) -> Step:
        """The same step with its outputs elsewhere: ``replace`` in a fraction of the time."""
        values = _other_fields(self)
        return Step(outputs=outputs, **dict(zip(_OTHER_FIELDS, values, strict=True)))

    @property
    def target(self) -> Quantization | None:
        """The quantization of the outputs; None for dense ones."""
        return self.repack if self.encode is None else self.encode.target

    @property
    def search(self) -> str:
        """How scales of new codes are found; "off" where none are computed."""
        return "off" if self.encode is None else self.encode.search

    @property
    def importance(self) -> Importance | None:
        """How errors of each input are weighted; None where no codes are computed."""
        return None if self.encode is None else self.encode.importance

    @property
    def estimate(self) -> RowsOf | None:
        """What the rows belong to, where the power of each input is estimated from them."""
        return None if self.encode is None else self.encode.estimate

    @property
    def gptq(self) -> bool:
        """Whether errors are compensated."""
        return self.encode is not None and self.encode.gptq

    @property
    def measures_rounding(self) -> bool:
        """Whether the error is measured that rounding makes: of scales next to kept codes."""
        if self.packing is None or self.operation is not Operation.REPACK:
            return False
        is_affine = self.repack is not None and self.repack.mode is QuantMode.AFFINE
        return is_affine and self.packing.fidelity(self.dtype).exactness is Exactness.ROUNDED

    @property
    def matrix_rows(self) -> int:
        """Rows of each matrix of a quantized output."""
        return self.outputs["weight"].info.shape[-2]

    def row_bytes(self, tensor: SourceTensor | OutputTensor) -> int:
        """Bytes of one row in ``tensor``; of a part of a packed layer, its share of the bytes."""
        if self.packing is not None and not isinstance(tensor, OutputTensor):
            return -(-tensor.info.nbytes // max(self.packing.rows, 1))
        count = self.rows.count
        if self.packing is not None:
            of_values = self.operation is Operation.DECODE and self.rows.columns == 1
            count = prod(tensor.info.shape if of_values else tensor.info.shape[:-1])
        return tensor.info.nbytes // max(count, 1)

    @property
    def bytes_in(self) -> int:
        """Bytes of tensor data to read; a piece of a packed layer reads its share."""
        # A packing may read one tensor under two roles.
        nbytes = sum({t.name: t.info.nbytes for t in self.inputs.values()}.values())
        if self.packing is None:
            return nbytes
        return nbytes * self.rows.count // max(self.packing.rows, 1)

    @property
    def work_bytes_per_row(self) -> int:
        """Bytes that a worker needs for each row: inputs, outputs, and the values between."""
        held = sum(self.row_bytes(t) for t in self.inputs.values())
        held += sum(self.row_bytes(t) for t in self.outputs.values())
        packing = self.packing
        if packing is not None and self.operation is Operation.REPACK:
            held += packing.scratch_row_bytes
        elif packing is not None:
            held += packing.scratch_value_bytes * self.rows.columns
            if self.operation is Operation.EXPORT:
                held += packing.scratch_row_bytes
        if self.measures_rounding:  # the outputs again, with scales and biases in float32
            held += 2 * sum(self.row_bytes(t) for t in self.outputs.values())
        if self.gptq:
            held += 2 * _WIDEST * self.rows.columns
        elif self.operation is Operation.RECODE:
            held += NUMPY_DTYPE[self.dtype].itemsize * self.rows.columns
        return held * self.rows.step

    @property
    def min_work_bytes(self) -> int:
        """Bytes of the smallest range of rows that can be computed alone."""
        unit = self.packing.row_unit if self.packing else 1
        # Values of a block of rows are cast, and decoded again to measure the error.
        block = 2 * _WIDEST * self.rows.columns if self.encode is not None else 0
        return self.work_bytes_per_row * unit + block * self.rows.step


_OTHER_FIELDS: Final = tuple(x.name for x in fields(Step) if x.name != "outputs")
_other_fields: Final = attrgetter(*_OTHER_FIELDS)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer is converted."""

    layer: str
    shape: tuple[int, ...]
    source: str  # "BF16", or "4-bit affine, group 64"
    target: str
    treatment: Treatment
    exactness: Exactness
    nbytes: int  # of its tensors in the output
    is_weight: bool
    reason: Reason | None = None  # why it was left dense, or why the group is another
    bound: str = ""  # what "rounded" costs at the most, in words

    @property
    def reason_code(self) -> ReasonCode | None:
        """The code of the reason; None where there is none."""
        return self.reason.code if self.reason else None

    def to_dict(self) -> dict[str, Any]:
        """The layer as JSON data, with the text and the code of the reason or ""."""
        data: dict[str, Any] = as_data(self)
        return data | {
            "reason": self.reason.text if self.reason else "",
            "reason_code": self.reason_code or "",
        }


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One weight file of the output."""

    name: str
    nbytes: int
    tensors: tuple[OutputTensor, ...]  # its tensors in the order of their bytes
    # The header's ``format``: "mlx" for names of an MLX class, "pt" for those of PyTorch. Loaders
    # in Swift do not rename, transpose or shift tensors of "mlx".
    names_of: str = "mlx"
    lead: bytes = b""  # all before the data in a file that is not safetensors; else empty

    def header(self) -> bytes:
        """The safetensors header, length prefix included; of another file all before its data."""
        return self.lead or _header(self.tensors, self.names_of)[0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a conversion will do: plain data, which pickles and compares.

    The opened files and the library's functions that it is executed on are a ``PlanSource``.

    Attributes:
        source: Path of the source as given.
        format: Name of the source format.
        files: Weight files of the source.
        layers: How each layer or loose tensor is converted.
        steps: The operations, in the order of the source's bytes.
        shards: The output's weight files.
        config: The output's ``config.json``.
        quantization: The output's quantization; None if nothing stays quantized.
        side_files: Files copied byte for byte.
        left_out: Files not copied, with the reason.
        notes: What the user should know.
        dropped: Tensors of the source that the output has no use for, with the reason.
        layout: Name of the library whose names and shapes they are ("mlx-lm"); else "keep".
        loads: The library is known to load the output.
        rotated: Inputs of layers are still to be rotated when it runs.
        load_error: Why the library would not load an output in its own layout, rotations aside; ""
            where it would.
        repository: Of a source on the hub: its id, and the commit.
        side_bytes: Size of those side files that are copied from the source.
        intermediates: Dense inputs of computed tensors: name -> the step that gives it.
    """

    source: str
    format: str
    files: tuple[SourceFile, ...]
    layers: tuple[LayerPlan, ...]
    steps: tuple[Step, ...]
    shards: tuple[OutputShard, ...]
    config: Mapping[str, Any]
    quantization: PerLayerQuantization | None
    side_files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    layout: str = "keep"
    loads: bool = False
    rotated: bool = False
    load_error: str = ""
    repository: tuple[str, str] | None = None
    side_bytes: int = 0
    intermediates: Mapping[str, Step] = field(default_factory=dict)

    @property
    def is_one_file(self) -> bool:
        """Whether the output is a file, the only shard, and no folder."""
        return any(shard.lead for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Number of logical weights, however they are stored."""
        return sum(prod(layer.shape) for layer in self.layers)

    @property
    def bytes_in(self) -> int:
        """Bytes of tensor data to read."""
        return sum(step.bytes_in for step in self.steps)

    @property
    def bytes_out(self) -> int:
        """Bytes of tensor data to write."""
        return sum(t.info.nbytes for shard in self.shards for t in shard.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output per logical weight, scales and biases included."""
        return 8 * self.bytes_out / self.parameters if self.parameters else 0.0

    @property
    def bits_per_weight_in(self) -> float:
        """Bits of the source per logical weight, counted as ``bits_per_weight`` counts them."""
        return 8 * self.bytes_in / self.parameters if self.parameters else 0.0

    def index(self) -> dict[str, Any]:
        """The ``model.safetensors.index.json`` of the output."""
        names = {t.name: shard.name for shard in self.shards for t in shard.tensors}
        return {
            "metadata": {"total_size": self.bytes_out, "total_parameters": self.parameters},
            "weight_map": dict(sorted(names.items())),
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as JSON data."""
        return {
            key: list(value.make()) if isinstance(value, Rows) else value
            for key, value in self.document().items()
        }

    def document(self) -> dict[str, Any]:
        """The same with its long lists as ``Rows``, to be written in pieces."""
        content = self._content()
        return {
            "source": self.source,
            "format": self.format,
            "layout": self.layout,
            "loads": self.loads,
            "hash": _hash(content),
            "parameters": self.parameters,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "notes": [note.text for note in self.notes],
            **content,
        }

    def _content(self) -> dict[str, Any]:
        return {
            "files": [as_data(file) for file in self.files],
            "layers": Rows(lambda: (layer.to_dict() for layer in self.layers)),
            "steps": Rows(lambda: map(_step_dict, self.steps)),
            "intermediates": {name: _step_dict(step) for name, step in self.intermediates.items()},
            "shards": Rows(lambda: map(_shard_dict, self.shards)),
            "config": dict(self.config),
            "side_files": list(self.side_files),
            "left_out": [list(pair) for pair in self.left_out],
            "dropped": [list(pair) for pair in self.dropped],
        }

    @property
    def hash(self) -> str:
        """SHA-256 over all that decides the output's bytes; not over the source's path.

        It is computed each time: a caller that needs it twice keeps it.
        """
        return _hash(self._content())


def _hash(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for piece in compact_pieces(content):
        digest.update(piece.encode())
    return digest.hexdigest()


def _shard_dict(shard: OutputShard) -> dict[str, Any]:
    tensors = [as_data(tensor) for tensor in shard.tensors]
    names = {} if shard.names_of == "mlx" else {"names_of": shard.names_of}
    if shard.lead:
        names["lead"] = hashlib.sha256(shard.lead).hexdigest()
    return {"name": shard.name, "nbytes": shard.nbytes, "tensors": tensors, **names}


def _step_dict(step: Step) -> dict[str, Any]:
    return {
        "layer": step.layer,
        "operation": step.operation,
        "rows": step.rows.count,
        "columns": step.rows.columns,
        "inputs": {role: as_data(t) for role, t in step.inputs.items()},
        "outputs": {role: t.name for role, t in step.outputs.items()},
        "source": step.source and step.source.to_dict(),
        "target": step.target and step.target.to_dict(),
        "dtype": step.dtype,
        "global_scale": step.global_scale and as_data(step.global_scale),
        "packing": step.packing and step.packing.to_dict(),
        "first_row": step.rows.first,
        "output_row": step.rows.output_row,
        "row_step": step.rows.step,
        "search": step.search,
        "row_order": step.rows.order and step.rows.order.digest,
        **({"importance": step.importance.to_dict()} if step.importance else {}),
        **({"estimate": step.estimate} if step.estimate else {}),
        **({"gptq": True} if step.gptq else {}),
    }


def _header(tensors: Iterable[OutputTensor], names_of: str) -> tuple[bytes, dict[str, int]]:
    return build_header({t.name: t.info for t in tensors}, {"format": names_of})
