"""The source formats, in the order in which they are asked."""

from __future__ import annotations

from requant.checkpoint import Checkpoint
from requant.errors import CheckpointError
from requant.formats.base import Format, SourceLayer, SourceLayout
from requant.formats.bitnet import BitNet
from requant.formats.bitsandbytes import Bitsandbytes
from requant.formats.compressed_tensors import CompressedTensors
from requant.formats.dense import Dense
from requant.formats.fp8 import Fp8
from requant.formats.fp_quant import FpQuant
from requant.formats.gguf import Gguf
from requant.formats.hqq import Hqq
from requant.formats.metal import MetalFormat
from requant.formats.mlx import Mlx
from requant.formats.modelopt import ModelOpt
from requant.formats.mxfp4 import Mxfp4
from requant.formats.plugins import plugged_in
from requant.formats.quark import Quark
from requant.formats.qweight import QweightFormat
from requant.formats.torchao import Torchao

__all__ = ["FORMATS", "Format", "SourceLayer", "SourceLayout", "detect"]

FORMATS: tuple[Format, ...] = (
    Gguf(),
    Mlx(),
    *map(QweightFormat, ("awq", "gptq", "auto-round", "paroquant")),
    CompressedTensors(),
    ModelOpt(),
    Fp8(),
    Mxfp4(),
    Hqq(),
    Bitsandbytes(),
    BitNet(),
    MetalFormat(),
    FpQuant(),
    Quark(),
    Torchao(),
)
_DENSE = Dense()


def detect(checkpoint: Checkpoint) -> Format:
    """Find the format of a checkpoint from its config and tensor names.

    Ours are asked first, then those of other packages (``plugins``); what none of them claims
    is dense.

    Raises:
        CheckpointError: None of ours claims it, and a package's format cannot be loaded.
    """
    for known in FORMATS:
        if known.claims(checkpoint):
            return known
    foreign, problems = plugged_in()
    if problems:
        raise CheckpointError(str(checkpoint.path), problems)
    return next((known for known in foreign if known.claims(checkpoint)), _DENSE)
