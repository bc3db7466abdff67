"""Properties of a GGUF source that a ``Checkpoint`` has in addition to names and byte ranges."""

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
        name_in_file: Its name in the file.
        heads: Heads whose rows are in the order of llama.cpp's rotary embedding; 0 for none.
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
        dropped: Names in the file of tensors that are not weights, each with the reason.
        notes: Notes for the user.
    """

    architecture: str
    tensors: Mapping[str, GgufTensor]
    dtype: str
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...]
