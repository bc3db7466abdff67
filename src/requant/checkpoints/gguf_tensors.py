"""What the rest of the pipeline knows of a GGUF source next to its tensors' names and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from requant.core.reasons import Note
from requant.kernels.gguf import BlockType


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """How the values of one tensor are stored.

    Attributes:
        kind: Its type.
        shape: Logical, outermost axis first.
        name_in_file: As the file calls it.
        heads: Heads whose rows are in the order of llama.cpp's rotary embedding; 0: none.
        is_shifted: Whether one was added to each value.
    """

    kind: BlockType
    shape: tuple[int, ...]
    name_in_file: str
    heads: int = 0
    is_shifted: bool = False


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF source.

    Attributes:
        architecture: ``general.architecture``.
        tensors: Name -> how it is stored, for each tensor of the checkpoint.
        dtype: Header name of the dtype in which MLX should compute.
        dropped: Names in the file of what is not a weight, each with the reason.
        notes: What the user should know.
    """

    architecture: str
    tensors: Mapping[str, GgufTensor]
    dtype: str
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...]
