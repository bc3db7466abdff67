"""What one architecture of llama.cpp is: names of tensors, and how their values were changed.

The facts are those of llama.cpp's converter (convert_hf_to_gguf.py, gguf-py's tensor map):
which names it gives, which rows it reorders, and where it adds one to a norm. ``families`` has
the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from requant.gguf.metadata import Metadata
from requant.gguf.model_config import Configure
from requant.gguf.settings import PLAIN, Support

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OLD_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}  # one tensor an expert
_FUSED = {  # one tensor of several, row after row: its name -> theirs
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
SCALES = (".scale", ".input_scale")
"""Endings of the factors of a tensor's values, or of its input."""
_SUFFIX = r"(weight|bias|scale|input_scale)"
_BLOCK = re.compile(r"(?:enc\.)?blk\.(\d{1,6})\.(.+)", re.DOTALL)
_ROLE = re.compile(rf"(.+?)(?:\.(\d{{1,6}}))?\.{_SUFFIX}", re.DOTALL)
_TOP_NAME = re.compile(rf"([a-z0-9_.]+)\.{_SUFFIX}")
EACH_ROW = "*"
"""In a path: the number of a row; each row is a tensor of its own."""
# What is computed from settings that the config has: name -> where it goes.
_SETTINGS = {
    "rope_freqs": "rope_scaling in config.json represents it",
    "rope_factors_long": "it is long_factor of rope_scaling in config.json",
    "rope_factors_short": "it is short_factor of rope_scaling in config.json",
}


class Move(Enum):
    """What the converter did to a tensor, and is undone."""

    CHANNELS = auto()  # (channels, 1, taps) became (channels, taps): a convolution
    FLAT = auto()  # (n,) got further axes
    ROW = auto()  # (1, n) became (n,)
    EXPONENTIAL = auto()  # x became -exp(x)
    VALUE_HEADS = auto()  # heads of values, in groups of a head of keys, were dealt out
    VALUE_COLUMNS = auto()  # the same for inputs
    HEAD_GROUPS = auto()  # groups of queries, a key and a value were sorted by kind


