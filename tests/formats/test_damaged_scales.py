"""NaN and infinity among stored scales: the source's damage, whatever is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import requant
from requant.errors import RequantError
from tests.support.checkpoints import write_quantized
from tests.support.safetensors_files import read_folder
from tests.support.small_layers import FOLDERS, make_nonfinite, scales_of

pytestmark = pytest.mark.sweep(8)

NAMES = [(name, tensor) for name, make in FOLDERS.items() for tensor in scales_of(make()[0])]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bits": 8},
    {"dequantize": True},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"allow_overflow": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "tensor"), NAMES, ids=lambda x: x)
def test_the_source_is_called_damaged(
    name: str, tensor: str, value: float, options: Mapping[str, Any], tmp_path: Path
) -> None:
    tensors, config = FOLDERS[name]()
    tensors[tensor] = make_nonfinite(tensors[tensor], value, name)
    source = write_quantized(tmp_path / "source", tensors, None, **config)
    with pytest.raises(RequantError) as raised:
        requant.convert(source, tmp_path / "out", layout="keep", **options)
    declared = str(raised.value)
    assert "too large" not in declared
    assert "NaN" in declared or "finite" in declared, declared
    assert "damaged" in declared, declared
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "row"),
    [
        ("compressed-tensors", "up.weight_scale", 32),
        ("awq", "up.scales", 2),
        ("mlx affine", "up.scales", 32),
        ("mlx affine", "up.biases", 32),
        ("mlx nvfp4", "up.scales", 32),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"dequantize": True}], ids=str)
def test_tensor_and_row_are_named(
    name: str, tensor: str, row: int, options: Mapping[str, Any], tmp_path: Path
) -> None:
    tensors, config = FOLDERS[name]()
    tensors[tensor] = make_nonfinite(tensors[tensor], np.nan, name)
    source = write_quantized(tmp_path / "source", tensors, None, **config)
    with pytest.raises(RequantError) as raised:
        requant.convert(source, tmp_path / "out", layout="keep", chunk_bytes=600, **options)
    where = f"{tensor}: scales hold NaN or infinity (1 value, first in row {row}): the source is"
    assert where in str(raised.value)
    assert str(raised.value).count("\n  ") == 1


@pytest.mark.parametrize("name", ["compressed-tensors", "mlx affine", "awq"])
def test_it_may_be_kept_as_it_is(name: str, tmp_path: Path) -> None:
    """--allow-nonfinite: the other layers as asked for, this one as the source has it."""
    sound, config = FOLDERS[name]()
    (scales,) = [x for x in scales_of(sound) if not x.endswith("biases")]
    tensors = {k.replace("up.", "down."): v for k, v in sound.items()}
    tensors |= sound | {scales: make_nonfinite(sound[scales], np.nan)}
    source = write_quantized(tmp_path / "source", tensors, None, **config)
    for options in ({}, {"bits": 8}):
        out = tmp_path / f"out{len(options)}"
        report = requant.convert(source, out, layout="keep", allow_nonfinite=True, **options)
        assert report.findings["up"]["damaged"] >= 1
        made = read_folder(out)
        assert np.isnan(made["up.scales"].astype(np.float32)).any()
        assert np.isfinite(made["down.scales"].astype(np.float32)).all()


def test_a_large_scale_is_not_a_damage(tmp_path: Path) -> None:
    """Finite, and too large for float16: that is said, with the way out."""
    tensors, config = FOLDERS["compressed-tensors"]()
    tensors["up.weight_scale"] = tensors["up.weight_scale"].astype(np.float32)
    tensors["up.weight_scale"][3, 0] = 1e6
    source = write_quantized(tmp_path / "source", tensors, None, **config | {"dtype": "float16"})
    with pytest.raises(RequantError, match="too large for the dtype asked for"):
        requant.convert(source, tmp_path / "out", layout="keep")
    with pytest.raises(RequantError, match="too large for the dtype asked for"):
        requant.convert(source, tmp_path / "out", layout="keep", dequantize=True, dtype="float16")


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors", "hqq", "bitsandbytes"])
def test_in_memory(name: str) -> None:
    tensors, config = FOLDERS[name]()
    scales = scales_of(tensors)[0]
    tensors[scales] = make_nonfinite(tensors[scales], np.nan)
    with pytest.raises(RequantError, match=f"{scales}: scales hold NaN"):
        requant.transform_weights(tensors, config["quantization_config"])


def test_experts_that_a_class_computes(tmp_path: Path) -> None:
    """Damage in what a computed tensor is made from is found too."""
    dtype = ml_dtypes.bfloat16
    tensors, config = FOLDERS["mlx affine"]()
    tensors = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in tensors.items()}
    tensors["up.scales"] = make_nonfinite(tensors["up.scales"], np.nan)
    source = write_quantized(tmp_path / "source", tensors, None, **config)
    with pytest.raises(RequantError, match="damaged"):
        requant.convert(source, tmp_path / "out", budget=5, layout="keep")
