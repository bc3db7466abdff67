"""Small checkpoints of every model that an MLX library has a class for, made from the class itself.

A config is the defaults of the class's config classes with every size that is known by its name
replaced by a small one, and then what the family needs beyond that (``OWN``). The names and shapes
of the tensors are the parameters of the model that the library builds from this config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import logging
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from requant.libraries import Library, Request
from tests.support import families as mlx_lm_families
from tests.support.checkpoints import write_checkpoint
from tests.support.families import COMMON
from tests.support.mlx_lm_conversion import random_like
from tests.support.mlx_reference import to_numpy

VOCAB = 384
MAX_VALUES = 130_000_000
WRAPPED = ("text", "vision", "audio", "projector", "perceiver")  # parts that mlx-vlm configures

# Sizes of towers, and of text models where they have other names; those of text are COMMON's.
SIZES: dict[str, Any] = {
    k: v for k, v in COMMON.items() if isinstance(v, int) and not isinstance(v, bool)
} | {
    "audio_embed_dim": 128,
    "attention_heads": 4,
    "block_dim": 128,
    "block_ff_dim": 256,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 2,
    "d_ff": 256,
    "d_kv": 32,
    "d_model": 128,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 256,
    "decoder_hidden_size": 128,
    "decoder_layers": 2,
    "depth": 2,
    "dim": 128,
    "embed_dim": 128,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "encoder_hidden_size": 128,
    "encoder_layers": 2,
    "global_head_dim": 32,
    "hidden_dim": 256,
    "hidden_size_per_layer_input": 32,
    "image_size": 56,
    "in_channels": 3,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "kv_lora_rank": 64,
    "laurel_rank": 16,
    "layers": 2,
    "mlp_dim": 256,
    "mm_hidden_size": 128,
    "n_audio_ctx": 64,
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_audio_state": 128,
    "n_heads": 4,
    "n_layers": 2,
    "n_mels": 80,
    "n_text_ctx": 64,
    "n_text_head": 4,
    "n_text_layer": 2,
    "n_text_state": 128,
    "n_vocab": VOCAB,
    "num_channels": 3,
    "num_heads": 4,
    "num_kv_shared_layers": 0,
    "num_position_embeddings": 64,
    "out_hidden_size": 128,
    "patch_size": 14,
    "projection_dim": 128,
    "projector_hidden_size": 128,
    "q_lora_rank": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "width": 128,
}
_PLAIN = {str: "x", int: 2, float: 1.0, bool: False, list: [], dict: {}}

_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"}}
_CLIP = {"vision_config": {"model_type": "clip_vision_model"}}
_XDROPE = {"xdrope_section": [4, 4, 4, 4]}  # halves of heads of 32
_DEEPSEEK_VIT = {"vision_config": {"model_type": "vision"}}
_PARAKEET = {
    "target": "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
    "model_defaults": {"tdt_durations": [0, 1, 2, 3, 4]},
    "preprocessor": {"sample_rate": 16000, "normalize": "per_feature", "features": 80}
    | {"window_size": 0.025, "window_stride": 0.01, "window": "hann", "n_fft": 512, "dither": 1e-5},
    "encoder": {"feat_in": 80, "n_layers": 2, "d_model": 128, "n_heads": 4}
    | {"ff_expansion_factor": 4, "subsampling_factor": 8, "self_attention_model": "rel_pos"}
    | {"subsampling": "dw_striding", "conv_kernel_size": 9, "subsampling_conv_channels": 64}
    | {"pos_emb_max_len": 500},
    "decoder": {"blank_as_pad": True, "vocab_size": 64}
    | {"prednet": {"pred_hidden": 64, "pred_rnn_layers": 2}},
    "joint": {"num_classes": 64, "vocabulary": [f"t{n}" for n in range(64)]}
    | {"num_extra_outputs": 5}
    | {
        "jointnet": {"joint_hidden": 64, "activation": "relu"}
        | {"encoder_hidden": 128, "pred_hidden": 64}
    },
    "decoding": {"model_type": "tdt", "durations": [0, 1, 2, 3, 4], "greedy": {}},
}

# What families need beyond the common sizes.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "mlx-vlm": {
        "aya_vision": _SIGLIP | {"text_config": {"sliding_window_pattern": 2}},
        "cohere2": {"text_config": {"sliding_window_pattern": 2}, "sliding_window_pattern": 2},
        "colidefics3": {"vision_config": {"model_type": "idefics3"}},
        "d1": {"text_config": _CONV},
        "d1_omni": {"text_config": _CONV},
        "deepseek_vl_v2": _DEEPSEEK_VIT,
        "deepseekocr": _DEEPSEEK_VIT,
        "deepseekocr_2": _DEEPSEEK_VIT,
        "gemma3n": {"text_config": {"intermediate_size": [128] * 4}},
        "glm4v_moe": {
            "text_config": {"rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
        },
        "glm5_next": {"text_config": {"num_key_value_heads": 4}, "num_key_value_heads": 4},
        "mimo_v2": {"text_config": mlx_lm_families.OWN["mimo_v2_flash"]},
        "paddleocr_vl": {"text_config": {"head_dim": 32, "hidden_act": "silu", "use_bias": False}},
        "gemma3": {
            "mm_tokens_per_image": 16,
            "vision_config": {"image_size": 224},
            "text_config": {"sliding_window_pattern": 2},
        },
        "hunyuan_vl": {"text_config": {"rope_scaling": _XDROPE}, "rope_scaling": _XDROPE},
        "internvl_chat": _SIGLIP,
        "kolibri1": _BOTH,
        "lfm2": _CONV,
        "lfm2_colbert": _CONV,
        "lfm2_embedding": _CONV,
        "lfm2_encoder": _CONV,
        "lfm2_moe": _CONV,
        "lfm2_vl": {"text_config": _CONV},
        "llava": _CLIP | {"text_config": {"model_type": "llama"}},
        "llava_bunny": _SIGLIP | {"text_config": {"model_type": "qwen2"}},
        "llava_next": _CLIP | {"text_config": {"model_type": "llama"}},
        "mistral3": {"text_config": {"rope_theta": 10000.0}},
        "olmo3": _BOTH,
    },
    "mlx-audio": {"parakeet": _PARAKEET},
    "mlx-embeddings": {"lfm2": _CONV},
}


# Folders by whose names a library knows a size.
FOLDERS = {"siglip": "siglip-base-patch14-56"}


def families(library: Library) -> list[str]:
    """The full name of every module or package of an installed library that may hold a model."""
    assert library.folder is not None
    places = [library.folder / "models"]
    if library.name == "mlx-audio":
        domains = importlib.import_module("mlx_audio.convert").Domain
        places = [library.folder / domain.value / "models" for domain in domains]
    found = []
    for place in places:
        for module in pkgutil.iter_modules([str(place)]):
            path = f"{library.package}.{'.'.join(place.relative_to(library.folder).parts)}"
            if module.name != "base":
                found.append(f"{path}.{module.name}")
    return found


def small_config(library: Library, package: str, wide: bool = False) -> dict[str, Any]:
    """A ``config.json`` for a small model.

    Args:
        library: The library.
        package: Full name of the model's package, one of :func:`families`.
        wide: Reduce settings too that only look like sizes by their names.

    Raises:
        LookupError: The package has no class of that kind.
    """
    module = importlib.import_module(package)
    family = package.rpartition(".")[2]
    config_class = config_class_of(module)
    config = shrunk(config_class, family, wide)
    known = {field for field, *_ in _fields(config_class)}
    for part in WRAPPED:
        cls = getattr(module, f"{part.title()}Config", None)
        if inspect.isclass(cls) and f"{part}_config" in known:
            config[f"{part}_config"] = shrunk(cls, family, wide)
    config["model_type"] = family
    text = config.get("text_config")
    own = mlx_lm_own(family)
    config = merged(config, {key: value for key, value in own.items() if key in config})
    if isinstance(text, dict):
        config["text_config"] = merged(text, own)
    return merged(config, OWN.get(library.name, {}).get(family, {}))


def mlx_lm_own(family: str) -> dict[str, Any]:
    """What mlx-lm's family of this name needs beyond the common sizes, for its text model."""
    known = mlx_lm_families.OWN
    own = known.get(family) or known.get(family.replace("_", "-"), {})
    if "text_config" not in own:
        return own
    text = dict(own["text_config"])
    return known.get(text.pop("of"), {}) | text


