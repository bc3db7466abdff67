"""More bits or smaller groups than the source has: codes, scales and biases are moved unchanged.

The referee is ``mx.dequantize`` of the source's own tensors, bit for bit and in the same dtype.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.quantization.config import Quantization
from tests.support import fixture_folders
from tests.support.checkpoints import tree
from tests.support.fixture_folders import fixture
from tests.support.layers import packers
from tests.support.mlx_reference import load, same, to_mx
from tests.support.number_formats import bf16
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import write_file

pytestmark = pytest.mark.sweep(1)

BITS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
PAIRS = [(bits, group) for bits in BITS for group in GROUPS]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
Weights = dict[str, mx.array]


def mlx_folder(folder: Path, weights: Weights, block: Mapping[str, Any]) -> Path:
    """A folder as MLX writes it."""
    folder.mkdir()
    config = {"model_type": "llama", "quantization": block}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def every_pair(folder: Path, dtype: mx.Dtype) -> Path:
    """A layer of each width and group, of values with both signs."""
    weights: Weights = {}
    block: dict[str, Any] = {"group_size": 64, "bits": 4}
    for number, (bits, group) in enumerate(PAIRS):
        path = f"model.b{bits}g{group}_proj"
        dense = to_mx(bf16(12, 256, seed=number).astype(np.float32)).astype(dtype)
        parts = mx.quantize(dense, group_size=group, bits=bits)
        weights |= {f"{path}.{role}": part for role, part in zip(ROLES, parts, strict=True)}
        block[path] = {"group_size": group, "bits": bits}
    return mlx_folder(folder, weights, block)


ROLES = ("weight", "scales", "biases")


def values(weights: Weights, path: str, group: int, bits: int, mode: str = "affine") -> mx.array:
    parts = [weights.get(f"{path}.{role}") for role in ROLES]
    return mx.dequantize(*parts, group_size=group, bits=bits, mode=mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_group(dtype: str, tmp_path: Path) -> None:
    source = every_pair(tmp_path / "source", DTYPES[dtype])
    before = load(source)
    for bits, group in PAIRS:
        out = tmp_path / f"{bits}-{group}"
        report = requant.convert(source, out, bits=bits, group_size=group, layout="keep")
        after, outcome = load(out), {x.layer: x for x in report.plan.layers}
        for old_bits, old_group in PAIRS:
            path = f"model.b{old_bits}g{old_group}_proj"
            holds = bits >= old_bits and old_group % group == 0
            assert outcome[path].exactness == ("exact" if holds else "re-encoded"), path
            assert outcome[path].treatment == ("kept" if holds else "requantized"), path
            assert outcome[path].target == f"affine {bits}-bit g{group}"
            if holds:
                wanted = values(before, path, old_group, old_bits)
                assert same(values(after, path, group, bits), wanted), (path, bits, group)
        assert set(report.errors) == {x for x in outcome if outcome[x].exactness == "re-encoded"}


def test_scales_and_biases_of_two_dtypes_keep_them(tmp_path: Path) -> None:
    """MLX rounds the product to the dtype of the scales: as float32 the values were others."""
    dense = to_mx(bf16(8, 128)).astype(mx.float16)
    words, scales, biases = mx.quantize(dense, group_size=64, bits=4)
    weights = {"up.weight": words, "up.scales": scales, "up.biases": biases.astype(mx.float32)}
    source = mlx_folder(tmp_path / "source", weights, {"group_size": 64, "bits": 4})
    requant.convert(source, tmp_path / "out", bits=6, group_size=32, layout="keep")
    after = load(tmp_path / "out")
    assert (after["up.scales"].dtype, after["up.biases"].dtype) == (mx.float16, mx.float32)
    assert same(values(after, "up", 32, 6), values(weights, "up", 64, 4))


def test_another_dtype_rounds_the_scales_and_says_so(tmp_path: Path) -> None:
    source = every_pair(tmp_path / "source", mx.float32)
    out = tmp_path / "out"
    options: dict[str, Any] = {"bits": 8, "group_size": 32, "layout": "keep"}
    report = requant.convert(source, out, dtype="bfloat16", **options)
    assert {x.exactness for x in report.plan.layers} == {"rounded"}
    path, before = "model.b3g64_proj", load(source)
    scales = mx.repeat(before[f"{path}.scales"].astype(mx.bfloat16), 2, axis=-1)
    assert same(load(out)[f"{path}.scales"], scales)


def test_mxfp4_is_mxfp8_of_the_same_values(tmp_path: Path) -> None:
    """Every code under every scale; 255, NaN, is rejected."""
    nibbles = np.tile(np.arange(16, dtype=np.uint32), (255, 2)).reshape(255, 4, 8)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32)
    weights = {"up.weight": mx.array(words)}
    weights["up.scales"] = mx.array(np.arange(255, dtype=np.uint8)[:, None])
    block = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    source = mlx_folder(tmp_path / "source", weights, block)
    report = requant.convert(source, tmp_path / "out", mode="mxfp8", layout="keep")
    assert [x.exactness for x in report.plan.layers] == ["exact"]
    after = load(tmp_path / "out")
    assert after["up.weight"].shape == (255, 8)
    for dtype in DTYPES.values():
        before, now = (
            mx.dequantize(
                x["up.weight"], x["up.scales"], group_size=32, bits=b, mode=m, dtype=dtype
            )
            for x, b, m in ((weights, 4, "mxfp4"), (after, 8, "mxfp8"))
        )
        assert same(before[:255], now[:255])


@pytest.mark.parametrize("options", [{"bits": 8, "group_size": 64}, {"mode": "nvfp4"}], ids=str)
def test_what_holds_no_e2m1_under_a_power_of_two_is_encoded_again(
    options: dict[str, Any], tmp_path: Path
) -> None:
    words, scales = mx.quantize(to_mx(bf16(8, 64)), group_size=32, bits=4, mode="mxfp4")
    block = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    source = mlx_folder(tmp_path / "source", {"up.weight": words, "up.scales": scales}, block)
    (layer,) = requant.plan(source, layout="keep", **options).layers
    assert layer.exactness == "re-encoded"


def test_chunks_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    source = every_pair(tmp_path / "source", mx.bfloat16)
    options: dict[str, Any] = {"bits": 8, "group_size": 32, "layout": "keep"}
    requant.convert(source, tmp_path / "once", threads=1, **options)
    once = tree(tmp_path / "once")["model.safetensors"]
    for number, chunk in enumerate((1, 700, 5000, 1 << 20)):
        out = tmp_path / f"{number}"
        requant.convert(source, out, chunk_bytes=chunk, threads=1 + number, **options)
        assert tree(out)["model.safetensors"] == once, chunk
    assert not requant.verify(source, tmp_path / "once").problems
    shards = tmp_path / "shards"
    requant.convert(source, shards, shard_size=40000, **options)
    parts = load(shards)
    assert all(same(parts[name], array) for name, array in load(tmp_path / "once").items())


def test_a_stack_of_experts(tmp_path: Path) -> None:
    parts = mx.quantize(to_mx(bf16(3, 8, 128)), group_size=128, bits=3)
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    weights = {f"{path}.{role}": part for role, part in zip(ROLES, parts, strict=True)}
    source = mlx_folder(tmp_path / "source", weights, {"group_size": 128, "bits": 3})
    out = tmp_path / "out"
    requant.convert(source, out, bits=5, group_size=32, layout="keep", chunk_bytes=600)
    assert same(values(load(out), path, 32, 5), values(weights, path, 128, 3))


def test_a_search_has_nothing_to_do(tmp_path: Path) -> None:
    source = every_pair(tmp_path / "source", mx.bfloat16)
    options: dict[str, Any] = {"bits": 8, "group_size": 32, "layout": "keep"}
    plain = requant.convert(source, tmp_path / "plain", **options)
    report = requant.convert(source, tmp_path / "best", search="best", **options)
    one, other = (tree(tmp_path / x)["model.safetensors"] for x in ("plain", "best"))
    assert one == other
    assert not any("nothing to search" in note for note in note_texts(plain.plan.notes))
    assert any("nothing to search" in note for note in note_texts(report.plan.notes))


def test_an_override_and_a_recipe_move_codes_too(tmp_path: Path) -> None:
    source = every_pair(tmp_path / "source", mx.bfloat16)
    plan = requant.plan(source, layout="keep", overrides=["b4g64=8:32", "b2g64=6:64"])
    assert {x.exactness for x in plan.layers} == {"exact"}
    targets = {x.layer: x.target for x in plan.layers}
    assert targets["model.b4g64_proj"] == "affine 8-bit g32"
    assert targets["model.b2g64_proj"] == "affine 6-bit g64"


def test_a_budget_spends_nothing_on_bits_that_hold_the_same(tmp_path: Path) -> None:
    """Four bits of the source are four bits, however many are to be had."""
    path = "model.layers.0.mlp.up_proj"
    parts = mx.quantize(to_mx(bf16(64, 256)), group_size=64, bits=4)
    weights = {f"{path}.{role}": part for role, part in zip(ROLES, parts, strict=True)}
    source = mlx_folder(tmp_path / "source", weights, {"group_size": 64, "bits": 4})
    (layer,) = requant.convert(source, tmp_path / "out", budget="8", layout="keep").plan.layers
    assert (layer.exactness, layer.target) == ("exact", "affine 4-bit g64")


# -- layers of other tools -------------------------------------------------------------------
BLOCKS: dict[str, dict[str, Any]] = {
    "gemm": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    "gemv": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "gptq 2": {"quant_method": "gptq", "bits": 2, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "gptq 3": {"quant_method": "gptq", "bits": 3, "group_size": 64, "checkpoint_format": "gptq_v2"},
}


def tool_folder(kind: str, folder: Path) -> Path:
    rng, block = np.random.default_rng(7), BLOCKS[kind]
    bits = int(block["bits"])
    codes = rng.integers(0, 1 << bits, (64, 128)).astype(np.int64)
    zeros = rng.integers(0, 1 << bits, (64, 2)).astype(np.int64)
    scales = (rng.random((64, 2)) * 0.01 + 0.001).astype(np.float16)
    if kind.startswith("gptq"):
        parts = packers.gptq(codes, zeros, scales, bits)
    else:
        parts = getattr(packers, kind)(codes, zeros, scales)
    folder.mkdir()
    config = {"model_type": "llama", "torch_dtype": "float16"}
    config["quantization_config"] = {"sym": False, "zero_point": True} | block  # type: ignore[assignment]
    (folder / "config.json").write_text(json.dumps(config))
    path = "model.layers.0.mlp.up_proj"
    write_file(folder / "model.safetensors", {f"{path}.{r}": x for r, x in parts.items()})
    return folder


@pytest.mark.parametrize("kind", BLOCKS)
def test_codes_of_other_tools(kind: str, tmp_path: Path) -> None:
    """Wider at once is what widening the plain conversion gives, and the same values."""
    source = tool_folder(kind, tmp_path / "source")
    path, bits = "model.layers.0.mlp.up_proj", int(BLOCKS[kind]["bits"])
    plain = requant.convert(source, tmp_path / "plain", layout="keep")
    options: dict[str, Any] = {"bits": 8, "group_size": 32, "layout": "keep"}
    report = requant.convert(source, tmp_path / "wide", chunk_bytes=9000, **options)
    assert {x.exactness for x in report.plan.layers} == {x.exactness for x in plain.plan.layers}
    assert {x.treatment for x in report.plan.layers} == {"kept"}
    wanted = values(load(tmp_path / "plain"), path, 64, bits)
    assert same(values(load(tmp_path / "wide"), path, 32, 8), wanted)
    assert not requant.verify(source, tmp_path / "wide").problems
    requant.convert(tmp_path / "plain", tmp_path / "twice", **options)
    one, two = (tree(tmp_path / x)["model.safetensors"] for x in ("wide", "twice"))
    assert one == two


@pytest.mark.parametrize("name", fixture_folders.NAMES)
def test_codes_of_every_fixture(name: str, tmp_path: Path) -> None:
    source = fixture(name) / "checkpoint"
    file = next(source.glob("*.gguf"), source)
    resolved = {"dequantize": True}
    try:
        plain = requant.convert(file, tmp_path / "plain", layout="keep")
    except requant.RequantError:
        assert requant.plan(file, layout="keep", **resolved)
        return  # FP8 that no mode of MLX holds: nothing is kept
    kept = {x.layer: x for x in plain.plan.layers if x.treatment == "kept"}
    quantization = plain.plan.quantization
    for bits, group in ((8, 32), (6, 64)):
        out = tmp_path / f"{bits}"
        report = requant.convert(file, out, bits=bits, group_size=group, layout="keep")
        outcome, before, after = (
            {x.layer: x for x in report.plan.layers},
            load(tmp_path / "plain"),
            load(out),
        )
        for path, old in kept.items():
            assert quantization is not None
            was = quantization.quantization_for(path)
            assert was is not None
            rotated = f"{path}.theta" in before  # other bits fold the rotation into the values
            if rotated or not Quantization.affine(group, bits).holds(was):
                assert outcome[path].exactness == "re-encoded"
                continue
            assert (outcome[path].treatment, outcome[path].exactness) == ("kept", old.exactness)
            wanted = values(before, path, was.group_size, was.bits)
            assert same(values(after, path, group, bits), wanted), path