@dataclass(frozen=True)
class Architecture:
    """One architecture."""

    model_type: str  # as config.json says it
    cls: str  # the class in transformers
    blocks: Mapping[str, str]  # name of a tensor of a block -> its path below a layer
    configure: Configure  # adds what only this architecture has to a config
    support: Support = PLAIN  # the settings that mlx-lm's class reads
    # Whether rows of q and k are in the order of llama.cpp's rotary embedding.
    permuted: bool = False
    shifted_norms: bool = False  # whether one was added to the weights of norms
    wide: bool = False  # whether activations leave the range of float16
    # Names of a block's tensors with their suffix -> below a layer, where suffixes differ.
    whole: Mapping[str, str] = field(default_factory=dict)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)  # the same outside of blocks
    layers: str = "model.layers"  # the path of the list of layers
    moves: Mapping[str, tuple[Move, ...]] = field(default_factory=dict)  # by name in a block
    # Name in ``blocks`` -> the tensors of the file that are its rows, one after another.
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unshifted: tuple[str, ...] = ()  # norms to which nothing was added, by name in a block

    def name_of(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None if this architecture has none of that name."""
        if found := _BLOCK.fullmatch(name):
            path = self._path_of(found[2])
            return None if path is None else f"{self.layers}.{int(found[1])}.{path}"
        found = _TOP_NAME.fullmatch(name)
        if found and found[1] in self.top:
            return f"{self.top[found[1]]}.{found[2]}"
        return None

    def gguf_name_of(self, name: str) -> str | None:
        """The name in files of a tensor by Hugging Face's name; the inverse of ``name_of``."""
        path, _, suffix = name.rpartition(".")
        for role, known in self.top.items():
            if known == path:
                return f"{role}.{suffix}"
        found = re.fullmatch(rf"{re.escape(self.layers)}\.(\d{{1,6}})\.(.+)", name)
        if found is None:
            return None
        block = f"blk.{int(found[1])}"
        for whole, known in self.whole.items():
            if known == found[2]:
                return f"{block}.{whole}"
        path, _, suffix = found[2].rpartition(".")
        # Of two roles with one path the later is this architecture's own.
        roles = [role for role, known in self.blocks.items() if known == path]
        return f"{block}.{roles[-1]}.{suffix}" if roles and suffix in ("weight", "bias") else None

    def _path_of(self, rest: str) -> str | None:
        """The path below a layer of a tensor of a block, with its suffix."""
        if rest in self.whole:
            return self.whole[rest]
        found = _ROLE.fullmatch(rest)
        if found is None:
            return None
        role, number, suffix = found.groups()
        path = self.blocks.get(role)
        if number is None:
            return None if path is None else f"{path}.{suffix}"
        if path is not None and EACH_ROW in path:
            return f"{path.replace(EACH_ROW, number)}.{suffix}"
        if self.model_type == "mixtral" and role in _OLD_EXPERTS:
            return f"block_sparse_moe.experts.{number}.{_OLD_EXPERTS[role]}.{suffix}"
        return None

    def fused_of(self, name: str) -> tuple[str, ...]:
        """The names that the parts of a fused tensor would have; none of any other."""
        role, suffix, number = _split(name)
        if not role or role in self.blocks or suffix is None:
            return ()
        roles = _FUSED.get(role, ())
        if not all(role in self.blocks for role in roles):
            return ()
        return tuple(f"blk.{number}.{role}.{suffix}" for role in roles)

    def joined_of(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The name of the tensor that one is a part of, and of all its parts; "" for others."""
        role, suffix, number = _split(name)
        for whole, roles in self.joined.items():
            if role in roles and f".{suffix}" not in SCALES:
                names = tuple(f"blk.{number}.{part}.{suffix}" for part in roles)
                return f"blk.{number}.{whole}.{suffix}", names
        return "", ()

    def rows_of(self, name: str, rows: int) -> tuple[str, ...]:
        """Names of the rows of a tensor that holds a tensor a row; none of any other."""
        role, suffix, number = _split(name)
        if EACH_ROW not in self.blocks.get(role, ""):
            return ()
        return tuple(f"blk.{number}.{role}.{row}.{suffix}" for row in range(rows))

    def moves_of(self, name: str) -> tuple[Move, ...]:
        """What was done to a tensor."""
        return self.moves.get(_split(name)[0], ())

    def heads_of(self, name: str, metadata: Metadata) -> int:
        """Heads whose rows are reordered in a tensor; 0 where none are."""
        role = _split(name)[0]
        if not self.permuted or role not in ("attn_q", "attn_k"):
            return 0
        prefix = f"{metadata.architecture}.attention.head_count"
        heads = metadata.find_int(prefix) or 0
        return heads if role == "attn_q" else metadata.common_int(f"{prefix}_kv") or heads

    def is_shifted(self, name: str) -> bool:
        """Whether one was added to the values of a tensor of the file."""
        if not self.shifted_norms or _split(name)[0] in self.unshifted:
            return False
        return (self.name_of(name) or name).endswith("norm.weight")


def _split(name: str) -> tuple[str, str | None, str]:
    """Name in a block, suffix and number of the block; "" for tensors outside of blocks."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return "", None, ""
    role = _ROLE.fullmatch(found[2])
    if role is None or role[2]:
        return found[2], None, found[1]
    return role[1], role[3], found[1]


def setting_of(name: str) -> str | None:
    """The reason why a tensor is not a weight but a setting, or None."""
    found = re.fullmatch(r"(?:blk\.\d{1,6}\.)?([a-z_]+)\.weight", name)
    return _SETTINGS.get(found[1]) if found else None


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to."""
    found = _BLOCK.fullmatch(name)
    return int(found[1]) if found else None
