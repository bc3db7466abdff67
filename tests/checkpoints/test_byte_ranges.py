"""Small tensors of a source are read in runs, and never other bytes than alone."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.checkpoints.byte_ranges import FileRange, RangeRun, ReadAhead, read_runs, runs_of
from requant.checkpoints.checkpoint import OpenedSource, StoredTensor
from requant.core.dtypes import TensorInfo
from requant.errors import CheckpointError

BYTES = {name: np.random.default_rng(n).bytes(300) for n, name in enumerate("ab")}
RANGES = st.builds(FileRange, st.sampled_from("ab"), st.integers(0, 200), st.integers(0, 100))


def read(part: FileRange) -> bytes:
    return BYTES[part.file][part.offset : part.offset + part.nbytes]


def test_neighbours_make_a_run() -> None:
    parts = [
        FileRange("b", 0, 4),
        FileRange("a", 14, 2),
        FileRange("a", 0, 8),
        FileRange("a", 8, 4),
    ]
    assert runs_of(parts, gap=2, max_bytes=100) == [
        RangeRun(FileRange("a", 0, 16), (2, 3, 1)),
        RangeRun(FileRange("b", 0, 4), (0,)),
    ]
    assert [run.members for run in runs_of(parts, gap=1, max_bytes=100)] == [(2, 3), (1,), (0,)]
    assert [run.members for run in runs_of(parts, gap=2, max_bytes=12)] == [(2, 3), (1,), (0,)]
    assert runs_of([], 1, 1) == []


@given(st.lists(RANGES, max_size=12), st.integers(0, 40), st.integers(1, 400))
def test_runs_read_what_each_range_holds(parts: list[FileRange], gap: int, most: int) -> None:
    runs = runs_of(parts, gap, most)
    assert read_runs(parts, runs, read) == [read(part) for part in parts]
    assert sorted(position for run in runs for position in run.members) == list(range(len(parts)))
    for run in runs:
        longest = max(parts[position].nbytes for position in run.members)
        assert run.whole.nbytes <= max(most, longest)
        asked = sum(parts[position].nbytes for position in run.members)
        assert run.whole.nbytes <= asked + gap * (len(run.members) - 1)


def tensors_of(count: int, stride: int = 8) -> list[StoredTensor]:
    info = TensorInfo("I32", (2,))
    return [StoredTensor(f"layers.{n}.shape", info, "a", stride * n) for n in range(count)]


def counted(asked: list[int]) -> Callable[[Sequence[FileRange]], list[bytes]]:
    """A source of 8 bytes a range, which counts the ranges of each request."""

    def read_ranges(parts: Sequence[FileRange]) -> list[bytes]:
        asked.append(len(parts))
        return [part.offset.to_bytes(8, "little") for part in parts]

    return read_ranges


def test_expected_tensors_come_in_windows() -> None:
    asked: list[int] = []
    ahead, tensors = ReadAhead(counted(asked)), tensors_of(5000)
    ahead.expect(tensors)
    for tensor in tensors:
        assert int.from_bytes(ahead.read(tensor), "little") == tensor.offset
    assert asked == [4096, 904]
    assert int.from_bytes(ahead.read(tensors[3]), "little") == 24  # again: it is not held
    assert asked == [4096, 904, 1]


def test_tensors_that_are_skipped_are_read_alone() -> None:
    asked: list[int] = []
    ahead, tensors = ReadAhead(counted(asked)), tensors_of(10)
    ahead.expect(tensors)
    for n in (4, 9, 2, 5):
        assert int.from_bytes(ahead.read(tensors[n]), "little") == 8 * n
    assert asked == [6, 1]  # 4 with all after it; 2 alone


def test_a_window_is_bounded_in_bytes() -> None:
    asked: list[int] = []
    ahead = ReadAhead(counted(asked))
    info = TensorInfo("U8", (3 << 20,))
    large = [StoredTensor(str(n), info, "a", 0) for n in range(3)]
    ahead.expect(large)
    for tensor in large:
        ahead.read(tensor)
    assert asked == [1, 1, 1]


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder: one open file, one read for neighbours."""
    (tmp_path / "a").write_bytes(np.arange(4000, dtype="<i4").tobytes())
    opened: list[object] = []
    reads: list[tuple[int, int]] = []
    open_file, pread = os.open, os.pread

    def count_open(path: str, *args: int, **kwargs: int) -> int:
        opened.append(path)
        return open_file(path, *args, **kwargs)

    def count_read(fd: int, nbytes: int, offset: int) -> bytes:
        reads.append((nbytes, offset))
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "open", count_open)
    monkeypatch.setattr(os, "pread", count_read)
    source, near = OpenedSource(tmp_path), tensors_of(100)
    far = StoredTensor("far", near[0].info, "a", 15000)
    source.read_ahead([*near, far])
    assert [source.read_small_tensor(x).tolist() for x in near[:2]] == [[0, 1], [2, 3]]
    assert source.read_small_tensor(far).tolist() == [3750, 3751]
    assert opened == [tmp_path / "a"]
    assert reads == [(800, 0), (8, 15000)]
    assert [x.offset for x in source.small_tensor_ranges()] == [0, 8, 15000]


def test_a_short_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8))
    source, tensors = OpenedSource(tmp_path), tensors_of(2)
    source.read_ahead(tensors)
    with pytest.raises(CheckpointError, match="a: is shorter than its header says"):
        source.read_small_tensor(tensors[1])
