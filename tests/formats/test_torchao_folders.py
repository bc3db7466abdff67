"""torchao folders against the values of torchao itself."""

from pathlib import Path

import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.logits import check_logits


def test_int4_in_bytes_keeps_its_codes(tmp_path: Path) -> None:
    checked = check_fixture("torchao-intx-w4g32", tmp_path, "exact")
    assert checked.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_int8_keeps_its_codes(tmp_path: Path) -> None:
    """float32 scales become bfloat16, the model's dtype."""
    check_fixture("torchao-int8-weight-only", tmp_path, "rounded", bound=0.5)


def test_int8_is_exact_in_float32(tmp_path: Path) -> None:
    check_fixture("torchao-int8-weight-only", tmp_path, "exact", dtype="float32")


def test_fp8_without_an_option_explains_the_choices(tmp_path: Path) -> None:
    source = fixture("torchao-fp8-weight-only") / "checkpoint"
    with pytest.raises(requant.UsageError, match="one scale a channel"):
        requant.convert(source, tmp_path / "out", layout="keep")
    assert list(tmp_path.iterdir()) == []


def test_fp8_becomes_what_is_requested(tmp_path: Path) -> None:
    check_fixture("torchao-fp8-weight-only", tmp_path, "re-encoded", mode="mxfp8", largest_rms=0.04)


@pytest.mark.parametrize("name", ["torchao-intx-w4g32", "torchao-int8-weight-only"])
def test_logits(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path, 2e-5, dtype="float32")


def test_fp8_logits(tmp_path: Path) -> None:
    name = "torchao-fp8-weight-only"
    check_logits(name, tmp_path / "dense", 1e-6, dequantize=True, dtype="float32")
    check_logits(name, tmp_path / "eight", 5e-2, bits=8, group_size=32, dtype="float32")
