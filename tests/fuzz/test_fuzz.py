"""A short, repeatable slice of the fuzzer, and everything that it ever found."""

import json
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from requant.errors import RequantError
from requant.planning.planner import make_plan
from requant.quantization.options import ConvertOptions
from requant.reports.record_summary import read_figures
from requant.sources.open import read_checkpoint
from tests.fuzz.harness import (
    RECORD,
    SEEDS,
    SLOW_S,
    FolderReader,
    corpus,
    from_text,
    make_input,
    readers,
)


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_found_stays_fixed(path: Path, tmp_path: Path) -> None:
    kind, value = from_text(path.read_text())
    began = time.process_time()
    readers(tmp_path / "source")[kind](value)
    assert time.process_time() - began < SLOW_S


def test_the_corpus_is_mostly_read(tmp_path: Path) -> None:
    """Damage to folders that are rejected anyway would find little."""
    reader, read = FolderReader(tmp_path / "source"), 0
    for folder in corpus():
        reader.write(folder)
        with suppress(RequantError):
            make_plan(
                read_checkpoint(tmp_path / "source"), ConvertOptions(layout="keep", dequantize=True)
            )
            read += 1
    assert read > len(corpus()) * 0.6, read


def test_the_record_is_read_before_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "requant.json").write_text(json.dumps(RECORD))
    assert read_figures(tmp_path).options.bits == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, inputs",
    [
        ("header", 4000),
        ("pattern", 1500),
        ("folder", 700),
        ("gguf", 500),
        ("index", 1000),
        ("record", 150),
        ("statistics", 1000),
    ],
)
def test_a_slice_of_the_fuzzer(kind: str, inputs: int, tmp_path: Path) -> None:
    rng, folders = random.Random(1), corpus()
    read = readers(tmp_path / "source")[kind]
    for _ in range(inputs):
        read(make_input(kind, folders, rng))
