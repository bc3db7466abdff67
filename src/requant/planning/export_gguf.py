"""Plan an export to a GGUF file: every layer as blocks that hold its codes, or as plain numbers.

Names, order of rows and metadata are those of llama.cpp's converter; ``gguf.architectures`` has
them for both directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS, TensorInfo
from requant.core.reasons import Note, NoteCode, Reason, ReasonCode
from requant.errors import CheckpointError, Problem
from requant.formats import SourceLayer
from requant.formats.base import describe_encoding
from requant.formats.stale_blocks import read_source
from requant.formats.widening import stored_rows
from requant.gguf.architectures import Architecture
from requant.gguf.config_metadata import WRITTEN, Described, describe
from requant.gguf.families import written_family_of
from requant.gguf.tokenizer_metadata import (
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    NotWritable,
    tokenizer_metadata,
)
from requant.gguf.writer import Value, WrittenTensor, build_header
from requant.kernels.gguf import BY_NAME, BlockType
from requant.packings.base import EXACT, Exactness, Fidelity, Packing, rounded
from requant.packings.coded_matrix import CodedMatrix
from requant.packings.gguf_blocks import BLOCK, BlockRows, Constant, EncodedRows, ValueRows
from requant.planning.export_zeros import read_halves
from requant.planning.plan import (
    LayerPlan,
    Operation,
    OutputShard,
    OutputTensor,
    Plan,
    RowMapping,
    Step,
    Treatment,
)
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned
from requant.quantization.config import QuantMode
from requant.quantization.export_options import ExportOptions, Otherwise
from requant.text import format_value, pluralize_are

_FILE: Final = "model.gguf"  # while it grows; then it has the name of OUTPUT
_SMALL_ROLES: Final = ("ffn_gate_inp.", "ffn_gate_inp_shexp.")  # F32, as vectors and biases are
_FILE_TYPES: Final = {  # most frequent type of matrices -> general.file_type
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32},
    "MXFP4": 38,
}
_QUANTIZATION_VERSION: Final = 2
_ADVICE = "--otherwise widen encodes it again as Q8_0, --otherwise dense decodes"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file, and what makes it."""

    layer: SourceLayer
    name: str
    kind: BlockType
    packing: Packing
    treatment: Treatment
    fidelity: Fidelity
    reason: Reason | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file says it: the gate of a shared expert, one row, is a vector."""
        shape = self.layer.shape
        return shape[1:] if ".ffn_gate_inp_shexp." in self.name else shape

    @property
    def info(self) -> TensorInfo:
        """As rows of numbers, or of bytes of blocks."""
        if self.kind.dtype:
            return TensorInfo(self.kind.dtype, self.layer.shape)
        *leading, columns = self.layer.shape
        return TensorInfo("U8", (*leading, columns // self.kind.elements * self.kind.nbytes))


def plan_gguf(checkpoint: Checkpoint, options: ExportOptions, name: str) -> Planned:
    """Plan the export of a checkpoint to a GGUF file; scales and biases of its layers are read.

    Args:
        checkpoint: The source.
        options: What becomes of layers whose codes no block holds.
        name: The model's, ``general.name``.

    Raises:
        CheckpointError: With all problems of the source, and every layer, setting and tokenizer
            that the file cannot hold.
    """
    read = read_source(checkpoint)
    source, layout = read.checkpoint, read.layout
    problems = list(layout.problems)
    if not problems and source.opened.damaged:
        problems += source.opened.damaged.values()
    found = written_family_of(str(source.config.get("model_type")))
    if found is None or source.config.get("model_type") not in _known(found[1]):
        kind = source.config.get("model_type")
        message = f"is {format_value(kind)}, of which no GGUF file is written"
        message = f"{message}; known are {', '.join(WRITTEN)}"
        problems.append(Problem("config.json: model_type", message))
    if problems or found is None:
        raise CheckpointError(str(source.source), problems, "exported")
    work = _Export(source, *found, options.otherwise)
    tensors = list(work.tensors(layout.layers))
    if work.problems:  # then shapes are missing with which the metadata agree
        raise CheckpointError(str(source.source), work.problems, "exported")
    metadata, factors = work.metadata(tensors, name)
    if work.problems:
        raise CheckpointError(str(source.source), work.problems, "exported")
    steps = [work.step(tensor) for tensor in tensors] + [_constant(*x) for x in factors.items()]
    shard, placed = _placed(metadata, tensors, factors, steps)
    plan = Plan(
        source=str(source.source),
        format=read.format,
        files=source.files,
        layers=tuple(_layer_plan(tensor) for tensor in tensors),
        steps=placed,
        shards=(shard,),
        config={},
        quantization=None,
        side_files=(),
        left_out=source.left_out,
        notes=(*source.notes, *layout.notes, *work.notes),
        dropped=(*layout.dropped, *work.dropped),
        repository=source.repository,
    )
    return Planned(plan, PlanSource(source))


def _known(family: Architecture) -> tuple[str, ...]:
    also = ("mistral",) if family.model_type == "llama" else ()
    return (family.model_type, *also) if family.model_type in WRITTEN else ()


@dataclass
class _Export:
    """One export while it is planned."""

    source: Checkpoint
    architecture: str
    family: Architecture
    otherwise: Otherwise
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    # -- tensors -----------------------------------------------------------------------------

    def tensors(self, layers: tuple[SourceLayer, ...]) -> Iterator[_Tensor]:
        """The tensors of the file, in the order of the source."""
        taken: dict[str, str] = {}
        is_tied = bool(self.source.config.get("tie_word_embeddings"))
        for layer in layers:
            name = self.family.gguf_name_of(layer.dense_name)
            if name is None:
                self._report(layer, f"has no name in GGUF files of {self.architecture}")
            elif name == "output.weight" and is_tied:
                self.dropped.append((layer.dense_name, "config.json ties it to the embeddings"))
            elif name in taken:
                self._report(layer, f"would be {name}, as {taken[name]} is")
            else:
                taken[name] = layer.path
                yield from self._tensor(layer, name)

    def _report(self, layer: SourceLayer, message: str) -> None:
        self.problems.append(Problem(layer.path, message))

    def _tensor(self, layer: SourceLayer, name: str) -> Iterator[_Tensor]:
        heads = self._heads(layer, name)
        matrix = layer.shape[-2] if len(layer.shape) > 1 else 1
        if heads and (matrix if len(layer.shape) > 1 else layer.shape[-1]) % (2 * heads):
            self._report(layer, f"{list(layer.shape)} is not a multiple of twice {heads} heads")
            return
        if len(layer.shape) not in (1, 2, 3):
            self._report(layer, f"has the shape {list(layer.shape)}, known are 1, 2 or 3 axes")
            return
        is_small = name.endswith(".bias") or any(f".{x}" in name for x in _SMALL_ROLES)
        is_vector = is_small or len(layer.shape) == 1
        if is_vector or not layer.is_quantized:
            reason = None
            if layer.is_quantized:
                text = "a router, which llama.cpp takes in float32"
                reason = Reason(ReasonCode.DENSE_FOR_READERS, text)
            yield self._dense(layer, name, heads, "F32" if is_vector else layer.dtype, reason)
            return
        head = matrix // heads if heads else 1
        why = self._why_no_codes(layer)
        if not why:
            kept = self._kept(layer, name, head)
            if isinstance(kept, _Tensor):
                yield kept
                return
            why = kept
        reason = Reason(ReasonCode.NOT_IN_FORMAT, why)
        if self.otherwise is Otherwise.DENSE:
            yield self._dense(layer, name, heads, layer.dtype, reason)
        elif self.otherwise is Otherwise.WIDEN and layer.shape[-1] % BLOCK == 0:
            packing = EncodedRows(self._rows(layer), head)
            fidelity = Fidelity(Exactness.REENCODED)
            kind = BY_NAME["Q8_0"]
            done = Treatment.REQUANTIZED
            yield _Tensor(
                layer, name, kind, packing, treatment=done, fidelity=fidelity, reason=reason
            )
        else:
            self._report(layer, f"{why}; {_ADVICE}")

    def _heads(self, layer: SourceLayer, name: str) -> int:
        """Heads whose rows change places; 0 where none do."""
        config = self.source.config
        if not self.family.permuted or ".attn_" not in name:
            return 0
        heads = int(config.get("num_attention_heads") or 0)
        role = name.split(".")[-2]
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return {"attn_q": heads, "attn_k": kv_heads}.get(role, 0)

    def _rows(self, layer: SourceLayer) -> Packing:
        return layer.packing or stored_rows(layer)

    def _dense(
        self, layer: SourceLayer, name: str, heads: int, dtype: str, reason: Reason | None
    ) -> _Tensor:
        is_matrix = len(layer.shape) > 1
        rows = self._rows(layer)
        if not is_matrix and layer.packing is None:
            rows = replace(rows, rows=1, columns=layer.shape[0])  # type: ignore[type-var]
        packing = ValueRows(
            rows,
            layer.shape[-2] // heads if heads and is_matrix else 1,
            shift=self.family.is_shifted(name),
            vector_heads=heads if not is_matrix else 0,
        )
        if "global_scale" in layer.parts or dtype not in FLOATS:
            self._report(layer, f"{layer.stored_as} is not decoded to GGUF")
        treatment = Treatment.DEQUANTIZED if layer.is_quantized else Treatment.DENSE
        fidelity = rounded("values", dtype)
        wide = dtype == "F32" or dtype == layer.dtype
        if not layer.is_quantized and layer.packing is None and wide and not packing.shift:
            fidelity = EXACT
        return _Tensor(
            layer,
            name,
            BY_NAME[dtype],
            packing,
            treatment=treatment,
            fidelity=fidelity,
            reason=reason,
        )

    def _why_no_codes(self, layer: SourceLayer) -> str:
        """Why no block can hold the codes of a layer, by what headers say."""
        codes = layer.encoding
        if codes is None or layer.rotation_tensors:
            known = layer.policy.reason
            text = "its codes are none of MLX's" if known is None else known.text
            return f"{layer.stored_as}: {text}"
        if codes.mode not in (QuantMode.AFFINE, QuantMode.MXFP4):
            return f"its mode is {codes.mode}, blocks of GGUF hold affine and mxfp4"
        return ""

    def _kept(self, layer: SourceLayer, name: str, head: int) -> _Tensor | str:
        """The tensor with a layer's codes, or why no type holds them."""
        codes = layer.encoding
        assert codes is not None
        rows, columns = prod(layer.shape[:-1]), layer.shape[-1]
        matrix = CodedMatrix(rows, columns, codes, layer.packing)
        fidelity, kind = EXACT, "MXFP4"
        if codes.mode is QuantMode.AFFINE:
            groups = read_halves(self.source, layer)
            if groups.nonfinite:
                message = f"{pluralize_are(groups.nonfinite, 'scale or bias')} NaN or infinite"
                self._report(layer, f"{message}. Take the file from its publisher again")
                return message
            best = groups.best(codes.bits)
            if best is None:
                return _why_no_type(codes.bits)
            kind, steps = best
            if steps:
                bound = (
                    f"scales and biases rounded to float16, at most {steps:.1g} steps of a value"
                )
                fidelity = Fidelity(Exactness.ROUNDED, bound)
        block = BY_NAME[kind]
        packing = BlockRows(matrix, block.number, layer.shape[-2], head)
        return _Tensor(layer, name, block, packing, treatment=Treatment.KEPT, fidelity=fidelity)

    # -- metadata ----------------------------------------------------------------------------

    def metadata(
        self, tensors: list[_Tensor], name: str
    ) -> tuple[dict[str, Value], Mapping[str, tuple[float, ...]]]:
        """The metadata, and the tensors that are settings."""
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        described, problems = describe(self.source.config, self.architecture, self.family, shapes)
        self.problems += problems
        return self._values(tensors, described, name), described.factors

    def _values(self, tensors: list[_Tensor], described: Described, name: str) -> dict[str, Value]:
        nbytes = Counter[str]()
        for tensor in tensors:
            if len(tensor.shape) > 1:
                nbytes[tensor.kind.name] += tensor.info.nbytes
        most = max(nbytes, key=nbytes.__getitem__, default="F32")
        general: dict[str, Value] = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": name,
            "general.file_type": _FILE_TYPES[most],
            "general.quantization_version": _QUANTIZATION_VERSION,
        }
        return general | dict(described.values) | self._tokenizer(tensors)

    def _tokenizer(self, tensors: list[_Tensor]) -> dict[str, Value]:
        embeddings = next((x for x in tensors if x.name == "token_embd.weight"), None)
        if embeddings is None:
            return {}
        files = {name: self._side_file(name) for name in (TOKENIZER, SETTINGS, TEMPLATE)}
        given = {name: data for name, data in files.items() if data is not None}
        if TOKENIZER not in given:
            text = f"The source has no {TOKENIZER}: llama.cpp takes numbers of tokens, but no text."
            self.notes.append(Note(NoteCode.NO_TOKENIZER, text))
        try:
            return tokenizer_metadata(given, self.source.config, embeddings.shape[0])
        except (NotWritable, KeyError, TypeError, ValueError, AttributeError) as error:
            known = isinstance(error, NotWritable)
            message = str(error) if known else f"is not one of tokenizers ({format_value(error)})"
            self.problems.append(Problem(TOKENIZER, message))
            return {}

    def _side_file(self, name: str) -> bytes | None:
        generated = self.source.opened.generated_files.get(name)
        if generated is not None:
            return generated()
        return (self.source.path / name).read_bytes() if name in self.source.side_files else None

    # -- steps -------------------------------------------------------------------------------

    def step(self, tensor: _Tensor) -> Step:
        """The step that writes a tensor."""
        packing = tensor.packing
        roles = packing.required_rects(0, min(packing.row_unit, packing.rows))
        return Step(
            layer=tensor.layer.path,
            operation=Operation.EXPORT,
            rows=RowMapping(count=packing.rows, columns=packing.columns),
            inputs={role: tensor.layer.parts[role] for role in roles},
            outputs={"weight": OutputTensor(tensor.name, tensor.info)},
            dtype=tensor.info.dtype,
            packing=packing,
        )


