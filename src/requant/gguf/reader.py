"""Pipeline stage 1 for GGUF: a file, its parts, or a folder with one model -> Checkpoint.

Only headers are read, and the few small tensors that are settings. Config and tokenizer come
from the metadata, or from the folder of the original model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from requant.checkpoints.byte_ranges import FileRange, ReadRanges
from requant.checkpoints.checkpoint import Checkpoint, OpenedSource, SourceFile
from requant.checkpoints.folder_files import CONFIG, decode_filename, file_size
from requant.checkpoints.folder_listing import list_folder
from requant.checkpoints.safetensors_folder import read_config
from requant.core.limits import MAX_SHARDS
from requant.core.reasons import Note, NoteCode
from requant.errors import CheckpointError, Problem
from requant.gguf.architectures import Architecture
from requant.gguf.families import family_of
from requant.gguf.file_selection import PART, SUFFIX, WITHOUT
from requant.gguf.header import Header, TableEntry, read_header
from requant.gguf.metadata import Metadata
from requant.gguf.mmproj import VisionPart, choose_mmproj, is_mmproj
from requant.gguf.model_config import make_config
from requant.gguf.naming import Naming
from requant.gguf.settings import Settings
from requant.gguf.tokenizer import Files, guessed_splitting, missing_templates, tokenizer_files
from requant.text import format_value, join_first

_MMPROJ = "a vision or audio part for llama.cpp (mmproj), which is not a language model"
_MAX_SETTING_BYTES = 1 << 20
_MAX_NAMED = 20
_QUANTIZATION_VERSION = 2
_OTHER_KINDS = {  # general.type -> what it is
    "adapter": "a LoRA adapter; merge it into its model first (llama.cpp: llama-export-lora "
    "-m MODEL.gguf --lora THIS.gguf -o MERGED.gguf) and convert MERGED.gguf",
    "imatrix": "an importance matrix, which is not a model",
}


def read_gguf(
    source: Path,
    config_from: Path | None = None,
    fetch: ReadRanges | None = None,
    mmproj: str | None = None,
) -> Checkpoint:
    """Read a GGUF model up to its data, with the vision part next to it.

    ``source`` is a file, any part of a split one, or a folder with one model. Config and tokenizer
    are those of the folder ``config_from``, else of the metadata. ``fetch`` reads what lies behind
    the headers, where the files hold nothing else. ``mmproj``
    is the file with the vision part, "none" for the language model alone, or None for the one next
    to it, if there is one.

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
    others = {path.name for path in folder.iterdir()} - set(names) if mmproj != WITHOUT else ()
    part = choose_mmproj(others, _name_in(folder, mmproj), str(source))
    left_out = () if is_file else tuple(_left_out(folder, [*names, *([part] if part else [])]))
    reading = _Reading(source, folder, headers, config_from, fetch=fetch, mmproj=part)
    return reading.checkpoint(left_out)


def _name_in(folder: Path, file: str | None) -> str | None:
    """The name of a file of a folder that is given by its path, or by its name alone."""
    if file is None or Path(file).name == file:
        return file
    return Path(file).name if Path(file).resolve().parent == folder.resolve() else file


def _parts_of(name: str) -> list[str]:
    """All files of a split model, from the name of any."""
    match = PART.fullmatch(name)
    if match is None or not 0 < int(match[3]) <= MAX_SHARDS:
        return [name]
    return [f"{match[1]}-{n:05d}-of-{match[3]}.gguf" for n in range(1, int(match[3]) + 1)]


