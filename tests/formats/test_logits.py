"""Converted AWQ, GPTQ and AutoRound fixtures in mlx-lm against the tools' dense weights."""

from pathlib import Path

import pytest

from tests.support.logits import check_logits

pytestmark = pytest.mark.slow

pytest.importorskip("mlx_lm")

EXACT = [
    "awq-gemm-g64-skip",
    "awq-gemm-g64-bias",
    "awq-gemv-g128",
    "awq-gemv_fast-g64",
    "auto-round-awq-w4g64",
    "auto-round-native-w2g32-asym",
    "gptq-b3-g64-planar",
    "gptq-b4-g64-actorder-v1",  # codes kept by reordering the layers before
    "gptq-b4-g64-asym-v1-bias",
    "gptq-b4-g64-lmhead-v1",
    "gptq-b8-gm1-asym-v2",
    "gptq-dynamic-mixed-v1",
]


@pytest.mark.parametrize("name", EXACT)
def test_logits_with_scales_in_float32(name: str, tmp_path: Path) -> None:
    check_logits(name, tmp_path, 2e-5, dtype="float32")


@pytest.mark.parametrize("name", ["awq-gemm-g32", "gptq-b4-g128-sym-v1"])
def test_logits_in_the_dtype_of_the_source(name: str, tmp_path: Path) -> None:
    """float16 throughout: its rounding of every sum is what is left."""
    check_logits(name, tmp_path, 1e-2)


def test_logits_of_requantized_layers(tmp_path: Path) -> None:
    check_logits("gptq-b4-g32-actorder-asym-v2", tmp_path, 5e-2, dtype="float32")
