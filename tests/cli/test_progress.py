"""What long commands say on the way, on a terminal and elsewhere."""

from __future__ import annotations

import pytest

from requant.cli import progress
from requant.execute import Progress


def test_plain_progress_speaks_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Told ten times a second for 13 s, it says something at 2, 7 and 12 s."""
    with progress.progress_display(quiet=False) as update:
        assert update is not None
        for tenth in range(130):
            update(Progress("model.layers.3.mlp", tenth * 10**8, 13 * 10**9, tenth / 10))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[:4] for line in err.splitlines()] == [" 15%", " 53%", " 92%"]
    for line in err.splitlines():
        assert "1.00 GB/s" in line and " left" in line and "model.layers.3.mlp" in line


def test_the_last_word_is_the_disk() -> None:
    text = progress.describe_progress(Progress("up_proj", 100, 100, 2.0))
    assert text.endswith("waiting for the disk") and "left" not in text


def test_progress_before_the_first_byte() -> None:
    text = progress.describe_progress(Progress("", 0, 100, 0.0))
    assert text.startswith("0 B/s") and "left" not in text


def test_quiet_has_no_progress() -> None:
    with progress.progress_display(quiet=True) as update:
        assert update is None


def test_memory_in_use_is_that_of_a_python_process() -> None:
    assert 1 << 20 < progress.memory_in_use() < 1 << 40
