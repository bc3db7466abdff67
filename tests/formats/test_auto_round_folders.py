"""AutoRound's folders, in each of its packings, against AutoRound's own values."""

from pathlib import Path

import pytest

import requant
from tests.support.fixture_checks import check_fixture
from tests.support.fixture_folders import fixture
from tests.support.plan_texts import note_texts


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


def test_a_model_that_would_compute_in_float32_is_warned_about(tmp_path: Path) -> None:
    """AutoRound leaves norms and embeddings of these models in float32 next to float16 scales."""
    source = fixture("auto-round-native-w4g64") / "checkpoint"
    notes = " ".join(note_texts(requant.plan(source, layout="keep").notes))
    assert "--dtype float16" in notes
    assert "float32" in notes
    same = requant.plan(source, layout="keep", dtype="float16")
    assert not any("computes in float32" in note for note in note_texts(same.notes))