def config_class_of(module: types.ModuleType) -> type:
    """The class of a model's config."""
    for name in ("ModelConfig", "ModelArgs"):
        if inspect.isclass(getattr(module, name, None)) and hasattr(module, "Model"):
            found: type = getattr(module, name)
            return found
    raise LookupError("no config class next to a Model")


def shrunk(cls: type, family: str, wide: bool = False) -> dict[str, Any]:
    """The defaults of a config class, with small sizes, as far as they are JSON."""
    config: dict[str, Any] = {}
    for name, hint, default in _fields(cls):
        if name.startswith("quantization"):
            continue
        value = _value(name, hint, default, family, wide)
        with contextlib.suppress(TypeError, ValueError):
            config[name] = json.loads(json.dumps(value))
    return config


def _fields(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each setting; the default of a needed one is ``inspect._empty``."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:
        hints = {}
    if not dataclasses.is_dataclass(cls):
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                yield name, hints.get(name, parameter.annotation), parameter.default
        return
    for field in dataclasses.fields(cls):
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            with contextlib.suppress(Exception):
                default = field.default_factory()
        if field.init:
            yield field.name, hints.get(field.name), default


def _value(name: str, hint: Any, default: Any, family: str, wide: bool) -> Any:
    needed = default is inspect.Parameter.empty
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind)]
    nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        nested.insert(0, type(default))
    if nested and name.endswith("config"):
        return shrunk(nested[0], family, wide)
    if name == "tie_word_embeddings":
        return False
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if name in SIZES and (needed or number):
        return SIZES[name]
    if number and default >= VOCAB and name.endswith(("_id", "_index", "_token")):
        return VOCAB - 84
    if isinstance(default, dict):
        return _small_items(default, wide)
    if wide and default is None and name in SIZES:
        return SIZES[name]
    if wide and isinstance(default, int) and number:
        return _looks_like_size(name, default)
    if not needed:
        return default
    if name == "model_type":
        return family
    if name in COMMON:
        return COMMON[name]
    return next((_PLAIN[kind] for kind in kinds if kind in _PLAIN), None)


