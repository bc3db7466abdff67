"""bitsandbytes folders against the values of bitsandbytes itself."""

from pathlib import Path

import pytest

from tests.support.fixture_checks import check_fixture
from tests.support.logits import check_logits

TABLES = ["bnb-nf4", "bnb-nf4-double", "bnb-fp4"]


def test_int8_keeps_its_codes(tmp_path: Path) -> None:
    """float16 scales: at most 2^-11 of 127 steps."""
    checked = check_fixture("bnb-int8", tmp_path, "rounded", bound=127 * 2.0**-11, values_rtol=1e-6)
    bounds = {layer.bound for layer in checked.report.plan.layers if layer.bound}
    assert bounds == {"scales SCB / 127 rounded to float16, relative error at most 0.00049"}
    assert checked.config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_int8_in_float32(tmp_path: Path) -> None:
    check_fixture("bnb-int8", tmp_path, "rounded", dtype="float32", values_rtol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_requantized(name: str, tmp_path: Path) -> None:
    """8 bits, groups of 64; dequantized they are bitsandbytes' own values bit for bit."""
    checked = check_fixture(name, tmp_path, "re-encoded", largest_rms=0.016)
    assert checked.config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_a_table_at_the_requested_width(tmp_path: Path) -> None:
    check_fixture("bnb-nf4", tmp_path, "re-encoded", bits=6, group_size=32, largest_rms=0.03)


def test_logits_of_int8(tmp_path: Path) -> None:
    check_logits("bnb-int8", tmp_path, 2e-5, dtype="float32")


@pytest.mark.parametrize("name", TABLES)
def test_logits_of_tables(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path, 5e-2, dtype="float32")
