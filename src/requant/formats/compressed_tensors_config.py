"""compressed-tensors' ``quantization_config``: which scheme a layer has, by name or pattern.

Names resolve as its own loader resolves them: a target that begins ``re:`` is a regular
expression anchored at the start of the layer path and open at its end, any other is the exact
path or the name of a class. A path beats a pattern, a pattern beats a class; of two patterns
the one that sorts first wins, and of one target in two groups the last group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from requant.core.regex import Pattern, PatternError
from requant.errors import Problem
from requant.formats.quantization_block import QuantizationBlock, as_table
from requant.text import format_value

FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
    "mixed-precision",
)
_UNSUPPORTED = {
    "marlin-24": "2:4-sparse codes in the tiles of a GPU kernel, which its own library cannot "
    "decompress either",
    "sparse-24-bitmask": "values without their zeros; decompress it with compressed-tensors",
    "sparse-bitmask": "values without their zeros; decompress it with compressed-tensors",
}
_BIT_STREAM_SINCE = (0, 18)
_OFFLINE = ("weight_input", "weight_output")
_PRESET = re.compile(r"W(?P<int>\d)A(?:\d+|FP8)(?P<asym>_ASYM)?|(?:MX|NV)?FP(?P<float>\d)\w*")


@dataclass(frozen=True, slots=True)
class Scheme:
    """The scheme that the config gives to the weights of a group of layers."""

    bits: int | None = None  # ``num_bits``; None where it is not said
    kind: str = ""  # "int" or "float"; "" where it is not said
    symmetric: bool | None = None  # whether there are no zero points; None where it is not said
    group_size: int | None = None  # inputs with one scale; None for a row, a tensor or blocks
    block: tuple[int, int] | None = None  # rows and columns with one scale
    where: str = ""  # the key that says so
    actorder: str = ""  # what is said of the order of inputs: "group", "static"

    @property
    def shuffled(self) -> bool:
        """Whether each layer needs a ``weight_g_idx``; "weight" and "static" leave none."""
        return self.actorder.lower() in ("group", "dynamic", "true")


_NO_SCHEME = Scheme()


class CtConfig:
    """The block, checked when made."""

    def __init__(self, block: QuantizationBlock | None, problems: list[Problem]) -> None:
        self.found, self.problems = block, problems
        self.where = "" if block is None else block.where
        self._schemes: dict[str, Scheme] = {}  # target -> scheme
        self._patterns: list[tuple[Pattern, Scheme]] = []
        self._ignored: list[Pattern] = []
        self._ignored_names: set[str] = set()
        self.padded: bool | None = None  # whether words hold whole codes only; None: not said
        if block is not None:
            release = re.match(r"(\d{1,9})\.(\d{1,9})", block.word("version"))
            if release is not None:
                self.padded = tuple(map(int, release.groups())) < _BIT_STREAM_SINCE
            self._check_formats(block)
            self._check_transforms(block)
            self._read_groups(block)
            self._read_ignored(block)
        # A class name: the checkpoint does not say which layer is of which class.
        self._by_class: dict[bool, Scheme] = {}  # whether it is of embeddings -> scheme
        for target, scheme in self._schemes.items():
            if not target.startswith("re:") and "." not in target:
                self._by_class.setdefault("embed" in target.lower(), scheme)

    def of(self, path: str) -> Scheme:
        """The scheme of a layer; an empty one where the config does not reach it."""
        if path in self._schemes:
            return self._schemes[path]
        for pattern, scheme in self._patterns:
            if pattern.match(path):
                return scheme
        return self._by_class.get("embed" in path.rpartition(".")[2], _NO_SCHEME)

    def ignores(self, path: str) -> bool:
        """Whether an entry of ``ignore`` names a layer."""
        return path in self._ignored_names or any(x.match(path) for x in self._ignored)

    def named(self) -> Iterable[tuple[str, Scheme]]:
        """Targets that are the path of one layer."""
        return ((t, s) for t, s in self._schemes.items() if "." in t and not t.startswith("re:"))

    def _report(self, key: str, message: str) -> None:
        self.problems.append(Problem(f"{self.where}.{key}", message))

    def _check_formats(self, block: QuantizationBlock) -> None:
        named = {
            "format": block.block.get("format"),
            "sparsity_config.format": block.table("sparsity_config").get("format"),
        }
        for name, group in block.table("config_groups").items():
            named[f"config_groups.{name}.format"] = as_table(group).get("format")
        for key, value in named.items():
            if value is None or value in FORMATS:
                continue
            if isinstance(value, str) and value in _UNSUPPORTED:
                self._report(key, f"is {format_value(value)}: {_UNSUPPORTED[value]}")
            else:
                self._report(key, f"is {format_value(value)}; known are {', '.join(FORMATS)}")

    def _check_transforms(self, block: QuantizationBlock) -> None:
        groups = as_table(block.table("transform_config").get("config_groups"))
        for name, group in groups.items():
            applied = as_table(group).get("apply")
            for use in applied if isinstance(applied, list) else ():
                place = as_table(use).get("location")
                if place not in _OFFLINE:
                    self._report(
                        f"transform_config.config_groups.{name}",
                        f"rotates at location {format_value(place)} while the model runs: the "
                        "weights alone are not the model",
                    )

    def _read_groups(self, block: QuantizationBlock) -> None:
        groups = block.get("config_groups")
        if groups is None:
            return
        if not isinstance(groups, Mapping):
            self._report("config_groups", f"is {format_value(groups)}, expected an object")
            return
        for name, group in groups.items():
            where = f"{self.where}.config_groups.{name}"
            if isinstance(group, list):  # a preset and its targets
                scheme, targets = self._preset(name, where), group
            elif isinstance(group, Mapping):
                scheme, targets = self._scheme(group, where), group.get("targets") or []
            else:
                message = f"is {format_value(group)}, expected an object"
                self.problems.append(Problem(where, message))
                continue
            for target in targets:
                if not isinstance(target, str):
                    message = f"holds {format_value(target)}, expected names"
                    self.problems.append(Problem(f"{where}.targets", message))
                    continue
                self._schemes.pop(target, None)
                self._schemes[target] = scheme
        for target in sorted(t for t in self._schemes if t.startswith("re:")):
            pattern = self._compiled(target, self._schemes[target].where)
            if pattern is not None:
                self._patterns.append((pattern, self._schemes[target]))

    def _scheme(self, group: Mapping[str, Any], where: str) -> Scheme:
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            return Scheme(where=where)
        where = f"{where}.weights"
        fields = QuantizationBlock(where, weights)
        symmetric = None
        if weights.get("symmetric") is not None:
            symmetric = fields.boolean("symmetric", self.problems, True)
        group_size = fields.integer("group_size", self.problems)
        if weights.get("strategy") in ("tensor", "channel", "block"):
            group_size = None
        return Scheme(
            bits=fields.integer("num_bits", self.problems),
            kind=fields.word("type"),
            symmetric=symmetric,
            group_size=group_size if group_size and group_size > 0 else None,
            block=self._block(weights.get("block_structure"), where),
            where=where,
            actorder="" if (order := weights.get("actorder")) is None else str(order),
        )

    def _block(self, value: Any, where: str) -> tuple[int, int] | None:
        """``[rows, columns]``, in old files "rowsxcolumns"."""
        if value is None:
            return None
        sides = value.lower().split("x") if isinstance(value, str) else value
        try:
            high, wide = (int(side) for side in sides)
        except (TypeError, ValueError):
            high = wide = 0
        if high > 0 and wide > 0:
            return high, wide
        key = f"{where}.block_structure"
        self.problems.append(Problem(key, f"is {format_value(value)}, expected [rows, columns]"))
        return None

    def _preset(self, preset: str, where: str) -> Scheme:
        name = preset.upper()
        if name == "UNQUANTIZED":
            return Scheme(where=where)
        match = _PRESET.fullmatch("W8A8" if name == "INT8" else name)
        if match is None:
            message = (
                f"{format_value(preset)} is not a preset of compressed-tensors (W4A16, "
                "FP8_DYNAMIC, NVFP4, ...); correct the name, or give the scheme: "
                '{"targets": [...], "weights": {"num_bits": 4, "type": "int", ...}}'
            )
            self.problems.append(Problem(where, message))
            return Scheme()
        bits, kind = (int(match["int"]), "int") if match["int"] else (int(match["float"]), "float")
        return Scheme(bits, kind, not match["asym"], where=where)

    def _read_ignored(self, block: QuantizationBlock) -> None:
        for entry in block.names("ignore", self.problems):
            self._ignored_names.add(entry)
            if entry.startswith("re:"):
                pattern = self._compiled(entry, f"{self.where}.ignore")
                if pattern is not None:
                    self._ignored.append(pattern)

    def _compiled(self, entry: str, where: str) -> Pattern | None:
        try:
            return Pattern(entry.removeprefix("re:"))
        except PatternError as error:
            self.problems.append(Problem(where, error.message))
            return None
