"""AutoAWQ's folders against AutoAWQ's own values."""

from pathlib import Path

import pytest

from tests.support.fixture_checks import check_fixture

# Half a unit in the last place of a float16 bias of at most 15 steps.
BOUND = 15 * 2**-11


@pytest.mark.parametrize("name", ["gemm-g128", "gemm-g32", "gemm-g64-bias", "gemm-g64-skip"])
def test_gemm(name: str, tmp_path: Path) -> None:
    check_fixture(f"awq-{name}", tmp_path, "rounded", bound=BOUND)


@pytest.mark.parametrize("name", ["gemv-g128", "gemv-g64"])
def test_gemv(name: str, tmp_path: Path) -> None:
    check_fixture(f"awq-{name}", tmp_path, "rounded", bound=BOUND)


@pytest.mark.parametrize("name", ["gemv_fast-g128", "gemv_fast-g64"])
def test_gemv_fast_stores_the_biases_of_mlx(name: str, tmp_path: Path) -> None:
    check_fixture(f"awq-{name}", tmp_path, "exact")


@pytest.mark.parametrize(
    ("dtype", "bits"), [("bfloat16", 8), ("float32", 24)], ids=["bfloat16", "float32"]
)
def test_scales_of_another_dtype(dtype: str, bits: int, tmp_path: Path) -> None:
    """bfloat16 rounds the scale (half a unit) and the bias; float32 rounds nothing."""
    exactness = "exact" if dtype == "float32" else "rounded"
    # A code of at most 15 times the scale's error, and the bias's own.
    check_fixture("awq-gemm-g64-skip", tmp_path, exactness, bound=3 * 15 * 2.0**-bits, dtype=dtype)
