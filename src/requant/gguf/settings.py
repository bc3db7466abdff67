"""The inputs of a config: a file's metadata, its shapes, and the settings mlx-lm's class reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from requant.core.reasons import Note
from requant.gguf.metadata import Metadata

Shapes = Mapping[str, tuple[int, ...]]
"""Name in the file -> shape, outermost axis first."""
ReadScalar = Callable[[str], np.ndarray]
"""Values of a small float32 tensor of the file."""

ALL_SCALINGS = frozenset({"linear", "llama3", "yarn", "longrope"})
ADVICE = "--config-from takes config.json and tokenizer of the original model instead"


@dataclass(frozen=True)
class Support:
    """The settings that mlx-lm's class of a model reads, apart from those that all classes read."""

    scalings: frozenset[str] = ALL_SCALINGS  # kinds of ``rope_scaling``
    head_dim: bool = True  # whether heads may be of another width than ``hidden_size`` gives
    partial_rotary: bool = False  # whether a part of a head may be left unrotated
    next_tokens: bool = False  # whether the last blocks may be those that predict further tokens
    positions: bool = True  # whether rope_theta and rope_scaling are those of other models
    attention: bool = True  # whether there is attention at all
    hybrid: bool = False  # whether blocks may be of several kinds
    layer_norm: bool = False  # whether norms subtract the mean


PLAIN = Support()


class Settings:
    """Metadata under the architecture's prefix, shapes and values of tensors."""

    def __init__(
        self, metadata: Metadata, shapes: Shapes, read_small: ReadScalar, support: Support = PLAIN
    ) -> None:
        self.metadata, self.shapes = metadata, shapes
        self.read_small, self.support = read_small, support
        self.prefix = f"{metadata.architecture}."
        self.notes: list[Note] = []  # about the config

    def need_int(self, key: str) -> int:
        return self.metadata.need_int(self.prefix + key)

    def find_int(self, key: str) -> int | None:
        return self.metadata.find_int(self.prefix + key)

    def find_float(self, key: str) -> float | None:
        return self.metadata.find_float(self.prefix + key)

    def need_float(self, key: str) -> float:
        return self.metadata.need_float(self.prefix + key)

    def layer_ints(self, key: str, blocks: int) -> list[int] | None:
        return self.metadata.layer_ints(self.prefix + key, blocks)

    def flag(self, key: str) -> bool | None:
        return self.metadata.flag(self.prefix + key)

    def word(self, key: str) -> str:
        return self.metadata.word(self.prefix + key)

    def report(self, key: str, message: str) -> None:
        self.metadata.report(self.prefix + key, message)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def width(self, name: str) -> int | None:
        """Rows of a block's tensor, from the first block that has it."""
        found = (s for n, s in self.shapes.items() if n.startswith("blk.") and n.endswith(name))
        shape = next(found, None)
        return shape[-2] if shape is not None and len(shape) > 1 else None

    def any_block_has(self, name: str) -> bool:
        """Whether a block has a tensor of that name."""
        return any(n.endswith(f".{name}") for n in self.shapes)

    @property
    def blocks(self) -> int:
        """Blocks of the model, without those that predict further tokens."""
        return self.need_int("block_count") - self.next_tokens

    @property
    def next_tokens(self) -> int:
        """Blocks at the end that predict further tokens."""
        if not self.support.next_tokens:
            return 0
        found = self.find_int("nextn_predict_layers") or 0
        if found >= self.need_int("block_count"):
            self.report("nextn_predict_layers", f"is {found:,}, as many as there are blocks")
            return 0
        return found

    @property
    def stored_expert_width(self) -> int:
        """Outputs of an expert's first matrix, as the tensors have it; 0 without experts."""
        fused = self.width("ffn_gate_up_exps.weight")
        return self.width("ffn_up_exps.weight") or (fused // 2 if fused else 0)

    def expert_width(self) -> int:
        """The same, held against what the file says."""
        declared, stored = self.find_int("expert_feed_forward_length"), self.stored_expert_width
        if declared and stored and declared != stored:
            message = f"is {declared:,}, but the tensors of experts have {stored:,} rows"
            self.report("expert_feed_forward_length", message)
        return declared or stored

    def sliding_layers(self, blocks: int, period: int) -> list[bool]:
        """For each block, whether it sees no more than a window of the text.

        Every ``period`` blocks one sees all, where the file does not say it.
        """
        key = f"{self.prefix}attention.sliding_window_pattern"
        if self.metadata.is_array(key):
            layers = self.metadata.flags(key)
            if layers is None:
                return [False] * blocks
            if len(layers) < blocks:
                self.metadata.report(key, f"has {len(layers):,} entries for {blocks:,} blocks")
            return (layers + [False] * blocks)[:blocks]
        declared = self.metadata.find_int(key)
        return self.alternating(blocks, period if declared is None else declared)

    @staticmethod
    def alternating(blocks: int, period: int) -> list[bool]:
        """Every ``period`` blocks the last sees all; none does where it is 0."""
        return [period == 0 or block % period < period - 1 for block in range(blocks)]
