"""How sizes are read, and how numbers and findings are put into words."""

from types import SimpleNamespace
from typing import cast

import pytest

from requant import text as words
from requant.cli import plan_tables
from requant.errors import UsageError
from requant.quantization.size_budget import parse_size, size_text
from requant.reports.report import Report


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12345", 12345),
        ("500MB", 500_000_000),
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("1GiB", 1 << 30),
        ("1G", 1 << 30),
        ("8k", 8192),
        ("1.5 KiB", 1536),
        ("0.1TB", 100_000_000_000),
        ("7B", 7),
    ],
)
def test_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "1,5GB", "2GBit", "0", "0.4"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize("nbytes", [1, 1000, 1 << 20, 5 << 30, (1 << 20) + 1, 3 << 40])
def test_a_size_is_read_back(nbytes: int) -> None:
    assert parse_size(size_text(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (1_710_000, "1.71 MB"),
        (5 << 30, "5.37 GB"),
        (1_340_000_000_000, "1.34 TB"),
        (2_000_000_000_000_000, "2000 TB"),
    ],
)
def test_format_size(nbytes: int, text: str) -> None:
    assert words.format_size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.042, "0.04 s"),
        (0.996, "1.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7815, "2 h 10 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert words.format_seconds(seconds) == text


def test_warnings_name_the_worst_layers() -> None:
    counts = {f"layer.{n}": {"flushed_groups": n} for n in range(1, 6)}
    counts["cast"] = {"overflowed": 1}
    report = cast(Report, SimpleNamespace(findings=counts))
    assert plan_tables.warnings(report) == [
        "1 value became infinite: too large for the dtype asked for (in cast)",
        "15 groups became zero: too small for the scales of the mode "
        "(in layer.5, layer.4, layer.3 and 2 more)",
    ]
