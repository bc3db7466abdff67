"""Per-layer settings that a quantization config gives by name or by pattern.

GPTQModel's ``dynamic``: regexes anchored at the start of the layer path, with ``-:`` for "not
quantized"; the first match wins. AutoRound's ``extra_config``: the layer path itself, else a
regex found anywhere in it. What a rule does not say is inherited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from requant.core.regex import Pattern, PatternError
from requant.errors import Problem
from requant.formats.quantization_block import QuantizationBlock
from requant.text import format_value

DENSE_BITS = 16  # AutoRound: 16 bits or more is a dense layer
# AutoRound's data types of codes that are not integers: such layers are of other formats.
_OF_FLOATS = ("fp", "mx", "nv", "float", "bf", "nf")


@dataclass(frozen=True, slots=True)
class LayerRule:
    """The settings that the config gives to one layer."""

    bits: int | None  # bits a code; None where the config is silent
    group_size: int | None  # inputs with one scale; -1 for a whole row, None where it is silent
    symmetric: bool | None  # whether every zero is the middle code; None where it is silent
    quantized: bool = True  # whether the layer is to be quantized at all
    where: str = ""  # the key that decided
    # whether the inputs of a group are said to be anywhere in the row (desc_act)
    shuffled: bool = False


class LayerRules:
    """The rules of one config, checked when made."""

    def __init__(self, block: QuantizationBlock, problems: list[Problem]) -> None:
        self.where = block.where
        symmetric = None
        for key, means in (("sym", True), ("zero_point", False)):
            if block.get(key) is not None:
                symmetric = block.boolean(key, problems, True) is means
        bits = group = None
        if not _is_of_floats(block):
            bits, group = (block.integer(key, problems) for key in ("bits", "group_size"))
        shuffled = block.get("desc_act") is True
        self.default = LayerRule(bits, group, symmetric, where=block.where, shuffled=shuffled)
        self._exact: dict[str, LayerRule] = {}
        self._patterns: list[tuple[Pattern, bool, LayerRule]] = []
        self._read(block, "dynamic", problems)
        self._read(block, "extra_config", problems)

    def of(self, path: str) -> LayerRule:
        """The rule of a layer."""
        if path in self._exact:
            return self._exact[path]
        for pattern, anchored, rule in self._patterns:
            if (pattern.match if anchored else pattern.search)(path):
                return rule
        return self.default

    def _read(self, block: QuantizationBlock, key: str, problems: list[Problem]) -> None:
        table = block.get(key)
        if table is None or table is False:
            return
        if not isinstance(table, Mapping):
            problems.append(block.wrong(key, "an object"))
            return
        anchored = key == "dynamic"
        for name, fields in table.items():
            where = f"{self.where}.{key}[{name!r}]"
            negative = anchored and name.startswith("-:")
            text = name.removeprefix("-:").removeprefix("+:") if anchored else name
            if fields is False or (negative and fields is None):
                negative, fields = True, {}
            if not isinstance(fields, Mapping):
                problems.append(Problem(where, f"is {format_value(fields)}, expected an object"))
                continue
            rule = self._rule(QuantizationBlock(where, fields), negative, problems)
            if not anchored:
                self._exact[text] = rule
            try:
                self._patterns.append((Pattern(text), anchored, rule))
            except PatternError as error:
                if anchored:
                    problems.append(Problem(where, error.message))

    def _rule(
        self, fields: QuantizationBlock, negative: bool, problems: list[Problem]
    ) -> LayerRule:
        default = self.default
        if _is_of_floats(fields):
            return LayerRule(None, None, default.symmetric, where=fields.where)
        bits = fields.integer("bits", problems, default.bits)
        dense = negative or (bits is not None and bits >= DENSE_BITS)
        symmetric = default.symmetric
        if fields.get("sym") is not None:
            symmetric = fields.boolean("sym", problems, True)
        return replace(
            default,
            bits=bits if bits is None or bits < DENSE_BITS else None,
            group_size=fields.integer("group_size", problems, default.group_size),
            symmetric=symmetric,
            quantized=not dense,
            where=fields.where,
            shuffled=fields.get("desc_act", default.shuffled) is True,
        )


def _is_of_floats(fields: QuantizationBlock) -> bool:
    """Whether AutoRound's ``data_type`` says that codes are not integers."""
    return fields.word("data_type").startswith(_OF_FLOATS)