def _choose(folder: Path) -> list[str]:
    """The files of the one model of a folder; a CheckpointError if there is none, or more."""
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
    first = [decode_filename(name) for name in models.values()]
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
    fetch: ReadRanges | None = None
    mmproj: str | None = None

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Note] = []
        self.first = self.headers[0]
        self.metadata = Metadata(self.first.file, self.first.metadata)

    def checkpoint(self, left_out: tuple[tuple[str, str], ...]) -> Checkpoint:
        if is_mmproj(self.first.metadata):
            message = f"is {_MMPROJ}; give the file of the model"
            raise CheckpointError(str(self.source), [Problem(self.first.file, message)])
        kind = _OTHER_KINDS.get(self.metadata.word("general.type"))
        if kind is not None:
            raise CheckpointError(str(self.source), [Problem(self.first.file, f"is {kind}")])
        if not self.metadata.architecture:
            self.metadata.report("general.architecture", "is missing, or no string")
        self._check_parts()
        self._check_version()
        table = {t.name: (header.file, t) for header in self.headers for t in header.tensors}
        if not table:
            vocabulary = len(self.metadata.words("tokenizer.ggml.tokens"))
            message = f", only a vocabulary of {vocabulary:,} tokens" if vocabulary else ""
            self.problems.append(Problem(self.first.file, f"holds no tensors{message}"))
            raise CheckpointError(str(self.source), self.problems)
        family = family_of(self.metadata)
        vision = VisionPart(self.folder, self.mmproj, self.metadata) if self.mmproj else None
        naming = Naming(self.metadata, family)
        tensors, model = naming.name_all(table)
        self.problems += naming.problems
        self.notes += naming.notes
        config, files = self._config_and_files(table, family, model.dtype)
        headers = self.headers
        if vision is not None:
            pair = vision.pair(tensors, model, config, files, is_taken=self.config_from is not None)
            tensors, model, config, files = pair.tensors, pair.model, pair.config, pair.files
            self.problems += vision.problems
            self.notes += vision.notes
            headers = [*headers, vision.header]
        self.problems += self.metadata.problems
        if self.problems:
            raise CheckpointError(str(self.source), self.problems)
        return Checkpoint(
            files=tuple(SourceFile(h.file, h.nbytes, h.sha256) for h in headers),
            tensors=MappingProxyType(tensors),
            config=config,
            config_text=json.dumps(config),
            side_files=(),
            left_out=left_out,
            gguf=replace(model, notes=tuple(self.notes)),
            origin=self.source,
            opened=OpenedSource(self.folder, fetch=self.fetch, generated_files=files),
        )

    def _report(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    def _check_parts(self) -> None:
        """Hold the parts of a split model against each other."""
        if len(self.headers) == 1 and not self.metadata.find_int("split.count"):
            return
        count = self.metadata.find_int("split.count")
        if count != len(self.headers):
            parts = "is missing" if count is None else f"says that the model has {count:,} parts"
            self._report(
                f"{self.first.file}: split.count",
                f"{parts}, found {len(self.headers):,}; the parts of a model lie in one folder and "
                "end in -00001-of-00003.gguf and so on",
            )
        for number, header in enumerate(self.headers):
            declared = header.metadata.get("split.no")
            if declared != number:
                message = f"says that it is part {format_value(declared)}, its place is {number}"
                self._report(f"{header.file}: split.no", message)
        total = self.metadata.find_int("split.tensors.count")
        held = sum(len(header.tensors) for header in self.headers)
        if total is not None and total != held:
            message = f"says that there are {total:,} tensors, found {held:,}"
            self._report(f"{self.first.file}: split.tensors.count", message)
        twice = Counter(t.name for header in self.headers for t in header.tensors)
        for header in self.headers[1:]:
            for tensor in header.tensors:
                if twice[tensor.name] > 1:
                    self._report(f"{header.file}: {tensor.name}", "is in another part too")

    def _check_version(self) -> None:
        """Report another version of the layout of blocks, which changed twice before GGUF."""
        version = self.metadata.find_int("general.quantization_version")
        has_blocks = any(not t.kind.dtype for header in self.headers for t in header.tensors)
        if version not in (None, _QUANTIZATION_VERSION) and has_blocks:
            message = (
                f"is {version}, known is {_QUANTIZATION_VERSION}: blocks may be laid out "
                "otherwise; quantize the model again with llama.cpp"
            )
            self.metadata.report("general.quantization_version", message)

    # -- config and tokenizer --------------------------------------------------------------

    def _config_and_files(
        self, table: Mapping[str, tuple[str, TableEntry]], family: Architecture | None, dtype: str
    ) -> tuple[dict[str, Any], Files]:
        if self.config_from is not None:
            return self._taken(self.config_from)
        words = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        files, why = tokenizer_files(self.metadata)
        if why:
            text = f"No tokenizer is written: {why}. --config-from takes one."
            self.notes.append(Note(NoteCode.NO_TOKENIZER, text))
        elif guessed_splitting(self.metadata):
            text = (
                "The file does not say how its tokenizer splits words (tokenizer.ggml.pre): "
                "GPT-2's rule is taken. --config-from takes the original tokenizer."
            )
            self.notes.append(Note(NoteCode.GUESSED_PRETOKENIZER, text))
        elif missing := missing_templates(self.metadata):
            text = f"The chat templates {join_first(missing)} are listed, but not in the file."
            self.notes.append(Note(NoteCode.MISSING_CHAT_TEMPLATES, text))
        if family is None:
            return {"model_type": self.metadata.architecture, "torch_dtype": words[dtype]}, files
        shapes = {name: entry.shape for name, (_, entry) in table.items()}
        read = partial(self._read_scalar, table)
        settings = Settings(self.metadata, shapes, read, family.support)
        config = make_config(settings, family.model_type, family.cls, family.configure)
        self.notes += settings.notes
        config["torch_dtype"] = words[dtype]
        return config, files

    def _taken(self, folder: Path) -> tuple[dict[str, Any], Files]:
        """Config and side files of the original model; for a language model alone the text's."""
        config, side_files = read_config(folder)
        text = None if self.mmproj else config.get("text_config")
        if isinstance(text, dict) and text.get("model_type"):
            inherited = ("tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id")
            config = {key: config[key] for key in inherited if key in config} | text
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
        return config, {name: (folder / name).read_bytes for name in side_files}

    def _read_scalar(self, table: Mapping[str, tuple[str, TableEntry]], name: str) -> np.ndarray:
        """Values of a tensor that is a setting."""
        file, entry = table[name]
        if entry.kind.name != "F32" or entry.nbytes > _MAX_SETTING_BYTES:
            message = f"{entry.kind.name} {list(entry.shape)}, expected a short vector of F32"
            self._report(f"{file}: {name}", message)
            return np.ones(1, np.float32)
        part = FileRange(file, entry.offset, entry.nbytes)
        opened = OpenedSource(self.folder, fetch=self.fetch)
        return np.frombuffer(opened.read_range(part), np.float32)
