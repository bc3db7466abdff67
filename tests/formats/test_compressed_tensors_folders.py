"""compressed-tensors folders against compressed-tensors' own values."""

from pathlib import Path

import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.plan_texts import reason_text
from tests.support.safetensors_files import read_file

pytestmark = pytest.mark.sweep(2)

# Half a unit in the last place of a bfloat16 bias of at most 15 steps.
BIAS_STEPS = 15 * 2**-8


@pytest.mark.parametrize(
    "name",
    [
        "ct-pack-int4-sym-g128",
        "ct-pack-int3-g64",
        "ct-pack-int8-channel",
        "ct-int-quantized",
        "ct-mxfp4-pack",
        "ct-mxfp8",
    ],
)
def test_codes_that_mlx_holds(name: str, tmp_path: Path) -> None:
    check_fixture(name, tmp_path, "exact")


@pytest.mark.parametrize("name", ["ct-pack-int4-asym-g32", "ct-pack-int4-actorder-weight"])
def test_zero_points_round_the_bias(name: str, tmp_path: Path) -> None:
    check_fixture(name, tmp_path, "rounded", bound=BIAS_STEPS)


def test_act_order(tmp_path: Path) -> None:
    check_fixture("ct-pack-int4-actorder-group", tmp_path, "re-encoded", largest_rms=0.014)


def test_nvfp4(tmp_path: Path) -> None:
    checked = check_fixture("ct-nvfp4-pack", tmp_path, "re-encoded", largest_rms=0.02)
    reasons = {
        reason_text(layer)
        for layer in checked.report.plan.layers
        if layer.layer in checked.expected
    }
    assert reasons == {"MLX's nvfp4 has no place for its tensor scale"}


@pytest.mark.parametrize(
    "name",
    ["ct-float-fp8-block", "ct-float-fp8-channel", "ct-float-fp8-tensor", "ct-naive-fp8-tensor"],
)
def test_fp8(name: str, tmp_path: Path) -> None:
    with pytest.raises(requant.UsageError, match="--bits 8"):
        requant.convert(fixture(name) / "checkpoint", tmp_path / "none", layout="keep")
    assert list(tmp_path.iterdir()) == []
    check_fixture(name, tmp_path, "re-encoded", bits=8, largest_rms=0.02)


def test_mixed_precision(tmp_path: Path) -> None:
    """FP8 attention becomes what an override says; the packed layers keep their codes."""
    name = "ct-mixed-precision"
    values = read_file(fixture(name) / "expected.safetensors")
    packed = [n.removesuffix(".weight") for n in values if ".mlp." in n]
    classes = {"": "re-encoded"} | dict.fromkeys(packed, "exact")
    check_fixture(name, tmp_path, classes, largest_rms=0.03, **{"overrides": ["self_attn=mxfp8"]})
