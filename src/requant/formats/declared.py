"""What a checkpoint says about its own quantization, wherever its tool wrote that down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.checkpoint import Checkpoint
from requant.dtypes import KERNEL_FLOATS
from requant.errors import Problem, shown
from requant.formats.scale_names import parse_scale_name
from requant.source_folder import CONFIG, QUANTIZATION_FILES

_KEYS = ("quantization_config", "compression_config")
# Names of one thing in the configs of different tools (AutoAWQ, llm-awq, AutoGPTQ, GPTQModel).
_ALIASES = {
    "bits": ("bits", "w_bit", "wbits", "weight_bits", "num_bits", "nbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "quant_method": ("quant_method", "method"),
    "checkpoint_format": ("checkpoint_format", "format"),
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A quantization block and where it stands ("config.json: quantization_config")."""

    where: str
    block: Mapping[str, Any]

    @property
    def method(self) -> str:
        """``quant_method`` in lower case; "" where none is given."""
        return str(self.get("quant_method") or "").lower()

    def get(self, key: str, default: Any = None) -> Any:
        """A value under any of the names that tools give it."""
        for name in _ALIASES.get(key, (key,)):
            if self.block.get(name) is not None:
                return self.block[name]
        return default

    def word(self, key: str, default: str = "") -> str:
        """A text value in lower case; ``default`` where there is none."""
        value = self.get(key)
        return value.lower() if isinstance(value, str) else default

    def integer(self, key: str, problems: list[Problem], default: int | None = None) -> int | None:
        """A whole number, or a problem and ``default``."""
        value = self.get(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        problems.append(
            Problem(f"{self.where}.{key}", f"is {shown(value)}, expected a whole number")
        )
        return default

    def boolean(self, key: str, problems: list[Problem], default: bool) -> bool:
        """True or false, or a problem and ``default``."""
        value = self.get(key, default)
        if isinstance(value, bool):
            return value
        problems.append(
            Problem(f"{self.where}.{key}", f"is {shown(value)}, expected true or false")
        )
        return default

    def names(self, key: str, problems: list[Problem]) -> tuple[str, ...]:
        """A list of texts (null is none), or a problem and nothing."""
        value = self.get(key)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        problems.append(
            Problem(f"{self.where}.{key}", f"is {shown(value)}, expected a list of names")
        )
        return ()


def declared(checkpoint: Checkpoint) -> Declared | None:
    """Find the block: in config.json, in its text_config, or in a file of the tool's own."""
    config = checkpoint.config
    for prefix, part in (("", config), ("text_config.", config.get("text_config"))):
        for key in _KEYS:
            block = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(block, Mapping) and block:
                return Declared(f"{CONFIG}: {prefix}{key}", block)
    for name in QUANTIZATION_FILES:
        found = checkpoint.quantization_files.get(name)
        if found:
            return Declared(name, found)
    return None


_BEFORE_COMPRESSION = ("initialized", "calibration", "frozen")


def float_form(checkpoint: Checkpoint) -> str:
    """Where the config says that weights are stored as floats, scales beside them; "" nowhere.

    compressed-tensors saves so before it compresses, Quark in its "fake_quantized" form.
    """
    found = declared(checkpoint)
    if found is None:
        return ""
    export = found.get("export")
    weight_format = export.get("weight_format") if isinstance(export, Mapping) else None
    said = (
        ("quantization_status", found.get("quantization_status"), _BEFORE_COMPRESSION),
        ("format", found.block.get("format"), ("dense",)),
        ("export.weight_format", weight_format, ("fake_quantized",)),
    )
    for key, value, words in said:
        if isinstance(value, str) and value.lower() in words:
            return f"{found.where}.{key} is {shown(value)}"
    return ""


DTYPE_WORDS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "half": "F16"}


def model_dtype(checkpoint: Checkpoint, otherwise: str = "F16") -> str:
    """The float dtype that the model computes in: config.json's, else that of most dense bytes.

    ``otherwise`` is what it is where nothing is dense.
    """
    config = checkpoint.config
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            word = str(part.get(key)).removeprefix("torch.") if isinstance(part, Mapping) else ""
            if word in DTYPE_WORDS:
                return DTYPE_WORDS[word]
    sizes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        if tensor.info.dtype in KERNEL_FLOATS and parse_scale_name(tensor.name) is None:
            sizes[tensor.info.dtype] += tensor.info.nbytes
    return sizes.most_common(1)[0][0] if sizes else otherwise
