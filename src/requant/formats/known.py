"""The formats that requant reads itself: how each is recognized, and where its reader is.

A format's module is imported when a checkpoint has a sign of it, or when it is asked to read. A
sign is less than a claim: what has none is not of the format, and for what has one the module
decides (``Format.claims``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Final, cast

from requant.checkpoints.checkpoint import Checkpoint
from requant.formats.base import Format, SourceLayout
from requant.formats.quantization_block import blocks, sections

# What ends the names of scales next to codes of 8 bits or fewer (``scale_names``).
_SCALES: Final = ("scale", "scales", "scale_inv", "scales_inv", "qscale", "qscale_weight")


@dataclass(frozen=True)
class Signs:
    """What a checkpoint has at least one of if it is of a format.

    Attributes:
        methods: What ``quant_method`` begins with, in lower case.
        keys: Keys of a quantization block without ``quant_method``.
        sections: Keys of config.json, or of a section of it, under which the tool writes its block.
        endings: Ends of tensor names; they count in a checkpoint without a quantization block.
        inside: Parts of tensor names, in the same case.
        metadata: Keys of the metadata of safetensors files, in the same case.
        gguf: Whether it is a GGUF file.
    """

    methods: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    gguf: bool = False

    def any_in(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint has one."""
        if self.gguf:
            return checkpoint.gguf is not None
        if self.sections and any(
            section.get(key) is not None
            for _, section in sections(checkpoint.config)
            for key in self.sections
        ):
            return True
        found = blocks(checkpoint)
        if found:
            return any(
                block.method.startswith(self.methods)
                or (
                    not block.block.get("quant_method")
                    and not block.block.keys().isdisjoint(self.keys)
                )
                for block in found
            )
        return self._in_files(checkpoint)

    def _in_files(self, checkpoint: Checkpoint) -> bool:
        if not checkpoint.metadata.keys().isdisjoint(self.metadata):
            return True
        names = checkpoint.tensors
        if self.endings and any(name.endswith(self.endings) for name in names):
            return True
        return any(part in name for part in self.inside for name in names)


@dataclass(eq=False)
class KnownFormat:
    """A format whose module is imported when it is needed; a ``Format``.

    Not data: it holds the module's reader once that is imported.

    Attributes:
        name: The format's name.
        reader: Module of ``requant.formats`` and class ("gptq_awq:GptqAwqFormat").
        signs: What the checkpoints of the format have.
        arguments: Of the class.
    """

    name: str
    reader: str
    signs: Signs
    arguments: tuple[str, ...] = ()

    @cached_property
    def _format(self) -> Format:
        module, _, name = self.reader.partition(":")
        made = getattr(import_module(f"requant.formats.{module}"), name)(*self.arguments)
        return cast(Format, made)

    @property
    def layer_parts(self) -> str:
        """The tensors of a layer as error messages name them; "" where the format has no name."""
        return str(getattr(self._format, "layer_parts", ""))

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """As ``Format.claims``."""
        return self._format.claims(checkpoint) if self.signs.any_in(checkpoint) else None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """As ``Format.read``."""
        return self._format.read(checkpoint)


def _of_qweights() -> Iterator[KnownFormat]:
    """The formats of one module, which its tools tell apart by the words of their configs."""
    words: Mapping[str, Signs] = {
        "awq": Signs(("awq",), ("w_bit", "q_group_size", "version")),
        "gptq": Signs(("gptq", "marlin"), ("desc_act", "damp_percent", "true_sequential")),
        "auto-round": Signs(("auto-round", "auto_round", "intel/auto-round")),
        "paroquant": Signs(("paroquant",)),
    }
    for name, signs in words.items():
        yield KnownFormat(name, "gptq_awq:GptqAwqFormat", signs, (name,))


def _known(name: str, reader: str, *methods: str, **signs: Any) -> KnownFormat:
    return KnownFormat(name, reader, Signs(methods, **signs))


# In the order in which they are asked.
FORMATS: Final[tuple[Format, ...]] = (
    _known("gguf", "gguf:Gguf", gguf=True),
    _known("mlx", "mlx:Mlx", "mlx", keys=("bits",), sections=("quantization",)),
    *_of_qweights(),
    _known(
        "compressed-tensors",
        "compressed_tensors:CompressedTensors",
        *("compressed-tensors", "compressed_tensors"),
        keys=("config_groups",),
        sections=("compression_config",),
        endings=("packed",),
    ),
    _known(
        "modelopt",
        "modelopt:ModelOpt",
        "modelopt",
        keys=("quantization", "quant_algo"),
        endings=("scale_2", "scales_2", *_SCALES),
    ),
    _known("fp8", "fp8:Fp8", "fp8", "mxfp8", "fbgemm_fp8", endings=_SCALES),
    _known("mxfp4", "mxfp4:Mxfp4", "mxfp4", endings=("_blocks", ".blocks", *_SCALES)),
    _known("hqq", "hqq:Hqq", "hqq", endings=(".W_q",)),
    _known(
        "bitsandbytes",
        "bitsandbytes:Bitsandbytes",
        "bitsandbytes",
        keys=("load_in_4bit", "load_in_8bit"),
        endings=(".SCB",),
        inside=(".quant_state.bitsandbytes__",),
    ),
    _known("bitnet", "bitnet:BitNet", "bitnet"),
    _known("metal", "metal:MetalFormat", "metal", endings=(".qbiases",)),
    _known("fp-quant", "fp_quant:FpQuant", "fp_quant"),
    _known("quark", "quark:Quark", "quark"),
    _known("torchao", "torchao:Torchao", "torchao", metadata=("tensor_names",)),
)
