"""The quantization block of a checkpoint, in config.json or in a file of the tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeGuard

from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import CONFIG, QUANTIZATION_FILES
from requant.core.dtypes import KERNEL_FLOATS
from requant.errors import Problem
from requant.formats.scale_names import parse_scale_name
from requant.text import format_value

_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_KEYS: Final = ("quantization", *_KEYS)
_DEEPEST = 4  # sections inside sections of config.json
# What the name of a section holds that describes the language model, or what it is a part of.
_OF_TEXT = ("text", "llm", "language", "lang_", "lm_", "decoder", "thinker", "talker", "backbone")
# Keys that decide how tensors are read; where two blocks give other values, they contradict.
_DECIDING = (
    *("quant_method", "bits", "group_size", "sym", "zero_point", "desc_act", "checkpoint_format"),
    *("packing_format", "version", "quant_algo", "weight_block_size", "linear_class"),
    "forward_dtype",
)
# Names of one thing in the configs of different tools (AutoAWQ, llm-awq, AutoGPTQ, GPTQModel).
ALIASES: Final = {
    "bits": ("bits", "w_bit", "wbits", "weight_bits", "num_bits", "nbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "quant_method": ("quant_method", "method"),
    "checkpoint_format": ("checkpoint_format", "format"),
}


@dataclass(frozen=True, slots=True)
class QuantizationBlock:
    """A quantization block and its path ("config.json: quantization_config")."""

    where: str  # for messages
    block: Mapping[str, Any]
    # of config.json, from the outermost in; empty for a block in a file of its own
    keys: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """``quant_method`` in lower case; "" where none is given."""
        return str(self.get("quant_method") or "").lower()

    def get(self, key: str, default: Any = None) -> Any:
        """A value under any of the names that tools give it."""
        for name in ALIASES.get(key, (key,)):
            if self.block.get(name) is not None:
                return self.block[name]
        return default

    def table(self, key: str) -> Mapping[str, Any]:
        """An object; an empty one where there is none."""
        return as_table(self.get(key))

    @property
    def inner(self) -> QuantizationBlock:
        """The inner block of ModelOpt's own file, else the block itself."""
        inner = self.block.get("quantization")
        if not isinstance(inner, Mapping):
            return self
        return QuantizationBlock(f"{self.where}: quantization", inner)

    def word(self, key: str, default: str = "") -> str:
        """A text value in lower case; ``default`` where there is none."""
        value = self.get(key)
        return value.lower() if isinstance(value, str) else default

    def integer(self, key: str, problems: list[Problem], default: int | None = None) -> int | None:
        """A whole number, or a problem and ``default``."""
        value = self.get(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        problems.append(self.wrong(key, "a whole number"))
        return default

    def boolean(self, key: str, problems: list[Problem], default: bool) -> bool:
        """True or false, or a problem and ``default``."""
        value = self.get(key, default)
        if isinstance(value, bool):
            return value
        problems.append(self.wrong(key, "true or false"))
        return default

    def names(self, key: str, problems: list[Problem]) -> tuple[str, ...]:
        """A list of texts (null is none), or a problem and nothing."""
        value = self.get(key)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        problems.append(self.wrong(key, "a list of names"))
        return ()

    def wrong(self, key: str, expected: str) -> Problem:
        """The problem of a value that is not what its key demands."""
        message = f"is {format_value(self.get(key))}, expected {expected}"
        return Problem(f"{self.where}.{key}", message)


def as_table(value: Any) -> Mapping[str, Any]:
    """A value of a JSON file if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def sections(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The config and every section inside it, with the keys that lead there.

    Outer ones come first, and among neighbours those of the language model.
    """
    level: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for _ in range(_DEEPEST + 1):
        yield from level
        level = [
            ((*keys, key), part)
            for keys, section in level
            for key, part in sorted(section.items(), key=lambda item: not _is_of_text(item[0]))
            if isinstance(part, Mapping) and key not in QUANTIZATION_KEYS
        ]


def text_sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, then its sections that describe the language model."""
    return (part for keys, part in sections(config) if all(map(_is_of_text, keys)))


def _is_of_text(key: str) -> bool:
    return any(word in key.lower() for word in _OF_TEXT)


def blocks(checkpoint: Checkpoint) -> list[QuantizationBlock]:
    """Every quantization block: those of config.json, then those in files of the tools' own."""
    found = []
    for keys, section in sections(checkpoint.config):
        for key in _KEYS:
            block = section.get(key)
            if isinstance(block, Mapping) and block:
                path = (*keys, key)
                found.append(QuantizationBlock(f"{CONFIG}: {'.'.join(path)}", block, path))
    files = checkpoint.quantization_files
    return found + [
        QuantizationBlock(name, files[name]) for name in QUANTIZATION_FILES if files.get(name)
    ]


def find_quantization_block(checkpoint: Checkpoint) -> QuantizationBlock | None:
    """The block that counts: the outermost in config.json, else that of a file."""
    return next(iter(blocks(checkpoint)), None)


def claim_by_method(
    checkpoint: Checkpoint, method: str, otherwise: Iterable[str] = ()
) -> str | None:
    """The evidence of a format that ``quant_method`` names; None for other folders.

    Without a quantization block it is the first of ``otherwise``.
    """
    block = find_quantization_block(checkpoint)
    if block is None:
        return next(iter(otherwise), None)
    return f"{block.where}: quant_method {method}" if block.method == method else None


def contradicting(checkpoint: Checkpoint) -> list[QuantizationBlock]:
    """The blocks that give another value than the first for a key that decides how to read."""
    first, *others = blocks(checkpoint) or [QuantizationBlock("", {})]
    return [other for other in others if contradicted_keys(first, other)]


def contradicted_keys(one: QuantizationBlock, other: QuantizationBlock) -> list[str]:
    """The deciding keys to which two blocks give different values."""
    mine, theirs = one.inner, other.inner
    pairs = ((key, mine.get(key), theirs.get(key)) for key in _DECIDING)
    return [key for key, a, b in pairs if None not in (a, b) and _plain(a) != _plain(b)]


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def with_block(
    checkpoint: Checkpoint, found: QuantizationBlock, block: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint as if ``block`` stood in the place of ``found``, and no other anywhere."""
    config = without_blocks(checkpoint.config)
    if not found.keys:
        return replace(checkpoint, config=config, quantization_files={found.where: block})
    part = config
    for key in found.keys[:-1]:
        part = part[key]
    part[found.keys[-1]] = block
    return replace(checkpoint, config=config, quantization_files={})


def without_blocks(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy of a config, or a section ``depth`` levels down, without its quantization blocks."""
    left = {}
    for key, value in config.items():
        if key in _KEYS or (key == "quantization" and (not depth or is_mlx_block(value))):
            continue
        inner = isinstance(value, Mapping) and depth < _DEEPEST
        left[key] = without_blocks(value, depth + 1) if inner else value
    return left


def is_mlx_block(value: Any) -> bool:
    """Whether a value has the form of MLX's block: codecs call other things "quantization"."""
    return isinstance(value, Mapping) and bool(value.keys() & {"bits", "group_size"})


_BEFORE_COMPRESSION = ("initialized", "calibration", "frozen")


def float_form(checkpoint: Checkpoint) -> str:
    """The key that says that weights with scales next to them are stored as floats; else "".

    compressed-tensors saves so before it compresses, Quark in its "fake_quantized" form.
    """
    block = find_quantization_block(checkpoint)
    if block is None:
        return ""
    declared = (
        ("quantization_status", block.get("quantization_status"), _BEFORE_COMPRESSION),
        ("format", block.block.get("format"), ("dense",)),
        ("export.weight_format", block.table("export").get("weight_format"), ("fake_quantized",)),
    )
    for key, value, words in declared:
        if isinstance(value, str) and value.lower() in words:
            return f"{block.where}.{key} is {format_value(value)}"
    return ""


DTYPE_WORDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "half": "F16"}


def model_dtype(checkpoint: Checkpoint, otherwise: str = "F16") -> str:
    """The dtype of the model: config.json's, else that of most dense bytes, else ``otherwise``."""
    for part in text_sections(checkpoint.config):
        for key in ("dtype", "torch_dtype"):
            word = str(part.get(key)).removeprefix("torch.")
            if word in DTYPE_WORDS:
                return DTYPE_WORDS[word]
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        if tensor.info.dtype in KERNEL_FLOATS and parse_scale_name(tensor.name) is None:
            sizes[tensor.info.dtype] += tensor.info.nbytes
    return sizes.most_common(1)[0][0] if sizes else otherwise
