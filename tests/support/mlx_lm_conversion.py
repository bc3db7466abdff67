"""Carrying out a layout plainly, and mlx-lm's own conversion of the same folder, to be compared."""

import contextlib
import importlib
import inspect
import io
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import TensorInfo
from requant.layouts.conversion_trace import MLX_DTYPE
from requant.layouts.expert_forms import Adapter
from requant.layouts.layout import LibraryLayout, Request, Shown, library_layout
from requant.layouts.outputs import ByteCopy, ComputedByRule
from requant.libraries import MLX_LM as LIBRARY
from requant.quantization.config import Quantization
from requant.sources.open import read_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.mlx_reference import Weights, differences, to_numpy

# The installed mlx-lm; scripts/test-oldest-mlx-lm runs these tests with the oldest.
MLX_LM, MLX = (tuple(map(int, version(x).split(".")[:3])) for x in ("mlx-lm", "mlx"))
# Published forms that mlx-lm itself rejects before 0.32.
NEW_FORMS = {"mistral3", "qwen3_vl", "qwen3_vl_moe"} if MLX_LM < (0, 32) else set()


def as_array(data: bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """The array that ``data`` is the row-major bytes of."""
    if not data:
        return mx.zeros(shape, MLX_DTYPE[dtype])
    flat = mx.array(np.frombuffer(data, np.uint8))
    with mx.stream(mx.cpu):
        if dtype == "BOOL":
            return flat.astype(mx.bool_).reshape(shape)
        return flat.view(MLX_DTYPE[dtype]).reshape(shape)


class Source:
    """A folder's tensors as bytes, and a count of what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(folder)
        self.folder = folder
        self.infos = {name: tensor.info for name, tensor in self.checkpoint.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a tensor's data."""
        tensor = self.checkpoint.tensors[name]
        stop = tensor.info.nbytes if stop is None else stop
        with (self.folder / tensor.file).open("rb") as file:
            file.seek(tensor.offset + start)
            return file.read(stop - start)

    def load(self, name: str) -> mx.array:
        """A tensor as ``mx.load`` gives it."""
        info = self.infos[name]
        return as_array(self.read(name), info.dtype, info.shape)


def carry_out(layout: LibraryLayout, source: Source) -> Weights:
    """Every tensor that the layout promises, in its final form."""
    result: Weights = {}
    for name, tensor in layout.tensors.items():
        if isinstance(tensor, ByteCopy):
            data = b"".join(
                source.read(e.tensor, *pair) for e in tensor.extents for pair in e.ranges
            )
            array = as_array(data, tensor.info.dtype, tensor.info.shape)
        else:
            assert isinstance(tensor, ComputedByRule)
            array = layout.compute(name, source.load)
            assert (tuple(array.shape), array.dtype) == (
                tensor.info.shape,
                MLX_DTYPE[tensor.info.dtype],
            )
        result[name] = array.astype(MLX_DTYPE[layout.dtypes[name]])
    for layer, target in layout.targets.items():
        dense = result.pop(f"{layer}.weight")
        parts = mx.quantize(dense, target.group_size, target.bits, mode=target.mode.value)
        roles = ("weight", "scales", "biases")
        result |= {f"{layer}.{role}": part for role, part in zip(roles, parts, strict=False)}
    return result


def mlx_lm_layout(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    quantization: Quantization | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    adapt: Adapter | None = None,
) -> LibraryLayout:
    """mlx-lm's layout of a config and headers."""
    request = Request(quantization, recipe, dtype)
    return library_layout(LIBRARY, Shown(config, tensors), request, adapt)


def load_config(folder: Path) -> dict[str, Any]:
    """``config.json`` with the tokens of ``generation_config.json``, as mlx-lm merges them."""
    from mlx_lm.utils import load_config as mlx_lm_load_config

    config: dict[str, Any] = mlx_lm_load_config(folder)
    return config


def convert_with_mlx_lm(
    folder: Path,
    quantization: Quantization | None,
    recipe: str | None = None,
    dtype: str | None = None,
) -> tuple[Weights, dict[str, Any]]:
    """The weights and config that ``mlx_lm.convert`` would save, by its own functions.

    The tokenizer is left out of it; steps and order are those of ``mlx_lm.convert.convert``.
    """
    from mlx_lm import utils
    from mlx_lm.convert import mixed_quant_predicate_builder

    with contextlib.redirect_stdout(io.StringIO()):
        model, config = utils.load_model(folder, lazy=True)
        predicate = None
        if recipe is not None:
            assert quantization is not None
            predicate = mixed_quant_predicate_builder(recipe, model, quantization.group_size)
        word = dtype or config.get("torch_dtype")
        if word is None and (text := config.get("text_config")):
            word = text.get("dtype")
        if word in ("float16", "bfloat16", "float32"):
            exempt: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

            def cast(path: str, array: mx.array) -> mx.array:
                floating = mx.issubdtype(array.dtype, mx.floating)
                return array.astype(getattr(mx, word)) if exempt(path) and floating else array

            model.update(tree_map_with_path(cast, model.parameters()))
        if quantization is not None:
            model, config = utils.quantize_model(
                model,
                config,
                quantization.group_size,
                quantization.bits,
                mode=quantization.mode.value,
                quant_predicate=predicate,
            )
        target = folder / "written.json"
        options = {}
        if "keep_vision_config" in inspect.signature(utils.save_config).parameters:
            options["keep_vision_config"] = "vision_tower" in getattr(model, "model", {})
        utils.save_config(config, target, **options)
    written = json.loads(target.read_text())
    target.unlink()
    return dict(tree_flatten(model.parameters())), written


def compare(
    folder: Path,
    quantization: Quantization | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
) -> tuple[LibraryLayout, list[str]]:
    """Lay out and carry out a folder our way and mlx-lm's way; the layout and the differences."""
    source = Source(folder)
    words = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    with mx.stream(mx.cpu):
        layout = mlx_lm_layout(
            load_config(folder),
            source.infos,
            quantization=quantization,
            recipe=recipe,
            dtype=words[dtype] if dtype else None,
        )
        theirs, config = convert_with_mlx_lm(folder, quantization, recipe, dtype)
        ours = carry_out(layout, source)
    found = differences(ours, theirs)
    promised = {name: (info.shape, MLX_DTYPE[info.dtype]) for name, info in layout.saved.items()}
    if promised != {name: (tuple(x.shape), x.dtype) for name, x in theirs.items()}:
        found.append("saved: other names, shapes or dtypes than written")
    if layout.config != config:
        found.append("config: differs")
    return layout, found


def write_mlx_checkpoint(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> None:
    """A checkpoint folder with one weight file."""
    write_checkpoint(folder, {name: to_numpy(array) for name, array in weights.items()}, config)


def random_like(name: str, shape: tuple[int, ...], dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Random values that depend on the name alone; no exact zeros, ones or repeats."""
    seed = int.from_bytes(name.encode()[-8:], "little") ^ hash_of(name)
    values = np.random.default_rng(seed).normal(scale=0.05, size=shape).astype(np.float32)
    return mx.array(values).astype(dtype)


def hash_of(text: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(text.encode(), "little") % (2**61 - 1)


def class_checkpoint(
    folder: Path, config: Mapping[str, Any], dtype: mx.Dtype = mx.bfloat16
) -> None:
    """A random checkpoint with the names and shapes that mlx-lm's class has."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        floating = mx.issubdtype(array.dtype, mx.floating)
        weights[name] = random_like(name, tuple(array.shape), dtype) if floating else array
    write_mlx_checkpoint(folder, config, weights)
