"""AutoAWQ's folders against AutoAWQ's own values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.harness import check_fixture

# Half a unit in the last place of a float16 bias of at most 15 steps.
BOUND = 15 * 2**-11


@pytest.mark.parametrize("name", ["gemm-g128", "gemm-g32", "gemm-g64-bias", "gemm-g64-skip"])
def test_gemm(name: str, tmp_path: Path) -> None:
    check_fixture(f"awq-{name}", tmp_path, "rounded", bound=BOUND)
