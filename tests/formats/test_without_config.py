"""Folders whose config says nothing of quantization.

Tensors determine, or the folder is rejected.
"""

import json
import shutil
from pathlib import Path

import pytest

import requant
from tests.support import fixture_folders
from tests.support.fixture_folders import fixture
from tests.support.safetensors_files import read_folder

FAMILIES = ("bitnet", "ct-", "fp8", "modelopt", "mxfp4", "torchao")
NAMES = [name for name in fixture_folders.NAMES if name.startswith(FAMILIES)]
# Bytes with a float scale, ternary or FP8, and int8 with one, integers or packed FP4.
AMBIGUOUS = {"bitnet-autobitlinear", "bitnet-bitlinear", "ct-int-quantized"}


def without_config(name: str, folder: Path) -> Path:
    """A copy of the fixture without its quantization block and side file."""
    shutil.copytree(fixture(name) / "checkpoint", folder)
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in AMBIGUOUS])
def test_tensors_tell(name: str, tmp_path: Path) -> None:
    """The layers and values that the config leads to."""
    made, stored = [], []
    for source in (fixture(name) / "checkpoint", without_config(name, tmp_path / "bare")):
        output = tmp_path / f"{source.name}-out"
        report = requant.convert(source, output, dequantize=True, layout="keep")
        made.append(read_folder(output))
        stored.append({layer.layer: layer.source for layer in report.plan.layers})
    assert stored[0] == stored[1]
    assert made[0].keys() == made[1].keys()
    assert all(array.tobytes() == made[1][key].tobytes() for key, array in made[0].items())


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ct-pack-int4-sym-g128", "quantization_config"),
        ("ct-pack-int4-sym-g128", "compression_config"),  # what older compressed-tensors wrote
        ("fp8-block-ue8m0", "quantization_config"),
        ("modelopt-nvfp4", "quantization_config"),
    ],
)
def test_a_block_inside_text_config(name: str, dequantize: bool, key: str, tmp_path: Path) -> None:
    """Read where vision models have it, and gone from the output: mlx-lm looks there too."""
    source = without_config(name, tmp_path / "source")
    config = json.loads((fixture(name) / "checkpoint" / "config.json").read_text())
    nested = {"hidden_size": 64, key: config.pop("quantization_config")}
    (source / "config.json").write_text(json.dumps(config | {"text_config": nested}))
    made = []
    for folder in (fixture(name) / "checkpoint", source):
        output = tmp_path / f"{folder.name}-out"
        requant.convert(folder, output, dequantize=dequantize, layout="keep")
        made.append(read_folder(output))
    assert made[0].keys() == made[1].keys()
    assert all(array.tobytes() == made[1][key].tobytes() for key, array in made[0].items())
    written = json.loads((output / "config.json").read_text())
    assert written["text_config"] == {"hidden_size": 64}
    assert ("quantization" in written) is not dequantize


@pytest.mark.parametrize("name", [name for name in NAMES if name in AMBIGUOUS])
def test_what_tensors_do_not_tell_is_rejected(name: str, tmp_path: Path) -> None:
    source = without_config(name, tmp_path / "bare")
    with pytest.raises(requant.RequantError, match=r"config\.json has no quantization_config"):
        requant.convert(source, tmp_path / "out", bits=8, layout="keep")
    assert not (tmp_path / "out").exists()
