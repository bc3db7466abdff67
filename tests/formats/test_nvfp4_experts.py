"""NVFP4 experts with a tensor scale each: MLX's nvfp4 with a global scale in mlx-lm's stacks."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.checkpoints.checkpoint import StoredTensor
from requant.core.dtypes import TensorInfo
from requant.formats.base import RowRange, SourceLayer
from requant.formats.nvfp4_layers import kept_separate
from requant.packings.floats import GlobalScales, NvBlocks
from tests.support.checkpoints import model
from tests.support.number_formats import E2M1, e4m3
from tests.support.plan_texts import note_texts, reason_text
from tests.support.safetensors_files import read_file, read_folder, write_file

pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.skipif(
    tuple(map(int, version("mlx-lm").split(".")[:2])) < (0, 32), reason="no global scales yet"
)

BASE = "model.layers.0.mlp"
STACKS = ("gate_proj", "up_proj", "down_proj")
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
CT_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": CT_GROUP},
    },
}
ROLES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
}


def moe(folder: Path, tool: str, scales: Mapping[str, float] = {}, only: str = "") -> Path:
    """micro-moe with random NVFP4 codes in every projection that ``only`` matches.

    Args:
        folder: To be made.
        tool: Whose names and convention.
        scales: Layer path -> its tensor scale; others get one of their own, no power of two.
        only: Pattern on layer paths.
    """
    source = model("micro-moe")
    shutil.copytree(source, folder)
    tensors: dict[str, np.ndarray] = {}
    for seed, (name, array) in enumerate(read_file(source / "model.safetensors").items()):
        path = name.removesuffix(".weight")
        if not re.search(r"_proj$", path) or not re.search(only, path):
            tensors[name] = array
            continue
        n_out, n_in = array.shape
        factor = scales.get(path, 3e-5 * (seed % 97 + 1.1))
        factor = factor if tool == "modelopt" else 1 / factor
        random = np.random.default_rng(seed)
        parts = (
            random.integers(0, 256, (n_out, n_in // 2), np.uint8),
            e4m3(n_out, n_in // 16, seed=seed),
            np.array([factor] if tool != "modelopt" else factor, np.float32),
        )
        tensors |= {f"{path}.{role}": x for role, x in zip(ROLES[tool], parts, strict=True)}
    write_file(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": BLOCKS[tool]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expected(tensors: Mapping[str, np.ndarray], path: str, tool: str) -> np.ndarray:
    """``element * (group scale * factor)``, or divided, in float32 as the tools compute it."""
    packed, scale, factor = (tensors[f"{path}.{role}"] for role in ROLES[tool])
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    wide = scale.astype(np.float32)
    wide = wide / factor if tool != "modelopt" else wide * factor
    return np.asarray(E2M1[codes] * wide.repeat(16, axis=-1), np.float32)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("tool", ROLES)
def test_tensor_scales_become_global_scales(tool: str, tmp_path: Path) -> None:
    source = moe(tmp_path / "source", tool)
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm", chunk_bytes=5000)
    stored, made = read_file(source / "model.safetensors"), read_folder(tmp_path / "out")
    assert any(
        "12 stacks of experts keep their tensor scales" in x for x in note_texts(report.plan.notes)
    )
    planned = {layer.layer: layer for layer in report.plan.layers}
    for name in STACKS:
        path = f"{BASE}.switch_mlp.{name}"
        layer = planned[path]
        assert (layer.source, layer.target) == ("nvfp4 with a tensor scale", "nvfp4 4-bit g16")
        assert (layer.treatment, layer.exactness) == ("kept", "rounded")
        assert layer.bound == "tensor scale: 1/8388608 (float32) of itself"
        for expert in range(8):
            own = f"{BASE}.experts.{expert}.{name}"
            packed, scale, factor = (stored[f"{own}.{role}"] for role in ROLES[tool])
            assert made[f"{path}.weight"][expert].tobytes() == packed.tobytes()
            assert made[f"{path}.scales"][expert].tobytes() == scale.tobytes()
            largest = np.float32(2688)
            wanted = factor * largest if tool == "modelopt" else largest / factor
            assert made[f"{path}.global_scale"][expert] == wanted.reshape(()), own
            values = np.array(
                mx.dequantize(
                    mx.array(made[f"{path}.weight"][expert]),
                    mx.array(made[f"{path}.scales"][expert]),
                    **NVFP4,
                    global_scale=mx.array(made[f"{path}.global_scale"][expert]),
                    dtype=mx.float32,
                )
            )
            true = expected(stored, own, tool)
            assert (np.abs(values - true) <= np.abs(true) * 2.0**-22).all()  # bound, and sums
    dense = planned["model.layers.0.self_attn.q_proj"]  # nn.QuantizedLinear takes no such scale
    assert dense.exactness == "re-encoded" and "tensor scale" in reason_text(dense)


@pytest.mark.slow
def test_mlx_lm_loads_them_strictly(tmp_path: Path) -> None:
    """Whether nvfp4 is the block's default, or the experts have entries of their own."""
    from mlx_lm.utils import load_model

    entries = set[bool]()
    for name, only in (("all", ""), ("experts", "experts")):
        source = moe(tmp_path / name, "modelopt", only=only)
        for options in ({}, {"overrides": ["_proj$=8", "switch_mlp=nvfp4"]}):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            requant.convert(source, tmp_path / "out", layout="mlx-lm", **options)
            loaded, config = load_model(tmp_path / "out", strict=True)
            made = read_folder(tmp_path / "out")
            block = config["quantization"]
            for stack in STACKS:
                path = f"{BASE}.switch_mlp.{stack}"
                layer = getattr(loaded.layers[0].mlp.switch_mlp, stack)
                assert (layer.mode, layer.bits, layer.group_size) == ("nvfp4", 4, 16)
                assert np.array_equal(np.array(layer.global_scale), made[f"{path}.global_scale"])
                assert path not in block or block[path]["global_scale"] is True
                entries.add(path in block)
            again = requant.convert(tmp_path / "out", tmp_path / "again", layout="mlx-lm")
            kept = {layer.layer: layer.exactness for layer in again.plan.layers}
            assert kept[f"{BASE}.switch_mlp.up_proj"] == "exact"
            load_model(tmp_path / "again", strict=True)
            shutil.rmtree(tmp_path / "again")
    assert entries == {False, True}


