"""A pair of GGUF files: the vision part (mmproj) next to its language model.

llama.cpp keeps what sees in a file of its own. Read together, both are one multimodal checkpoint
under Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from requant.checkpoints.checkpoint import JoinedTensor, StoredTensor
from requant.checkpoints.folder_files import file_size
from requant.checkpoints.gguf_tensors import GgufModel, GgufTensor
from requant.core.reasons import Note, NoteCode
from requant.errors import CheckpointError, Problem
from requant.gguf.file_selection import SUFFIX, WITHOUT, is_mmproj_name
from requant.gguf.header import read_header
from requant.gguf.metadata import Metadata
from requant.gguf.mmproj_config import pair_config
from requant.gguf.mmproj_families import PROJECTORS, VisionFamily, families_of
from requant.gguf.mmproj_naming import VisionNaming
from requant.gguf.mmproj_processor import named_tokens, processor_files
from requant.gguf.mmproj_settings import VisionSettings, report_unread
from requant.gguf.tokenizer import Files
from requant.text import format_value, join_first

_INSTEAD = f"--mmproj {WITHOUT} converts the language model alone"


def is_mmproj(metadata: Mapping[str, Any]) -> bool:
    """Whether a file holds what llama.cpp runs next to a model, for images and sound."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type")
    return architecture == "clip" or kind == "mmproj"


def choose_mmproj(names: Iterable[str], wanted: str | None, source: str) -> str | None:
    """The vision part among the files next to a model; None without one.

    Args:
        names: The files.
        wanted: ``--mmproj``: a file of these, ``none``, or None for the only one by its name.
        source: The model, for errors.

    Raises:
        CheckpointError: There are several, or not the one that is wanted.
    """
    if wanted == WITHOUT:
        return None
    files = sorted(name for name in names if name.endswith(SUFFIX))
    if wanted is not None:
        if wanted in files:
            return wanted
        message = f"is not a GGUF file next to {source}, where a vision part must lie"
        raise CheckpointError(source, [Problem(f"--mmproj {wanted}", message)])
    found = [name for name in files if is_mmproj_name(name)]
    if len(found) > 1:
        message = (
            f"has {len(found)} vision parts next to it ({', '.join(found)}): "
            f"choose with --mmproj {found[0]}; {_INSTEAD}"
        )
        raise CheckpointError(source, [Problem(source, message)])
    return found[0] if found else None


@dataclass(frozen=True)
class PairedModel:
    """What a vision part and its language model are together."""

    tensors: dict[str, StoredTensor | JoinedTensor]
    model: GgufModel
    config: dict[str, Any]
    files: Files


class VisionPart:
    """A vision part next to its language model.

    Args:
        folder: Of the files.
        name: The file.
        text: Metadata of the language model.

    Attributes:
        header: Of the file.
        metadata: Of the file.
        family: The multimodal model.
        problems: Of this part.
        notes: For the user.

    Raises:
        CheckpointError: The file cannot be read, or its kind is not known.
    """

    def __init__(self, folder: Path, name: str, text: Metadata) -> None:
        size, message = file_size(folder, name)
        problems = [Problem(name, message)] if message else []
        header, wrong = (None, problems) if message else read_header(folder, name, size)
        if header is None or wrong:
            raise CheckpointError(str(folder / name), wrong)
        self.header, self.text = header, text
        self.metadata = Metadata(name, header.metadata)
        self.family = self._family()
        self.problems: list[Problem] = []
        self.notes: list[Note] = []

    def _family(self) -> VisionFamily:
        key = "clip.projector_type"
        kind = self.metadata.word(key) or self.metadata.word("clip.vision.projector_type")
        if not kind and self.metadata.flag("clip.has_llava_projector"):
            kind = "mlp"  # before there were others
        if not is_mmproj(self.header.metadata):
            found = format_value(self.metadata.architecture)
            message = f"is {found}: it is not a vision part; {_INSTEAD}"
            raise self._error("general.architecture", message)
        families = families_of(kind, frozenset(entry.name for entry in self.header.tensors))
        if not families:
            message = f"is {format_value(kind)}, known are {', '.join(PROJECTORS)}; {_INSTEAD}"
            raise self._error(key, message)
        for family in families:
            if self.text.architecture in family.texts:
                return family
        texts = ", ".join(text for family in families for text in family.texts)
        message = (
            f"is {format_value(kind)}, which belongs to a language model of architecture {texts}, "
            f"not {format_value(self.text.architecture)}; {_INSTEAD}"
        )
        raise self._error(key, message)

    def _error(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(self.header.file, [Problem(f"{self.header.file}: {key}", message)])

    def pair(
        self,
        tensors: Mapping[str, StoredTensor | JoinedTensor],
        model: GgufModel,
        config: Mapping[str, Any],
        files: Files,
        *,
        is_taken: bool,
    ) -> PairedModel:
        """Both parts as one.

        Args:
            tensors: Of the language model, by their names alone.
            model: How they are stored.
            config: ``config.json`` of the language model, or of the whole where it is taken.
            files: Of the language model.
            is_taken: Whether config and files are those of a folder.
        """
        shapes = {entry.name: entry.shape for entry in self.header.tensors}
        settings = VisionSettings(self.metadata, shapes, self.family, self.text)
        naming = VisionNaming(
            self.header,
            self.family,
            heads=settings.need_int("attention.head_count"),
            width=settings.need_int("embedding_length"),
        )
        vision, stored = naming.name_all()
        self._check_blocks(settings)
        if not is_taken:
            config = pair_config(settings, config)
            files = {
                **files,
                **named_tokens(settings, files),
                **processor_files(settings, config),
            }
            report_unread(settings)
        rename = self.family.text_name
        renamed = {rename(name): replace(x, name=rename(name)) for name, x in tensors.items()}
        both: dict[str, GgufTensor] = {rename(name): x for name, x in model.tensors.items()}
        self.problems += [*naming.problems, *self.metadata.problems]
        kind = self.family.model_type
        text = f"{self.header.file} is read as the vision part of {kind}; {_INSTEAD}."
        if unused := list(naming.unused):
            text += f" It lacks {join_first(unused)}, which nothing is computed with: others of "
            text += "the same shape stand there."
        self.notes += [Note(NoteCode.VISION_PART, text), *settings.notes]
        return PairedModel(
            renamed | vision,
            replace(
                model,
                tensors=both | stored,
                dropped=(*model.dropped, *naming.dropped),
            ),
            dict(config),
            files,
        )

    def _check_blocks(self, settings: VisionSettings) -> None:
        """Each block that the file counts must be there."""
        count = settings.need_int("block_count")
        names = settings.shapes
        missing = next((n for n in range(count) if f"v.blk.{n}.ln1.weight" not in names), None)
        if missing is not None:
            message = f"is {count:,}, but block {missing:,} has no v.blk.{missing}.ln1.weight"
            settings.report("block_count", message)