def _looks_like_size(name: str, value: int) -> int:
    """A small size for a setting that is one by its name, else the value."""
    for pattern, most in _WIDE:
        if re.search(pattern, name):
            return min(value, most)
    return value


# Names of sizes, and the most that each may be.
_WIDE = (
    (r"vocab", VOCAB),
    (r"layers|depth|n_layer|blocks$", 2),
    (r"heads|n_head", 4),
    (r"head_dim|head_size", 32),
    (r"experts$", 4),
    (r"ffn|ff_|intermediate|mlp", 256),
    (r"hidden|embed|model|dim|width|channels|d_|n_embd|state$", 128),
)


def _small_items(config: Mapping[str, Any], wide: bool) -> dict[str, Any]:
    """A config's nested dict with small sizes."""

    def small(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _small_items(value, wide)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        return SIZES[key] if key in SIZES else _looks_like_size(key, value) if wide else value

    return {key: small(key, value) for key, value in config.items()}


def merged(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some settings replaced; those of nested parts one by one."""
    result = dict(config)
    for key, value in own.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return result


class _BuiltError(BaseException):
    """The model is built: the first weights are asked for."""


def class_model(library: Library, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The model that a library builds for a config, its parameters not evaluated.

    The library's own convert runs on a folder without tensors, as far as its model is complete.

    Args:
        library: The library.
        config: ``config.json``.
        folder: Where the folder is written; its name may be one that the library looks at.
    """
    write_checkpoint(folder, {}, config)
    created: list[nn.Module] = []
    init = nn.Module.__init__

    def watch_init(module: nn.Module) -> None:
        created.append(module)
        init(module)

    def end(model: nn.Module, *_: Any, **__: Any) -> None:
        created[:] = [model]
        raise _BuiltError

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        for owner, name, function in (
            (mx, "load", lambda *_, **__: {}),
            (nn.Module, "__init__", watch_init),
            (nn.Module, "load_weights", end),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        if library.name == "mlx-vlm":  # it drops towers that get no tensor
            drop = "mlx_vlm.utils._drop_modules_without_weights"
            stack.enter_context(mock.patch(drop, lambda *_, **__: None))
        try:
            library.convert(folder, folder / "none", Request())
        except _BuiltError:
            pass
        except Exception as error:  # of a sanitize that misses a tensor; the model is complete
            trace = error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_name == "__init__":
                    raise
                trace = trace.tb_next
            if not created:
                raise
    return max(created, key=lambda module: len(tree_flatten(module.parameters())))


def accepts(library: Library, folder: Path, tensors: Mapping[str, mx.array]) -> str:
    """Why a library does not load tensors into the class of a folder's config; "" if it does."""
    load_weights = nn.Module.load_weights

    def end(model: nn.Module, weights: Any, *_: Any, **__: Any) -> None:
        load_weights(model, list(weights), strict=True)
        raise _BuiltError

    with (
        quiet(),
        mock.patch.object(mx, "load", lambda *_, **__: dict(tensors)),
        mock.patch.object(nn.Module, "load_weights", end),
    ):
        try:
            library.convert(folder, folder / "none", Request())
        except _BuiltError:
            return ""
        except Exception as error:
            return f"{error}"
    return "no weights are loaded"


def pytorch_convolutions(model: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors with those of convolutions as PyTorch stores them."""
    result = dict(tensors)
    for path, module in model.named_modules():
        kind = type(module).__name__
        for role in ("weight", "weight_g", "weight_v") if "Conv" in kind else ():
            array = result.get(f"{path}.{role}")
            if array is None or array.ndim < 3:
                continue
            last = array.ndim - 1
            if "ConvTranspose" in kind:  # [out, k, in] is [in, out, k] there
                array = mx.swapaxes(array, 0, last)
            result[f"{path}.{role}"] = mx.moveaxis(array, last, 1)  # [out, k, in]: [out, in, k]
    return result


def without_prefix(tensors: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """The tensors without a prefix of all or some of their names."""
    return {name.removeprefix(prefix): array for name, array in tensors.items()}


def class_checkpoint(
    library: Library, package: str, folder: Path, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a small random checkpoint that a library's class takes.

    Names and shapes are those of the class's parameters; but where the library takes them so,
    convolutions are as PyTorch stores them, which published checkpoints have.

    Args:
        library: The library.
        package: One of :func:`families`.
        folder: Where to write it.
        own: Settings of the config that differ.

    Returns:
        Its config.

    Raises:
        LookupError: The package has no class of that kind.
        ValueError: It would not be small, or the library does not take such tensors.
    """
    built = _built(library, package, folder, own or {})
    reasons = []
    for config, known in (built, (tied(built[0]), None)):
        model = known or class_model(library, config, folder)
        for form in _forms(model):
            reasons.append(accepts(library, folder, form))
            if not reasons[-1]:
                arrays = {name: to_numpy(array) for name, array in form.items()}
                write_checkpoint(folder, arrays, config, metadata={"format": "pt"})
                return config
    raise ValueError(f"not taken: {reasons[0]}")


def _forms(model: nn.Module) -> Iterator[dict[str, mx.array]]:
    """Random tensors for a model, as checkpoints may have them."""
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        floating = mx.issubdtype(array.dtype, mx.floating)
        tensors[name] = random_like(name, array.shape) if floating else array
    pytorch = pytorch_convolutions(model, tensors)
    head = next((name for name in tensors if name.endswith("lm_head.weight")), None)
    if head is not None:  # some rules make the head of the embedding, whatever there is
        yield {name: array for name, array in pytorch.items() if name != head}
    yield pytorch
    yield tensors
    for prefix in PREFIXES:
        yield without_prefix(pytorch, prefix)
        yield without_prefix(tensors, prefix)


# What the rules of some classes put before the names that are published.
PREFIXES = ("language_model.model.", "language_model.", "model.")


def tied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that the head is the embedding, wherever it says anything about it."""
    return {
        key: tied(value)
        if isinstance(value, dict)
        else True
        if key == "tie_word_embeddings"
        else value
        for key, value in config.items()
    }


def _built(
    library: Library, package: str, folder: Path, own: Mapping[str, Any]
) -> tuple[dict[str, Any], nn.Module]:
    """The first small config that the library builds a small model for, and the model."""
    first: Exception | None = None
    for wide in (False, True):
        config = merged(small_config(library, package, wide), own)
        text = config.get("text_config")
        variants = [config]
        if isinstance(text, dict):
            variants.append(text | config)  # the text model's settings are at the top
        for variant in variants:
            try:
                model = class_model(library, variant, folder)
                if not any("lm_head" in x for x, _ in tree_flatten(model.parameters())):
                    variant = tied(variant)
                    model = class_model(library, variant, folder)
                total = sum(x.size for _, x in tree_flatten(model.parameters()))
                if not 0 < total < MAX_VALUES:
                    raise ValueError(f"too large: {total:,} values")
                return variant, model
            except Exception as error:
                first = first or error
    assert first is not None
    raise first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries print and log."""
    said = io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        logging.disable(logging.NOTSET)
