"""Properties of a GGUF source that a ``Checkpoint`` has in addition to names and byte ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from requant.core.reasons import Note
from requant.kernels.gguf import BlockType


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """How the values of one tensor are stored."""

    kind: BlockType
    shape: tuple[int, ...]  # logical, outermost axis first
    name_in_file: str
    heads: int = 0  # heads whose rows are in the order of llama.cpp's rotary embedding; 0 for none
    is_shifted: bool = False  # whether one was added to each value
    is_exponential: bool = False  # whether each value x was stored as -exp(x)
    # Heads of keys, and heads of values for each, by which inputs were dealt out; (0, 0) if not.
    column_heads: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF source."""

    architecture: str  # ``general.architecture``
    tensors: Mapping[str, GgufTensor]  # name -> how it is stored, for each tensor of the checkpoint
    dtype: str  # header name of the dtype in which MLX should compute
    # Names in the file of tensors that are not weights, each with the reason.
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[Note, ...]
