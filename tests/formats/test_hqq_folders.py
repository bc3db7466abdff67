"""HQQ folders against the values of hqq itself."""

from pathlib import Path

import pytest

from tests.support.fixture_checks import check_fixture
from tests.support.logits import check_logits
from tests.support.plan_texts import reason_text

# Most that a bias may be off, in steps: half a unit in the last place of the largest zero.
ROWS = {"hqq-b2-g32": 0.002, "hqq-b3-g64": 0.03, "hqq-b4-g64": 0.0075, "hqq-b8-g64": 0.87}
DECLARED = {
    name: f"rounded to {word}: biases by at most {part} of themselves, {steps} steps for a zero of "
    f"{middle}"
    for name, word, part, steps, middle in (
        ("hqq-b2-g32", "float16", "0.00049", "0.00098", 2),
        ("hqq-b3-g64", "bfloat16", "0.0039", "0.016", 4),
        ("hqq-b4-g64", "float16", "0.00049", "0.0039", 8),
        ("hqq-b8-g64", "bfloat16", "0.0039", "0.5", 128),
    )
}


@pytest.mark.parametrize("name", ROWS)
def test_axis_1_keeps_its_codes(name: str, tmp_path: Path) -> None:
    checked = check_fixture(name, tmp_path, "rounded", bound=ROWS[name])
    bounds = {layer.bound for layer in checked.report.plan.layers if layer.bound}
    assert bounds == {DECLARED[name]}


@pytest.mark.parametrize("name", ROWS)
def test_axis_1_is_exact_in_float32(name: str, tmp_path: Path) -> None:
    check_fixture(name, tmp_path, "exact", dtype="float32", values_rtol=1e-6)


@pytest.mark.slow
def test_axis_0_is_requantized(tmp_path: Path) -> None:
    checked = check_fixture("hqq-b4-g64-axis0", tmp_path, "re-encoded", largest_rms=0.009)
    assert checked.config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    reasons = {reason_text(x) for x in checked.report.plan.layers if x.exactness == "re-encoded"}
    assert reasons == {"axis 0: scales vary from input to input"}


@pytest.mark.parametrize("name", ["hqq-b3-g64", "hqq-b4-g64"])
def test_logits(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path, 2e-5, dtype="float32")


def test_logits_of_axis_0(tmp_path: Path) -> None:
    check_logits("hqq-b4-g64-axis0", tmp_path, 5e-2, dtype="float32")