def test_mlx_runs_global_scales_on_the_gpu_only() -> None:
    """What the plan's note says; were this to change, the note would have to."""
    words, scales = mx.zeros((2, 4, 4), mx.uint32), mx.zeros((2, 4, 2), mx.uint8)
    with pytest.raises(ValueError, match="GPU"):
        mx.eval(
            mx.gather_qmm(
                mx.ones((1, 1, 32)),
                words,
                scales,
                rhs_indices=mx.array([[0]]),
                **NVFP4,
                global_scale=mx.ones(2),
                stream=mx.cpu,
            )
        )


def test_experts_of_which_some_would_fold(tmp_path: Path) -> None:
    """One tensor scale that is a power of two does not change what becomes of the stack."""
    first = f"{BASE}.experts.0.up_proj"
    source = moe(tmp_path / "source", "modelopt", {first: 1.0}, only="experts")
    requant.convert(source, tmp_path / "out", layout="mlx-lm")
    made = read_folder(tmp_path / "out")
    assert made[f"{BASE}.switch_mlp.up_proj.global_scale"][0] == 2688
    assert made[f"{BASE}.switch_mlp.up_proj.global_scale"].shape == (8,)


def test_experts_that_all_fold_need_no_global_scale(tmp_path: Path) -> None:
    stored = read_file(model("micro-moe") / "model.safetensors")
    paths = [name.removesuffix(".weight") for name in stored]
    source = moe(tmp_path / "source", "modelopt", dict.fromkeys(paths, 1.0), only="experts")
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm")
    assert not any("global_scale" in name for name in read_folder(tmp_path / "out"))
    assert {x.exactness for x in report.plan.layers} == {"exact"}


