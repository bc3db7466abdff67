"""MLX's ``quantization`` block as folders hold it, and the encodings that a layer's shapes allow.

An entry may say less than all: what it leaves out is the default of its mode, as MLX takes it, or
what the tensors of its layer leave.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import CONFIG
from requant.core.dtypes import KERNEL_FLOATS
from requant.errors import ParseError, Problem
from requant.formats.base import Tensors, describe_encoding
from requant.formats.quantization_block import as_table, is_mlx_block, sections
from requant.quantization.config import (
    RESERVED_KEYS,
    SKIP,
    PerLayerQuantization,
    Quantization,
    QuantMode,
    Skip,
)
from requant.quantization.modes import AFFINE_BITS, AFFINE_GROUP_SIZES, MODE_DEFAULTS
from requant.text import format_value, join_or

_PARAMETERS: Final = ("group_size", "bits", "mode")
# A float8 view of the scale bytes is accepted as the same bytes.
SCALE_BYTES: Final = ("U8", "F8_E8M0", "F8_E4M3")
# What wrappers of a language model put before the names of its layers.
_WRAPPERS: Final = re.compile(r"(?:(?:model|language_model|text_model|llm|module|_orig_mod)\.)+")


@dataclass(frozen=True, slots=True)
class Stated:
    """The parameters that the block gives to a layer."""

    where: str  # the key that says so
    # with MLX's defaults for what is not said; None for a dense layer
    quantization: Quantization | None
    declared: frozenset[str] = frozenset()  # the parameters that are said

    def agrees(self, other: Quantization) -> bool:
        """Whether ``other`` has every value that is said."""
        mine = {} if self.quantization is None else self.quantization.to_dict()
        return all(other.to_dict()[key] == mine[key] for key in self.declared)


@dataclass
class MlxBlock:
    """One block."""

    where: str  # "config.json: quantization"
    # for layers without an entry; None where the block gives none that is legal
    default: Stated | None = None
    entries: dict[str, Stated] = field(default_factory=dict)  # layer path -> what its entry says
    problems: list[Problem] = field(default_factory=list)  # entries that say nothing that can be
    # layer path without the prefixes of wrappers -> the entries of that path that no tensors have
    # the name of
    strays: dict[str, list[Stated]] = field(default_factory=dict)

    def of(self, path: str, fitting: Sequence[Quantization]) -> Stated | None:
        """The parameters of a layer whose shapes allow the encodings ``fitting``.

        Loaders rename layers, and entries have the names that a loader gives: one that names no
        layer holds for the layer that differs in its prefix only, where its tensors allow it.
        """
        if path in self.entries:
            return self.entries[path]
        strays = self.strays.get(_bare(path), ())
        found = [each for each in strays if each.quantization in fitting]
        return found[0] if len({each.quantization for each in found}) == 1 else self.default

    @property
    def quantization(self) -> PerLayerQuantization:
        """The whole as the output's block is made from it."""
        own: dict[str, Quantization | Skip] = {
            path: SKIP if declared.quantization is None else declared.quantization
            for path, declared in self.entries.items()
        }
        default = None if self.default is None else self.default.quantization
        return PerLayerQuantization(default, own)


def find_block(checkpoint: Checkpoint) -> tuple[str, Any]:
    """The path of the block that MLX reads first, and the block; None where there is none.

    Blocks inside sections of config.json count too: tools that wrap a model leave them there.
    """
    for keys, section in sections(checkpoint.config):
        where = f"{CONFIG}: {'.'.join((*keys, 'quantization'))}"
        block = section.get("quantization")
        if block is not None and (not keys or is_mlx_block(block)):
            return where, block
        block = section.get("quantization_config")
        table = as_table(block)
        if "bits" in table and table.get("quant_method") in (None, "mlx"):
            return f"{where}_config", block
    return f"{CONFIG}: quantization", None


def _bare(path: str) -> str:
    return path[found.end() :] if (found := _WRAPPERS.match(path)) else path


def read_block(where: str, block: Any, names_layer: Callable[[str], bool]) -> MlxBlock:
    """Read the block under the key ``where``, and collect what is wrong with it.

    ``names_layer`` tells whether there are tensors under a path; what names none and is not an
    object is a remark of another tool.
    """
    found = MlxBlock(where)
    if not isinstance(block, Mapping):
        message = f"the quantization block must be an object, got {format_value(block)}"
        found.problems.append(Problem(where, message))
        return found
    found.default = _stated(where, {key: block.get(key) for key in _PARAMETERS}, found.problems)
    for path, value in block.items():
        if path in RESERVED_KEYS or value is True:
            continue
        place = f"{where}.{path}"
        if value is False or (value is None and names_layer(path)):
            found.entries[path] = Stated(place, None)
        elif isinstance(value, Mapping):
            declared = _stated(place, value, found.problems)
            if declared is not None:
                found.entries[path] = declared
        elif names_layer(path):
            message = (
                f"must be false or a quantization object, got {format_value(value)}; write "
                '{"group_size": 64, "bits": 4} with the values of its codes'
            )
            found.problems.append(Problem(place, message))
    for path, declared in found.entries.items():
        if not names_layer(path):
            found.strays.setdefault(_bare(path), []).append(declared)
    return found


def _stated(where: str, fields: Mapping[str, Any], problems: list[Problem]) -> Stated | None:
    """The parameters of one layer or of all, with MLX's defaults for what is not said."""
    declared = {key: fields[key] for key in _PARAMETERS if fields.get(key) is not None}
    tags = {mode.value: numbers for mode, numbers in MODE_DEFAULTS.items()}
    mode = declared.get("mode", QuantMode.AFFINE.value)
    group, bits = tags.get(mode, (64, 4)) if isinstance(mode, str) else (64, 4)
    try:
        filled = Quantization.from_dict({"group_size": group, "bits": bits} | declared)
    except ParseError as error:
        problems.append(Problem(where, error.message))
        return None
    return Stated(where, filled, frozenset(declared))


def encodings(parts: Tensors) -> list[Quantization]:
    """Every encoding of MLX's that the shapes and dtypes of a layer's tensors allow."""
    weight, scales, biases = (
        parts[role].info if role in parts else None for role in ("weight", "scales", "biases")
    )
    if weight is None or scales is None or weight.dtype != "U32" or not scales.shape:
        return []
    if weight.shape[:-1] != scales.shape[:-1] or not scales.size:
        return []
    affine = scales.dtype in KERNEL_FLOATS
    if affine and (biases is None or biases.shape != scales.shape):
        return []
    if not affine and (biases is not None or scales.dtype not in SCALE_BYTES):
        return []
    stored = 32 * weight.shape[-1]
    return [x for x in _legal(affine) if stored == x.bits * x.group_size * scales.shape[-1]]


def _legal(affine: bool) -> Iterator[Quantization]:
    if affine:
        for bits in AFFINE_BITS:
            for group in AFFINE_GROUP_SIZES:
                yield Quantization.affine(group, bits)
    else:
        for mode, (group, bits) in MODE_DEFAULTS.items():
            if mode is not QuantMode.AFFINE:
                yield Quantization(group, bits, mode)


def words_for(found: list[Quantization]) -> str:
    """The encodings that fit, for a message."""
    return join_or([describe_encoding(each, "") for each in found])
