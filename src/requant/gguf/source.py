"""Step 1 of the road for GGUF: a file, its parts, or a folder with one model -> Checkpoint.

Only headers are read, and the few small tensors that are settings. Config and tokenizer come
from the metadata, or from the folder of the original model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from requant.checkpoint import Checkpoint, FileRange, SourceFile, StoredTensor
from requant.dtypes import TensorInfo
from requant.errors import CheckpointError, Problem, count, few
from requant.gguf.choice import PART, SUFFIX
from requant.gguf.configs import Settings, make_config
from requant.gguf.families import Family, family_of, setting_of
from requant.gguf.header import Header, TableEntry, read_header
from requant.gguf.metadata import Metadata
from requant.gguf.tokenizer import Files, guessed_splitting, tokenizer_files
from requant.gguf_model import GgufModel, GgufTensor
from requant.limits import MAX_SHARDS
from requant.safetensors_folder import read_config
from requant.source_folder import CONFIG, file_size, printable
from requant.source_listing import list_folder

_MMPROJ = "a vision or audio part for llama.cpp (mmproj), which is no language model"
_MAX_SETTING_BYTES = 1 << 20
_MAX_NAMED = 20
_OTHER_KINDS = {  # general.type -> what it is
    "adapter": "a LoRA adapter; merge it into its model first (llama.cpp: llama-export-lora "
    "-m MODEL.gguf --lora THIS.gguf -o MERGED.gguf) and convert MERGED.gguf",
    "imatrix": "an importance matrix, which is no model",
}


def read_gguf(
    source: Path,
    config_from: Path | None = None,
    fetch: Callable[[FileRange], bytes] | None = None,
) -> Checkpoint:
    """Read a GGUF model up to its data.

    Args:
        source: A file, any part of a split one, or a folder with one model.
        config_from: A folder whose config.json and tokenizer files are taken instead of what
            the metadata say.
        fetch: Reads what lies behind the headers, where the files hold nothing else.

    Raises:
        CheckpointError: With everything that is wrong with it.
    """
    is_file = not source.is_dir()
    folder = source.parent if is_file else source
    names = _parts_of(source.name) if is_file else _choose(folder)
    headers: list[Header] = []
    problems: list[Problem] = []
    for name in names:
        size, message = file_size(folder, name)
        if message:
            problems.append(Problem(name, message))
            continue
        header, wrong = read_header(folder, name, size)
        problems += wrong
        if header is not None:
            headers.append(header)
    if problems or not headers:
        raise CheckpointError(str(source), problems)
    left_out = () if is_file else tuple(_left_out(folder, names))
    reading = _Reading(source, folder, headers, config_from, fetch)
    return reading.checkpoint(left_out)


def is_mmproj(metadata: Mapping[str, Any]) -> bool:
    """Whether a file holds what llama.cpp runs beside a model, for images and sound."""
    return metadata.get("general.architecture") == "clip" or (
        metadata.get("general.type") == "mmproj"
    )


def _parts_of(name: str) -> list[str]:
    """All files of a split model, from the name of any."""
    match = PART.fullmatch(name)
    if match is None or not 0 < int(match[3]) <= MAX_SHARDS:
        return [name]
    return [f"{match[1]}-{n:05d}-of-{match[3]}.gguf" for n in range(1, int(match[3]) + 1)]


def _choose(folder: Path) -> list[str]:
    """The files of the one model of a folder.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix == SUFFIX)
    models: dict[str, str] = {}
    for name in names:
        match = PART.fullmatch(name)
        if "mmproj" not in name.lower() and not _is_mmproj_file(folder, name):
            models.setdefault(match[1] if match else name, name)
    if len(models) == 1:
        return _parts_of(next(iter(models.values())))
    if not models:
        raise CheckpointError(str(folder), [Problem(names[0], f"is {_MMPROJ}")])
    first = [printable(name) for name in models.values()]
    more = f" and {len(first) - _MAX_NAMED} more" if len(first) > _MAX_NAMED else ""
    message = (
        f"holds {len(first)} GGUF models ({', '.join(first[:_MAX_NAMED])}{more}); "
        f"give the one that you want, as {folder / first[0]}"
    )
    raise CheckpointError(str(folder), [Problem(str(folder), message)])


def _is_mmproj_file(folder: Path, name: str) -> bool:
    size, message = file_size(folder, name)
    header = None if message else read_header(folder, name, size)[0]
    return header is not None and is_mmproj(header.metadata)