@pytest.mark.slow
def test_other_options_decode_them(tmp_path: Path) -> None:
    source = moe(tmp_path / "source", "compressed-tensors", only="experts")
    stored = read_file(source / "model.safetensors")
    requant.convert(source, tmp_path / "dense", layout="mlx-lm", dequantize=True, dtype="float32")
    made = read_folder(tmp_path / "dense")
    for name in STACKS:
        for expert in range(8):
            true = expected(stored, f"{BASE}.experts.{expert}.{name}", "compressed-tensors")
            assert np.array_equal(made[f"{BASE}.switch_mlp.{name}.weight"][expert], true)
    requant.convert(source, tmp_path / "eight", layout="mlx-lm", bits=8)
    assert not any("global_scale" in name for name in read_folder(tmp_path / "eight"))
    kept = requant.plan(source, layout="keep")  # no stack, so no loader that takes the scale
    assert {x.target for x in kept.layers if "experts" in x.layer} == {"affine 8-bit g64"}


def stored_layer(name: str, experts: int, height: int, scales: int) -> SourceLayer:
    part = StoredTensor(f"{name}.scale_2", TensorInfo("F32", (scales,)), "f", 0)
    packing = NvBlocks(experts * height, 32, height, scales, scales)
    shape = (experts, height, 32)
    return SourceLayer(
        path=name,
        parts={"tensor_scale": part},
        encoding=None,
        shape=shape,
        dtype="BF16",
        packing=packing,
    )


def test_which_scale_each_matrix_takes() -> None:
    """Stacks split in halves, joined and thinned; and rows of two scales in one matrix."""
    two, other = stored_layer("two", 2, 4, 2), stored_layer("other", 1, 4, 1)
    shared = stored_layer("shared", 2, 4, 1)

    def taken(shape: tuple[int, ...], *runs: RowRange) -> list[tuple[str, int]] | None:
        layer = kept_separate(runs[0].layer, "x", shape, runs)
        if layer is None:
            return None
        found = [(run, n) for run in layer.global_scale for n in range(run.count)]
        assert all(isinstance(run.layer.packing, GlobalScales) for run, _ in found)
        return [(run.layer.path, run.start + n) for run, n in found]

    assert taken((2, 4, 32), RowRange(two, 0, 8)) == [("two", 0), ("two", 1)]
    halves = RowRange(two, 0, 2), RowRange(two, 4, 2)
    assert taken((2, 2, 32), *halves) == [("two", 0), ("two", 1)]
    assert taken((2, 2, 32), RowRange(two, 0, 4, 2)) == [("two", 0), ("two", 1)]
    assert taken((2, 2, 32), RowRange(two, 1, 4, 2)) == [("two", 0), ("two", 1)]
    both = RowRange(two, 4, 4), RowRange(other, 0, 4)
    assert taken((2, 4, 32), *both) == [("two", 1), ("other", 0)]
    assert taken((2, 4, 32), RowRange(shared, 0, 8)) == [("shared", 0), ("shared", 0)]
    assert taken((1, 8, 32), RowRange(shared, 0, 8)) == [("shared", 0)]
    assert taken((1, 8, 32), RowRange(two, 0, 8)) is None
    assert taken((1, 4, 32), RowRange(two, 2, 2), RowRange(other, 0, 2)) is None


@pytest.mark.parametrize(("shape", "width"), [((5,), 5), ((5, 1), 1), ((5, 1, 1), 1), ((1, 5), 5)])
def test_global_scales_out_of_any_shape(shape: tuple[int, ...], width: int) -> None:
    stored = np.array([1, 2, 3, 0.3, 5], np.float32).reshape(shape)
    matrix = stored.reshape(-1, shape[-1])
    for divides in (False, True):
        packing = GlobalScales(5, width, divides)
        wanted = np.float32(2688) / stored if divides else stored * np.float32(2688)
        for start in range(5):
            for stop in range(start + 1, 6):
                cut = packing.required_rects(start, stop)["tensor_scale"]
                parts = {"tensor_scale": matrix[slice(*cut.rows), slice(*cut.columns)]}
                out = np.empty((stop - start, 1), np.float32)
                packing.decode(parts, start, stop, out, None)  # type: ignore[arg-type]
                assert np.array_equal(out[:, 0], wanted.reshape(-1)[start:stop])
    assert replace(packing, divides=False) != packing
