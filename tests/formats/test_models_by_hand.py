"""Whole models of tools without a fixture, written by hand: mlx-lm's logits of their values."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import requant
from tests.support.checkpoints import write_checkpoint
from tests.support.families import model_types, small_config
from tests.support.fixture_folders import fixture
from tests.support.hub_forms import FORMS, W123, W_EXPERTS, Form, unstacked
from tests.support.layers import compressed_tensors, quark
from tests.support.logits import logits
from tests.support.mlx_lm_conversion import class_checkpoint
from tests.support.number_formats import BF16, E2M1, e4m3
from tests.support.safetensors_files import read_file

pytestmark = pytest.mark.sweep(1)

Tensors = dict[str, np.ndarray]
# Output rows, inputs and a source of random numbers -> tensors by what is added to the layer's
# path, and the values that they represent.
Coder = Callable[[int, int, np.random.Generator], tuple[Tensors, np.ndarray]]


def scales_of(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.uniform(0.004, 0.01, shape)


def spread(scales: np.ndarray, group: int) -> np.ndarray:
    return scales.astype(np.float32).repeat(group, axis=1)


def fp4(n_out: int, n_in: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and the elements in them."""
    packed = random.integers(0, 256, (n_out, n_in // 2), np.uint8)
    return packed, E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(n_out, n_in)]


def exponents(low: int, n_out: int, n_in: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(low, low + 3, (n_out, n_in // 32), np.uint8)


def powers(stored: np.ndarray) -> np.ndarray:
    return spread(np.exp2(stored.astype(np.float32) - 127), 32)


def mxfp4(codes: str, scales: str) -> Coder:
    def coder(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        packed, elements = fp4(n_out, n_in, random)
        stored = exponents(119, n_out, n_in, random)
        return {codes: packed, scales: stored}, elements * powers(stored)

    return coder


def mxfp8(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    weight = e4m3(n_out, n_in, seed=int(random.integers(1 << 31)))
    stored = exponents(111, n_out, n_in, random)
    values = weight.astype(np.float32) * powers(stored)
    return {"weight": weight, "weight_scale_inv": stored}, values


def ct_int4(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    signed = random.integers(-8, 8, (n_out, n_in))
    scales = scales_of(random, n_out, n_in // 32).astype(BF16)
    tensors = compressed_tensors.packed(signed, 4, scales)
    values = signed * spread(scales, 32)
    return {name.removeprefix("up."): array for name, array in tensors.items()}, values


def quark_int4(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    codes = random.integers(-8, 8, (n_in, n_out))
    scales = scales_of(random, n_in // 32, n_out).astype(np.float16)
    tensors = {"weight": quark.pack_words(codes, "reorder"), "weight_scale": scales}
    return tensors, codes.T * spread(scales.T, 32)


def quark_int8(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    codes = random.integers(-128, 128, (n_out, n_in)).astype(np.int8)
    scales = (scales_of(random, n_out) / 16).astype(np.float32)
    return {"weight": codes, "weight_scale": scales}, codes * spread(scales[:, None], n_in)


def quark_fp8(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    weight = e4m3(n_out, n_in, seed=int(random.integers(1 << 31)))
    scales = (scales_of(random, n_out) / 64).astype(np.float32)
    values = weight.astype(np.float32) * spread(scales[:, None], n_in)
    return {"weight": weight, "weight_scale": scales}, values


def nvfp4(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    packed, elements = fp4(n_out, n_in, random)
    scales = e4m3(n_out, n_in // 16, seed=int(random.integers(1 << 31)))
    scales = (scales.view(np.uint8) & 0x7F).view(scales.dtype)
    factor = np.array(3e-5, np.float32)
    values = elements * (scales.astype(np.float32) * factor).repeat(16, axis=1)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": factor}, values


def fp_quant(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    tensors, values = mxfp4("qweight", "scales")(n_out, n_in, random)
    tensors["weight_global_scale"] = np.ones(1, BF16)
    tensors["forward_hadamard_matrix"] = np.eye(32, dtype=BF16)
    return tensors, values


def metal(n_out: int, n_in: int, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    codes = random.integers(0, 16, (n_out, n_in), np.uint8)
    scales = scales_of(random, n_out, n_in // 32).astype(np.float32)
    biases = -7 * scales
    words = np.packbits(
        ((codes[..., None] >> np.arange(4, dtype=np.uint8)) & 1).reshape(n_out, -1),
        axis=1,
        bitorder="little",
    ).view(np.uint32)
    tensors = {"weight": words, "scales": scales, "qbiases": biases}
    return tensors, codes * spread(scales, 32) + spread(biases, 32)


def encoded(tensors: Tensors, pattern: str, coder: Coder) -> tuple[Tensors, Tensors]:
    """The matrices that ``pattern`` finds as ``coder`` stores them, and the same as values."""
    stored, dense = {}, {}
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        if path == name or not re.search(pattern, path):
            stored[name] = dense[name] = array
            continue
        random = np.random.default_rng(zlib.crc32(path.encode()))
        parts, values = coder(*array.shape, random)
        dense[name] = values.astype(np.float32)
        stored |= {f"{path}.{part}": made for part, made in parts.items()}
    assert stored.keys() != dense.keys()
    return stored, dense


def check(
    config: dict[str, Any],
    block: dict[str, Any],
    both: tuple[Tensors, Tensors],
    room: float,
    tmp_path: Path,
    **options: Any,
) -> tuple[Path, np.ndarray]:
    """Convert and compare; the source's folder and the logits of the dense values."""
    stored, dense = both
    wanted = logits(write_checkpoint(tmp_path / "dense", dense, config))
    quantized = config | {"quantization_config": block}
    source = write_checkpoint(tmp_path / "source", stored, quantized)
    requant.convert(source, tmp_path / "out", layout="mlx-lm", **options)
    error = np.abs(logits(tmp_path / "out") - wanted).max() / np.abs(wanted).max()
    assert error <= room, error
    return source, wanted


FLOAT32 = {"dtype": "float32"}
EIGHT_BITS = {"bits": 8, "group_size": 32, "dtype": "float32"}
NVFP4_LEVELS = [
    {"dtype": "fp4", "qscheme": "per_group", "group_size": 16},
    {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
]
# name -> block, coder, how far logits may be off (relative to the largest), options
LLAMAS: dict[str, tuple[dict[str, Any], Coder, float, dict[str, Any]]] = {
    "quark int4": (quark.block("int4", pack="reorder"), quark_int4, 1e-4, FLOAT32),
    "quark int8": (quark.block("int8", "per_channel"), quark_int8, 1e-4, FLOAT32),
    "quark fp4": (quark.block("fp4"), mxfp4("weight", "weight_scale"), 1e-4, {}),
    "quark fp8": (quark.block("fp8_e4m3", "per_channel"), quark_fp8, 0.05, EIGHT_BITS),
    "quark nvfp4": (quark.block(NVFP4_LEVELS), nvfp4, 0.05, {}),
    "fp-quant": (
        {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "transform_init": "identity"},
        fp_quant,
        1e-4,
        {},
    ),
    "metal": ({"quant_method": "metal", "bits": 4, "group_size": 32}, metal, 1e-4, FLOAT32),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llamas(name: str, tmp_path: Path) -> None:
    block, coder, room, options = LLAMAS[name]
    source = fixture("ct-mxfp8")
    config = json.loads((source / "checkpoint" / "config.json").read_text())
    del config["quantization_config"]
    tensors = read_file(source / "checkpoint" / "model.safetensors")
    tensors = {key: array for key, array in tensors.items() if not key.endswith("_scale")}
    both = encoded(tensors, "_proj$", coder)
    check(config, block, both, room, tmp_path, **options)


K3_EXPERTS = unstacked(
    r"(?P<pre>.*)\.mlp\.switch_mlp\.(?P<proj>\w+)\.(?P<part>\w+)",
    "{pre}.block_sparse_moe.experts.{e}.{proj}.{part}",
    W123,
)
KIMI_K2 = compressed_tensors.block(group_size=32) | {
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up)_proj.*",
    ]
}
KIMI_K3 = compressed_tensors.block("mxfp4-pack-quantized", type="float", group_size=32)
# model type -> form of its names, block, pattern of what is quantized, coder
PUBLISHED: dict[str, tuple[Form, dict[str, Any], str, Coder]] = {
    "deepseek_v3": (FORMS["deepseek_v3"], KIMI_K2, r"\.experts\.", ct_int4),
    "kimi_k3": (K3_EXPERTS, KIMI_K3, r"\.experts\.", mxfp4("weight_packed", "weight_scale")),
    "minimax_m3_vl": (W_EXPERTS, {"quant_method": "mxfp8"}, r"\.experts\.|_proj$", mxfp8),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_experts(model_type: str, tmp_path: Path) -> None:
    """Kimi K2 and K3 and MiniMax M3 as published; mlx-lm reads their folders itself."""
    if model_type not in model_types():
        pytest.skip("mlx-lm has no such class yet")
    form, block, pattern, coder = PUBLISHED[model_type]
    config = small_config(model_type)
    class_checkpoint(tmp_path / "class", config)
    weights = form(mx.load(str(tmp_path / "class" / "model.safetensors")))
    mx.save_safetensors(str(tmp_path / "class" / "model.safetensors"), weights)
    tensors = read_file(tmp_path / "class" / "model.safetensors")
    source, wanted = check(config, block, encoded(tensors, pattern, coder), 1e-4, tmp_path)
    theirs = logits(source)
    assert np.abs(theirs - wanted).max() <= 1e-4 * np.abs(wanted).max()
