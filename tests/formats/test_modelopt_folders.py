"""ModelOpt folders against the values of ModelOpt itself."""

import json
import shutil
from pathlib import Path

import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.logits import check_logits
from tests.support.safetensors_files import read_folder


def test_nvfp4_with_a_tensor_scale_is_requantized(tmp_path: Path) -> None:
    """Dequantized it is ModelOpt's own values, bit for bit."""
    checked = check_fixture("modelopt-nvfp4", tmp_path, "re-encoded", largest_rms=0.016)
    assert checked.config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert not any(name.endswith("input_scale") for name in checked.weights)


def test_fp8_without_an_option_explains_the_choices(tmp_path: Path) -> None:
    source = fixture("modelopt-fp8") / "checkpoint"
    with pytest.raises(requant.UsageError, match="one scale a tensor"):
        requant.convert(source, tmp_path / "out", layout="keep")
    assert list(tmp_path.iterdir()) == []


def test_fp8_becomes_what_is_requested(tmp_path: Path) -> None:
    check_fixture("modelopt-fp8", tmp_path, "re-encoded", bits=8, largest_rms=0.016)


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-fp8"])
def test_the_side_file_alone_tells(name: str, tmp_path: Path) -> None:
    """Older folders have hf_quant_config.json, and nothing in config.json."""
    folder = tmp_path / "source"
    shutil.copytree(fixture(name) / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for source in (folder, fixture(name) / "checkpoint"):
        requant.convert(source, tmp_path / f"{source.name}-out", bits=8, layout="keep")
    first, second = (read_folder(tmp_path / f"{x}-out") for x in ("source", "checkpoint"))
    assert first.keys() == second.keys()
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-fp8"])
def test_logits(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path / "dense", 1e-6, dequantize=True, dtype="float32")
    check_logits(name, tmp_path / "eight", 5e-2, bits=8, group_size=32, dtype="float32")
