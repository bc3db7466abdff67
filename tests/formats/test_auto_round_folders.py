"""AutoRound's folders, in each of its packings, against AutoRound's own values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.harness import check_fixture


@pytest.mark.parametrize(
    ("name", "exactness", "bits"),
    [
        ("awq-w4g64", "rounded", 4),
        ("gptq-w4g128", "exact", 4),
        ("native-w4g64", "exact", 4),
        ("native-w2g32-asym", "rounded", 2),
    ],
)
def test_fixture(name: str, exactness: str, bits: int, tmp_path: Path) -> None:
    check_fixture(f"auto-round-{name}", tmp_path, exactness, bound=(2**bits - 1) * 2**-11)