def _why_no_type(bits: int) -> str:
    if bits > 5:
        return (
            f"its {bits}-bit groups have biases; Q8_0 has none, and holds codes whose zero point "
            "is a whole number that leaves them between -128 and 127"
        )
    return f"its {bits}-bit groups have scales or biases beyond float16, in which blocks have them"


def _constant(name: str, numbers: tuple[float, ...]) -> Step:
    return Step(
        layer=name.removesuffix(".weight"),
        operation=Operation.EXPORT,
        rows=RowMapping(count=1, columns=len(numbers)),
        inputs={},
        outputs={"weight": OutputTensor(name, TensorInfo("F32", (len(numbers),)))},
        dtype="F32",
        packing=Constant(numbers),
    )


def _placed(
    metadata: Mapping[str, Value],
    tensors: list[_Tensor],
    factors: Mapping[str, tuple[float, ...]],
    steps: list[Step],
) -> tuple[OutputShard, tuple[Step, ...]]:
    """The file with its header, and the steps with their places in it."""
    table = [WrittenTensor(x.name, x.kind.number, x.shape, x.info.nbytes) for x in tensors]
    plain = BY_NAME["F32"].number
    table += [WrittenTensor(x, plain, (len(n),), 4 * len(n)) for x, n in factors.items()]
    lead, offsets = build_header(metadata, table)
    done = []
    for step in steps:
        tensor = step.outputs["weight"]
        placed = replace(tensor, file=_FILE, offset=offsets[tensor.name])
        done.append(replace(step, outputs={"weight": placed}))
    outputs = tuple(step.outputs["weight"] for step in done)
    last = outputs[-1]
    nbytes = last.offset + last.info.nbytes
    return OutputShard(_FILE, nbytes + -nbytes % BLOCK, outputs, "gguf", lead), tuple(done)


def _layer_plan(tensor: _Tensor) -> LayerPlan:
    layer = tensor.layer
    return LayerPlan(
        layer=layer.path,
        shape=layer.shape,
        source=layer.stored_as if layer.is_quantized else describe_encoding(None, layer.dtype),
        target=tensor.kind.name,
        treatment=tensor.treatment,
        exactness=tensor.fidelity.exactness,
        nbytes=tensor.info.nbytes,
        is_weight=layer.is_weight,
        reason=tensor.reason,
        bound=tensor.fidelity.bound,
    )


def model_name(source: Path, config: Mapping[str, Any]) -> str:
    """The name of a model: what its config calls it, else that of its folder or file."""
    known = config.get("_name_or_path")
    return str(known).rstrip("/").rpartition("/")[2] if known else source.stem or "model"
