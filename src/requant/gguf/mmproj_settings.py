"""Metadata of a vision part (mmproj) next to those of its language model."""

from __future__ import annotations

import numpy as np

from requant.core.reasons import Note, NoteCode
from requant.gguf.metadata import Metadata
from requant.gguf.mmproj_families import VisionFamily
from requant.gguf.settings import ADVICE, Settings, Shapes

_CLIP = "clip."
_VISION = "clip.vision."
# Keys that change nothing of what these models compute -> why.
_NO_EFFECT = {
    **dict.fromkeys(("has_vision_encoder", "has_llava_projector", "projector_type"), ""),
    **dict.fromkeys(("vision.projector_type", "vision.mm_projector_type"), ""),
    **dict.fromkeys(("has_qwen2vl_merger", "use_rms_norm", "use_glu_mlp"), ""),  # by the tensors
    "vision.mm_patch_merge_type": "the model with image_newline has only the one",
    **dict.fromkeys(
        (
            "vision.image_aspect_ratio",
            "vision.image_crop_resolution",
            "vision.image_split_resolution",
            *("vision.image_min_pixels", "vision.image_max_pixels", "vision.preproc_image_size"),
            *("vision.preproc_min_tiles", "vision.preproc_max_tiles"),
        ),
        "the processor of this model has no such setting",
    ),
}


class VisionSettings(Settings):
    """Metadata of a vision part, and the model of its pair.

    Attributes:
        family: Its model.
        text: Settings of the language model.
    """

    def __init__(
        self, metadata: Metadata, shapes: Shapes, family: VisionFamily, text: Metadata
    ) -> None:
        super().__init__(metadata, shapes, lambda _: np.ones(1, np.float32))
        self.prefix = _VISION
        self.family, self.text = family, text

    @property
    def activation(self) -> str:
        """The function between the two matrices of a block."""
        if self.metadata.flag(f"{_CLIP}use_silu"):
            return "silu"
        return "gelu" if self.metadata.flag(f"{_CLIP}use_gelu") else "quick_gelu"

    @property
    def patches(self) -> int:
        """Patches along each side of an image."""
        return self.need_int("image_size") // self.need_int("patch_size")

    def token(self, text: str) -> int | None:
        """The number of a token of the language model."""
        tokens = self.text.words("tokenizer.ggml.tokens")
        return tokens.index(text) if text in tokens else None

    def size(self, name: str, axis: int) -> int:
        """The size of a tensor along an axis; 1 where it has none."""
        shape = self.shapes.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else 1

    def whole(self, key: str) -> list[int] | None:
        """An array of whole numbers, or None."""
        found = self.metadata.numbers(self.prefix + key)
        if found is None or found.dtype.kind not in "iu":
            return None
        return [int(x) for x in found]

    def floats(self, key: str) -> list[float]:
        """An array of numbers, in their shortest form as float32."""
        found = self.metadata.numbers(self.prefix + key)
        return [] if found is None else [float(str(np.float32(x))) for x in found]


def report_unread(settings: VisionSettings) -> None:
    """Make an error of every key of a vision part that nothing was made from."""
    metadata = settings.metadata
    ignored = []
    for key, value in metadata.values.items():
        name = key.removeprefix(_CLIP)
        if key in metadata.read or name == key:
            continue
        if name in _NO_EFFECT:
            ignored += [f"{key} ({_NO_EFFECT[name]})"] if _NO_EFFECT[name] else []
        elif not (isinstance(value, (bool, int, float)) and not value):  # off at zero
            metadata.report(
                key,
                f"is {metadata.shown(key)}: that may change what the model computes, and "
                f"config.json of model_type '{settings.family.model_type}' has no place for it; "
                f"{ADVICE}",
            )
    if ignored:
        text = f"Nothing is made of {', '.join(ignored)}."
        settings.notes.append(Note(NoteCode.IGNORED_METADATA, text))
