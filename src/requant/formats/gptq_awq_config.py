"""The layout that the config of a ``qweight`` folder gives, in each tool's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from requant.errors import Problem
from requant.formats.quantization_block import QuantizationBlock
from requant.packings.gptq import Zeros
from requant.text import format_value

_AWQ_VERSIONS: Final = {
    "gemm": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "llm-awq": "gemv_fast",
    "marlin": "marlin",
}
_GPTQ_FORMATS: Final = ("", "gptq", "gptq_v2", "gptq_p")
_AUTO_ROUND: Final = {  # packing_format -> layout, how zeros are stored
    **dict.fromkeys(("", "auto"), ("gptq", Zeros.PLUS_ONE)),
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq"), ("gptq", Zeros.PLUS_ONE)),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), ("gptq", Zeros.AS_STORED)),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq"), ("gemm", Zeros.AS_STORED)),
}
_ELSEWHERE = ("mlx",)  # AutoRound's exports that are other formats
# What AutoRound calls layers that are not integers, behind "auto_round:"; tensors determine the
# kind.
_OF_FLOATS: Final = ("fp8", "mx", "nv", "llm_compressor")
METHODS: Final = {
    "awq": ("awq", "awq_marlin"),
    "gptq": ("gptq", "gptq_marlin", "marlin"),
    "paroquant": ("paroquant",),
    "auto-round": ("auto-round", "auto_round", "intel/auto-round", "auto_round:fp8"),
}
_NOT_IN_WEIGHTS = {
    **dict.fromkeys(
        ("rotation", "rotation_config", "spinquant_config"), "an online Hadamard rotation"
    ),
    "adapter": "an adapter next to the weights",
}


@dataclass(frozen=True, slots=True)
class Convention:
    """The layout and the meaning of zeros for all layers of a config."""

    layout: str  # "gptq", "gemm", "gemv", "gemv_fast" or "marlin"; "" for what the tensors say
    # how a stored zero field becomes the zero; None where the config does not say
    zeros: Zeros | None = Zeros.AS_STORED
    planar: bool = False  # whether codes are stored plane by plane
    where: str = ""  # the key that says so


def method_of(block: QuantizationBlock) -> str:
    """``quant_method``; older files have none, but keys that name the tool."""
    if block.method:
        return block.method
    keys = set(block.block)
    if keys & {"w_bit", "q_group_size"} or block.word("version") in _AWQ_VERSIONS:
        return "awq"
    return "gptq" if keys & {"desc_act", "damp_percent", "true_sequential"} else ""


def is_elsewhere(name: str, block: QuantizationBlock) -> bool:
    """Whether the folder is an export of AutoRound in another tool's format."""
    return name == "auto-round" and block.word("packing_format").endswith(_ELSEWHERE)


def read_convention(name: str, block: QuantizationBlock, problems: list[Problem]) -> Convention:
    """Read the block of a folder of ``name``; what is unknown or cannot be is a problem."""
    return _Config(name, block, problems).convention()


class _Config:
    """One block, and what is wrong with it."""

    def __init__(self, name: str, block: QuantizationBlock, problems: list[Problem]) -> None:
        self.name, self.found, self.problems = name, block, problems

    def convention(self) -> Convention:
        block = self.found
        for key, what in _NOT_IN_WEIGHTS.items():
            if block.get(key):
                message = f"asks for {what}: the weights alone are not the model"
                self._problem(f"{block.where}.{key}", message)
        if self.name == "auto-round":
            return self._auto_round()
        if self.name == "paroquant":
            return Convention("gemm", where=f"{block.where}.quant_method")
        if self.name == "awq":
            backend = block.word("backend")
            key = "version" if block.word("version") else "format"
            version = "llm-awq" if backend == "llm-awq" else block.word(key, "gemm")
            if version in _AWQ_VERSIONS:
                return Convention(_AWQ_VERSIONS[version], where=f"{block.where}.{key}")
            return self._unknown(key, version, list(_AWQ_VERSIONS))
        written = block.word("checkpoint_format")
        if written == "marlin" or block.get("is_marlin_format") or block.method == "marlin":
            return Convention("marlin", where=f"{block.where}.checkpoint_format")
        if written not in _GPTQ_FORMATS:
            return self._unknown("checkpoint_format", written, [*_GPTQ_FORMATS, "marlin"])
        zeros = Zeros.AS_STORED
        if written in ("", "gptq"):
            zeros = Zeros.WORD_PLUS_ONE if self._by_gptqmodel() else Zeros.PLUS_ONE
        where = f"{block.where}.checkpoint_format"
        return Convention("gptq", zeros, written == "gptq_p", where)

    def _auto_round(self) -> Convention:
        written = self.found.word("packing_format")
        if (written or self.found.method).removeprefix("auto_round:").startswith(_OF_FLOATS):
            return Convention("", None, where=f"{self.found.where}.packing_format")
        if written not in _AUTO_ROUND:
            return self._unknown("packing_format", written, list(_AUTO_ROUND))
        layout, zeros = _AUTO_ROUND[written]
        return Convention(layout, zeros, where=f"{self.found.where}.packing_format")

    def _unknown(self, key: str, value: str, known: list[str]) -> Convention:
        names = ", ".join(name for name in known if name)
        self._problem(f"{self.found.where}.{key}", f"is {format_value(value)}; known are {names}")
        return Convention("")

    def _by_gptqmodel(self) -> bool:
        writer = self.found.table("meta").get("quantizer")
        names = writer if isinstance(writer, list) else [writer]
        return any(str(name).startswith("gptqmodel") for name in names)

    def _problem(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))
