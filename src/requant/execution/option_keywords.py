"""Keyword arguments of the functions that take options, for type checkers and editors.

Generated from the table of options by ``scripts/generate-keywords``; do not edit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

from requant.execution.executor import Progress
from requant.quantization.specs import Spec


class _OfConvertPlanLoad(TypedDict, total=False):
    """Options of ``convert``, ``plan`` and ``load``."""

    bits: int | None
    """With ``group_size`` and ``mode``, another way to give ``quantization``; what is not given
    takes MLX's default for the mode.
    """
    group_size: int | None
    """Inputs that share a scale; affine: 32, 64 or 128."""
    mode: str | None
    """Quantization mode: affine, mxfp4, mxfp8 or nvfp4."""
    dequantize: bool
    """Write every layer dense."""
    dtype: str | None
    """"float16", "bfloat16" or "float32" for floating tensors; cast before they are quantized.
    The field holds the name of a safetensors header (BF16).
    """
    overrides: Iterable[str | tuple[str, Spec | str]]
    """``"REGEX=SPEC"`` or ``(regex, spec)`` on layer paths; the last match wins."""
    only: Sequence[str]
    """Regexes; layers whose path matches none of them are left as they are."""
    recipe: str | os.PathLike[str] | None
    """Name of a recipe ("mixed_3_6", ``requant recipes`` lists them) or path of a TOML file:
    per-layer targets by role, name pattern and block position. ``bits``, ``group_size`` and
    ``mode`` replace its default; ``overrides`` win over its rules.
    """
    act_order: str
    """GPTQ layers with act-order (desc_act), where the order of inputs cannot be moved into the
    layer before: "requantize" (8 bits), "dense" or "refuse".
    """
    fold_rotation: bool
    """ParoQuant: fold the rotation of inputs into the weights and requantize to 8 bits; else the
    rotation stays next to the codes, and only ``requant.mlx_lm.load`` runs it.
    """
    search: str
    """"off" (as ``mx.quantize``, bit for bit), "fast" or "best": look for scales and biases with
    a smaller weighted error at the same size (docs/quantization/search.md).
    """
    statistics: str | os.PathLike[str] | None
    """Importance of each input for the search: a file of ``calibrate``, or llama.cpp's imatrix.
    Turns ``search`` to "best" where that is "off".
    """
    gptq: bool
    """Apply GPTQ with the Hessians in ``statistics`` (``calibrate(..., hessian=True)``); affine
    layers only.
    """
    config_from: str | os.PathLike[str] | None
    """For GGUF: the folder of the original model, whose config.json and tokenizer files are
    taken instead of what the metadata say.
    """
    budget: str | float | None
    """4.5 (bits per weight) or "12GB" (bytes of all tensors): choose bits and group size per
    layer to minimise quantization error within it. The source is measured first; ``overrides``
    and ``only`` win, ``group_size`` holds for all other layers.
    """
    protect: Iterable[str | tuple[str, int]]
    """``"REGEX=BITS"`` or ``(regex, bits)`` on layer paths: layers that match have at least so
    many bits in what ``budget`` chooses; the largest match holds. Codes that stay what they are
    in the source lose nothing and may have fewer.
    """
    max_memory: int | None
    """Most bytes to hold in memory."""
    threads: int | None
    """Worker threads; every processor by default."""
    progress: Callable[[Progress], None] | None
    """Called about ten times a second with a ``Progress``."""
    revision: str | None
    """Of a repository on the hub: branch, tag or commit."""


class _OfConvertPlan(TypedDict, total=False):
    """Options of ``convert`` and ``plan``."""

    layout: str
    """"mlx-lm", "mlx-vlm", "mlx-audio", "mlx-embeddings" (names, shapes, choice of layers and
    config of that library's converter; an error where it cannot be), "keep" (the source's tensor
    names), or "auto": mlx-vlm for a model with images, mlx-audio for one with sound, where they
    are installed and have its class; else mlx-lm; else keep and a note that says why.
    """
    keep_extra: bool
    """In a library's layout, keep tensors that its class has no use for (towers for images and
    sound, MTP heads) under their own names instead of dropping them; a note says whether the
    library still loads the result.
    """
    quality: str | None
    """One choice for ``search``, ``calibrate`` and ``gptq``: "fast" needs no data, "balanced"
    weights the search by statistics of a text, "best" applies GPTQ as well. Options that are
    given themselves win.
    """
    calibrate: bool | str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
    """Run the model over a text first, as ``calibrate`` does, and convert with the statistics:
    True for the text that comes with requant, or text files. Means ``quality="best"`` where that
    is not given. Needs mlx-lm.
    """
    mmproj: str | None
    """For GGUF: the file next to the model that holds its vision part, or ``none`` to convert
    the language model alone. By default the one file with mmproj in its name, unless the layout
    is mlx-lm's, which has no images.
    """
    shard_size: int
    """Most bytes of one weight file."""
    save_recipe: str | os.PathLike[str] | None
    """File for what ``budget`` chose, to be edited and given as ``recipe``."""


class _OfConvert(TypedDict, total=False):
    """Options of ``convert``."""

    force: bool
    """Replace an existing output."""
    resume: bool
    """Resume the same conversion after a stop; False starts over."""
    consume_source: bool
    """Delete each weight file of the source once all that needs it is durably written;
    everything is computed and checked once before the first goes. Of a source on the hub, a few
    weight files at a time are on the disk, and none is checked before.
    """
    yes: bool
    """Must be true with ``consume_source``, but for the hub: nothing can be verified against the
    source afterwards.
    """
    part: str | None
    """The part of the plan to run, as "3/8"; others may run at the same time on other machines
    that share the folder of OUTPUT. ``join`` then completes it.
    """
    engine: str | None
    """"ray": run the parts of the plan as tasks of a Ray cluster whose machines share the folder
    of OUTPUT, and join them.
    """
    address: str | None
    """With ``engine``: the cluster, "auto" (the one that this machine belongs to, the default),
    "HOST:PORT" or "ray://HOST:PORT".
    """
    parts: int | None
    """With ``engine``: the number of parts; by default 4 for each that can run at a time."""
    verify_load: bool
    """Load the finished output as ``verify(output, load=True)`` does; an output that does not
    load or gives values that are not finite is an error, and stays.
    """


class _OfConvertLoad(TypedDict, total=False):
    """Options of ``convert`` and ``load``."""

    allow_nonfinite: bool
    """Leave a layer with NaN or Inf as it is instead of stopping."""
    allow_overflow: bool
    """Let values that a cast to ``dtype`` cannot hold become infinite."""
    chunk_bytes: int | None
    """Bytes that one worker takes and holds at a time; the result does not depend on it."""


class ConvertKeywords(_OfConvertPlanLoad, _OfConvertPlan, _OfConvert, _OfConvertLoad, total=False):
    """Keyword arguments of ``convert``."""


class PlanKeywords(_OfConvertPlanLoad, _OfConvertPlan, total=False):
    """Keyword arguments of ``plan``."""


class LoadKeywords(_OfConvertPlanLoad, _OfConvertLoad, total=False):
    """Keyword arguments of ``load``."""
