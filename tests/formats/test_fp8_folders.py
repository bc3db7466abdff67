"""FP8 folders against the values of the tools that wrote them."""

from pathlib import Path

import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.plan_texts import reason_text
from tests.support.safetensors_files import read_file

BLOCKS = ["fp8-block-llama", "fp8-block-deepseek-edge"]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_without_an_option_explain_the_choices(name: str, tmp_path: Path) -> None:
    with pytest.raises(requant.UsageError) as rejected:
        requant.convert(fixture(name) / "checkpoint", tmp_path / "out", layout="keep")
    text = str(rejected.value)
    assert "fp8 e4m3, one scale for 128x128" in text
    for option in ("--bits 8", "--bits 4", "--mode mxfp8", "--dequantize"):
        assert option in text
    assert list(tmp_path.iterdir()) == []


def test_blocks_become_what_is_requested(tmp_path: Path) -> None:
    check_fixture("fp8-block-llama", tmp_path, "re-encoded", bits=4, largest_rms=0.16)


@pytest.mark.slow
def test_ragged_blocks(tmp_path: Path) -> None:
    """Sides of 80, 96, 136 and 192: the last tile of a row or column is cut."""
    name = "fp8-block-deepseek-edge"
    values = read_file(fixture(name) / "expected.safetensors")
    ragged = [key.removesuffix(".weight") for key, x in values.items() if x.shape[-1] % 32]
    assert len(ragged) == 4
    classes = {"": "re-encoded"} | dict.fromkeys(ragged, "rounded")
    checked = check_fixture(name, tmp_path, classes, mode="mxfp8", largest_rms=0.03)
    reasons = {layer.layer: reason_text(layer) for layer in checked.report.plan.layers}
    assert reasons[ragged[0]] == "last axis 136 is not a multiple of group 32 or a smaller one"


def test_power_of_two_scales_are_mxfp8(tmp_path: Path) -> None:
    check_fixture("fp8-block-ue8m0", tmp_path, "exact")
