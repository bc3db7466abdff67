"""Llama 4 in fbgemm's FP8: experts that mlx-lm's class wants as they are named and transposed."""

from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import requant
from tests.support.mlx_reference import float_values
from tests.support.number_formats import e4m3
from tests.support.safetensors_files import read_file, read_folder, write_file

pytest.importorskip("mlx_lm")

EXPERTS = "language_model.model.layers.1.feed_forward.experts"


def folders(tmp_path: Path, exponents: bool = False) -> tuple[Path, Path]:
    """A small Llama 4 with FP8 experts, and its dense counterpart in float32."""
    from tests.support.families import small_config
    from tests.support.mlx_lm_conversion import write_mlx_checkpoint
    from tests.support.published_models import published

    published(tmp_path / "plain", "llama4", small_config("llama4"))
    config = small_config("llama4")
    weights = read_file(tmp_path / "plain" / "model.safetensors")
    stored, dense = dict(weights), dict(weights)
    for seed, (name, array) in enumerate(weights.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        count, _, n_out = array.shape
        factors = np.random.default_rng(seed).uniform(0.001, 0.002, (count, 1, n_out))
        if exponents:
            factors = np.exp2(np.rint(np.log2(factors)))
        codes, scales = e4m3(*array.shape, seed=seed), factors.astype(np.float32)
        is_down = name.endswith("down_proj")
        stored[name] = codes
        stored[f"{name}_scale"] = scales.reshape(count, n_out, 1) if is_down else scales
        dense[name] = (codes.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
    write_mlx_checkpoint(
        tmp_path / "fp8", config | {"dtype": "bfloat16"} | BLOCK, {"x": mx.zeros(1)}
    )
    write_mlx_checkpoint(tmp_path / "dense", config | {"dtype": "bfloat16"}, {"x": mx.zeros(1)})
    write_file(tmp_path / "fp8" / "model.safetensors", stored)
    write_file(tmp_path / "dense" / "model.safetensors", dense)
    return tmp_path / "fp8", tmp_path / "dense"


BLOCK = {"quantization_config": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": []}}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", [{"bits": 8}, {"mode": "mxfp4"}, {"dequantize": True}], ids=str)
def test_experts_as_from_dense_weights(options: dict[str, Any], tmp_path: Path) -> None:
    """Each tensor is what the dense bfloat16 counterpart gives, byte for byte; mlx-lm loads it."""
    from mlx_lm.utils import load_model

    source, counterpart = folders(tmp_path)
    if "dequantize" not in options:
        options = options | {"only": [r"experts\."]}
    requant.convert(source, tmp_path / "out", layout="mlx-lm", chunk_bytes=3000, **options)
    requant.convert(counterpart, tmp_path / "wanted", layout="mlx-lm", **options)
    made, wanted = read_folder(tmp_path / "out"), read_folder(tmp_path / "wanted")
    assert made.keys() == wanted.keys()
    assert f"{EXPERTS}.gate_proj.weight" in made
    assert [name for name in made if made[name].tobytes() != wanted[name].tobytes()] == []
    load_model(tmp_path / "out", strict=True)


def test_powers_of_two_need_no_option(tmp_path: Path) -> None:
    """mxfp8 holds the values; they are recomputed, because sanitize() transposes them."""
    source, counterpart = folders(tmp_path, exponents=True)
    report = requant.convert(source, tmp_path / "out", layout="mlx-lm")
    requant.convert(counterpart, tmp_path / "wanted", layout="mlx-lm", dequantize=True)
    made, wanted = read_folder(tmp_path / "out"), read_folder(tmp_path / "wanted")
    spec = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    for name in ("gate_proj", "up_proj", "down_proj"):
        values = float_values(made, f"{EXPERTS}.{name}", spec)
        assert np.array_equal(values, wanted[f"{EXPERTS}.{name}.weight"].astype(np.float32))
    found = {x.layer: x.exactness for x in report.plan.layers}
    assert found[f"{EXPERTS}.up_proj"] == "re-encoded"


def test_without_an_option_the_choices_are_named(tmp_path: Path) -> None:
    source, _ = folders(tmp_path)
    with pytest.raises(requant.RequantError, match="say what it becomes") as rejected:
        requant.convert(source, tmp_path / "out", layout="mlx-lm")
    assert "experts" in str(rejected.value)
