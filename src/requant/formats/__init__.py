"""The source formats, in the order in which they are asked; and a map of this folder.

A *format* claims a checkpoint and sorts its tensors into layers (``base.Format``). A *packing*
says how the rows of a layer come out of its tensors (``packing.Packing``). ::

    format                            its modules, in the order in which a folder is read
    gguf                              gguf
    mlx                               mlx, rotation
    awq, gptq, auto-round, paroquant  qweight, qweight_config, qweight_rules, qweight_layouts,
                                      awq_packings, gptq_packings, rotation, gptq_act_order
    compressed-tensors                compressed_tensors, ct_config, ct_packings
    modelopt                          modelopt, modelopt_layers
    fp8                               fp8
    mxfp4                             mxfp4
    hqq                               hqq, hqq_packings
    bitsandbytes                      bitsandbytes, bnb_packings
    bitnet                            bitnet
    metal                             metal
    fp-quant                          fp_quant
    quark                             quark, quark_packings
    torchao                           torchao, torchao_packings
    those of other packages           plugins
    dense: what none claims           dense

Shared by several of them:

* ``base``: what a format gives to the road; ``packing``: what a packing gives, and the one of
  integer codes that most build upon;
* ``declared``: the quantization block, wherever a tool wrote it down;
* ``sorting``: tensors into layers, problems, what is left out and why;
* ``stale``: the step that reads any format, and a block that outlived its codes; ``empty``: weights
  without values;
* ``integer_layers``, ``float8_layers``, ``nvfp4_layers``: layers of one kind of code, of any
  tool; ``input_scaled``: any of them with a scale for each input;
* ``float_packings``: FP8, FP4 and FP6 codes of any tool; ``row_blocks``: rows in the bits of one
  packed row (HQQ, BitNet).

``*_config`` and ``qweight_rules`` read JSON alone, ``*_layouts`` and ``*_layers`` decide by
dtypes and shapes, ``*_packings`` move codes and know no file. A format with one packing has it
in its own module.
"""

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