def _left_out(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Everything else in the folder; a GGUF file brings its own config and tokenizer."""
    listing = list_folder(folder, set(names))
    for name in (*listing.weights, *listing.side_files):
        yield name, "the GGUF file has its own; --config-from takes those of a folder"
    for name, reason in listing.left_out:
        if name not in names:
            yield name, _MMPROJ if "mmproj" in name.lower() else reason
    if (folder / CONFIG).exists():
        yield CONFIG, "the GGUF file has its own; --config-from takes the one of a folder"


@dataclass
class _Reading:
    """One model while its parts are put together."""

    source: Path
    folder: Path
    headers: list[Header]
    config_from: Path | None
    fetch: Callable[[FileRange], bytes] | None = None

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.first = self.headers[0]
        self.metadata = Metadata(self.first.file, self.first.metadata)

    def checkpoint(self, left_out: tuple[tuple[str, str], ...]) -> Checkpoint:
        if is_mmproj(self.first.metadata):
            message = f"is {_MMPROJ}; give the file of the model"
            raise CheckpointError(str(self.source), [Problem(self.first.file, message)])
        kind = _OTHER_KINDS.get(self.metadata.word("general.type"))
        if kind is not None:
            problem = Problem(self.first.file, f"is {kind}")
            raise CheckpointError(str(self.source), [problem])
        if not self.metadata.architecture:
            self.metadata.report("general.architecture", "is missing, or no string")
        self._check_parts()
        table = {t.name: (header.file, t) for header in self.headers for t in header.tensors}
        if not table:
            vocabulary = len(self.metadata.words("tokenizer.ggml.tokens"))
            message = f", only a vocabulary of {vocabulary:,} tokens" if vocabulary else ""
            self.problems.append(Problem(self.first.file, f"holds no tensors{message}"))
            raise CheckpointError(str(self.source), self.problems)
        family = family_of(self.metadata)
        tensors, model = self._tensors(table, family)
        config, files = self._config_and_files(table, family, model.dtype)
        self.problems += self.metadata.problems
        if self.problems:
            raise CheckpointError(str(self.source), self.problems)
        return Checkpoint(
            path=self.folder,
            files=tuple(SourceFile(h.file, h.nbytes, h.sha256) for h in self.headers),
            tensors=MappingProxyType(tensors),
            config=config,
            config_text=json.dumps(config),
            side_files=(),
            left_out=left_out,
            made_files=files,
            gguf=GgufModel(
                model.architecture, model.tensors, model.dtype, model.dropped, tuple(self.notes)
            ),
            origin=self.source,
        )

    def _check_parts(self) -> None:
        """Hold the parts of a split model against each other."""
        if len(self.headers) == 1 and not self.metadata.find_int("split.count"):
            return
        count = self.metadata.find_int("split.count")
        if count != len(self.headers):
            message = f"says that the model has {count} parts, found {len(self.headers)}"
            self.problems.append(Problem(f"{self.first.file}: split.count", message))
        for number, header in enumerate(self.headers):
            said = header.metadata.get("split.no")
            if said != number:
                message = f"says that it is part {said}, its place is {number}"
                self.problems.append(Problem(f"{header.file}: split.no", message))
        total = self.metadata.find_int("split.tensors.count")
        held = sum(len(header.tensors) for header in self.headers)
        if total is not None and total != held:
            message = f"says that there are {total:,} tensors, found {held:,}"
            self.problems.append(Problem(f"{self.first.file}: split.tensors.count", message))
        twice = Counter(t.name for header in self.headers for t in header.tensors)
        for header in self.headers[1:]:
            for tensor in header.tensors:
                if twice[tensor.name] > 1:
                    message = "is in another part too"
                    self.problems.append(Problem(f"{header.file}: {tensor.name}", message))

    # -- tensors -------------------------------------------------------------------------

    def _tensors(
        self, table: Mapping[str, tuple[str, TableEntry]], family: Family | None
    ) -> tuple[dict[str, StoredTensor], GgufModel]:
        tensors: dict[str, StoredTensor] = {}
        stored: dict[str, GgufTensor] = {}
        dropped: list[tuple[str, str]] = []
        unknown: list[str] = []
        for name, (file, entry) in table.items():
            reason = setting_of(name) if family else None
            if reason is not None:
                dropped.append((name, reason))
                continue
            named = name if family is None else family.name_of(name)
            if named is None:
                unknown.append(name)
                named = name
            if named in tensors:
                message = f"would be named {named}, as {stored[named].name_in_file} is"
                self.problems.append(Problem(f"{file}: {name}", message))
                continue
            tensor = self._describe(entry, family, named)
            stored[named] = tensor
            info = _info(entry, tensor.shape)
            tensors[named] = StoredTensor(named, info, file, entry.offset)
        self._note_names(family, unknown)
        model = GgufModel(
            self.metadata.architecture,
            MappingProxyType(stored),
            _model_dtype(table.values(), family),
            tuple(dropped),
            (),
        )
        return tensors, model

    def _describe(self, entry: TableEntry, family: Family | None, named: str) -> GgufTensor:
        shape = entry.shape
        if named.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)  # the converter squeezes it
        if family is None:
            return GgufTensor(entry.kind, shape, entry.name)
        heads = family.heads_of(entry.name, self.metadata)
        rows = shape[-2] if entry.name.endswith(".weight") and len(shape) > 1 else shape[-1]
        if heads and rows % (2 * heads):
            message = f"has {count(rows, 'row')}, no multiple of twice its {count(heads, 'head')}"
            self.problems.append(Problem(entry.name, message))
            heads = 0
        return GgufTensor(entry.kind, shape, entry.name, heads, family.is_shifted(named))

    def _note_names(self, family: Family | None, unknown: Sequence[str]) -> None:
        if family is None:
            known = self.metadata.architecture
            self.notes.append(
                f"The architecture {known!r} is not known here: tensors keep the names of the GGUF "
                "file, in its order of rows, and config.json says little."
            )
        elif unknown:
            self.notes.append(
                f"{few(unknown)} have no name in Hugging Face's "
                f"{family.model_type}: they keep their own."
            )

    # -- config and tokenizer --------------------------------------------------------------

    def _config_and_files(
        self,
        table: Mapping[str, tuple[str, TableEntry]],
        family: Family | None,
        dtype: str,
    ) -> tuple[dict[str, Any], Files]:
        if self.config_from is not None:
            return self._taken(self.config_from)
        words = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        files, why = tokenizer_files(self.metadata)
        if why:
            self.notes.append(f"No tokenizer is written: {why}. --config-from takes one.")
        elif guessed_splitting(self.metadata):
            self.notes.append(
                "The file does not say how its tokenizer splits words (tokenizer.ggml.pre): "
                "GPT-2's rule is taken. --config-from takes the original tokenizer."
            )
        if family is None:
            return {"model_type": self.metadata.architecture, "torch_dtype": words[dtype]}, files
        shapes = {name: entry.shape for name, (_, entry) in table.items()}
        settings = Settings(self.metadata, shapes, partial(self._peek, table))
        config = make_config(settings, family.model_type, family.cls, family.configure)
        config["torch_dtype"] = words[dtype]
        return config, files

    def _taken(self, folder: Path) -> tuple[dict[str, Any], Files]:
        """Config and side files of the original model; of one with other parts the text's."""
        config, side_files = read_config(folder)
        text = config.get("text_config")
        if isinstance(text, dict) and text.get("model_type"):
            inherited = ("tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id")
            config = {key: config[key] for key in inherited if key in config} | text
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        return config, {name: (folder / name).read_bytes for name in side_files}

    def _peek(self, table: Mapping[str, tuple[str, TableEntry]], name: str) -> np.ndarray:
        """Values of a tensor that is a setting."""
        file, entry = table[name]
        if entry.kind.name != "F32" or entry.nbytes > _MAX_SETTING_BYTES:
            message = f"{entry.kind.name} {list(entry.shape)}, expected a short vector of F32"
            self.problems.append(Problem(f"{file}: {name}", message))
            return np.ones(1, np.float32)
        part = FileRange(file, entry.offset, entry.nbytes)
        empty = Checkpoint(self.folder, (), {}, {}, "", (), (), fetch=self.fetch)
        return np.frombuffer(empty.read_range(part), np.float32)


def _info(entry: TableEntry, shape: tuple[int, ...]) -> TensorInfo:
    """What is stored: numbers, or bytes of blocks."""
    if entry.kind.dtype:
        return TensorInfo(entry.kind.dtype, shape)
    rows = prod(shape[:-1])
    return TensorInfo("U8", (*shape[:-1], entry.nbytes // rows))


def _model_dtype(table: Any, family: Family | None) -> str:
    """The dtype of values: float16, as the scales of blocks are, unless it is too narrow."""
    if family is not None and family.wide:
        return "BF16"
    kinds = Counter[str]()
    for _, entry in table:
        if len(entry.shape) > 1:
            kinds[entry.kind.name] += entry.nbytes
    if "BF16" in kinds:
        return "BF16"
    return "F32" if set(kinds) == {"F32"} else "F16"
