"""Small ranges from the hub: neighbours come together, several requests at a time, none twice."""

import json
import sys
import threading
import time
from pathlib import Path
from subprocess import run

import pytest

from requant.checkpoints.byte_ranges import FileRange
from requant.errors import HubError
from requant.sources import hub_ranges
from requant.sources.hub_ranges import STREAMS, SmallRanges
from tests.support.hub_commands import Call
from tests.support.hub_server import Hub, serving

SIZE = 4 << 20
DATA = {name: bytes(range(251)) * (SIZE // 251 + 1) for name in ("a", "b")}


class Files:
    """Files whose requests are counted."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.asked: list[FileRange] = []
        self.pause_s = pause_s
        self.running = self.most = 0
        self.lock = threading.Lock()

    def read(self, part: FileRange) -> bytes:
        with self.lock:
            self.asked.append(part)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.pause_s)
        with self.lock:
            self.running -= 1
        if part.file == "missing":
            raise HubError(f"{part.file} at {part.offset}")
        return DATA[part.file][part.offset : part.offset + part.nbytes]


def expected(parts: list[FileRange]) -> list[bytes]:
    return [DATA[x.file][x.offset : x.offset + x.nbytes] for x in parts]


def test_neighbours_are_one_request() -> None:
    files = Files()
    parts = [FileRange(file, 1000 * n, 8) for n in range(500) for file in ("b", "a")]
    assert SmallRanges(files.read)(parts) == expected(parts)
    assert sorted(files.asked, key=lambda x: x.file) == [
        FileRange("a", 0, 499_008),
        FileRange("b", 0, 499_008),
    ]


def test_a_gap_and_a_size_end_a_request() -> None:
    files, gap = Files(), 64 << 10
    far = [FileRange("a", 0, 4), FileRange("a", 4 + gap, 4), FileRange("a", 9 + 2 * gap, 4)]
    assert SmallRanges(files.read)(far) == expected(far)
    assert sorted(x.nbytes for x in files.asked) == [4, 8 + gap]
    files.asked.clear()
    wide = [FileRange("a", 1000 * n, 1000) for n in range(4000)]
    assert SmallRanges(files.read)(wide) == expected(wide)
    assert max(x.nbytes for x in files.asked) <= 1 << 20
    assert len(files.asked) == 4


def test_a_range_comes_once() -> None:
    files = Files()
    ranges, parts = SmallRanges(files.read), [FileRange("a", 5, 3), FileRange("b", 7, 2)]
    assert ranges([*parts, parts[0]]) == expected([*parts, parts[0]])
    assert ranges(parts[::-1]) == expected(parts[::-1])
    assert len(files.asked) == 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_ranges, "_KEPT_BYTES", 10)
    files = Files()
    ranges, parts = SmallRanges(files.read), [FileRange("a", 0, 6), FileRange("b", 0, 6)]
    assert ranges(parts) == ranges(parts) == expected(parts)
    assert [x.file for x in files.asked].count("a") == 1  # six of ten bytes
    assert [x.file for x in files.asked].count("b") == 2
    small = FileRange("b", 0, 4)
    assert ranges([small]) == ranges([small]) == expected([small])
    assert files.asked.count(small) == 1


def test_requests_run_side_by_side() -> None:
    files = Files(pause_s=0.005)
    parts = [FileRange("a", (100 << 10) * n, 4) for n in range(40)]
    assert SmallRanges(files.read)(parts) == expected(parts)
    assert len(files.asked) == 40
    assert 1 < files.most <= STREAMS


def test_an_error_ends_the_requests() -> None:
    files = Files(pause_s=0.002)
    parts = [FileRange("missing", (1 << 20) * n, 4) for n in range(500)]
    ranges = SmallRanges(files.read)
    with pytest.raises(HubError, match="missing at 0"):
        ranges(parts)
    assert len(files.asked) < 100
    assert files.running == 0


_READ = """
import json, sys
from requant.checkpoints.byte_ranges import FileRange
from requant.errors import HubError
from requant.sources.hub_repository import Repository
name, commit, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
repository = Repository(name, commit, {"a.bin": size})
parts = [FileRange("a.bin", at, 8) for at in json.loads(sys.argv[4])]
try:
    print(json.dumps([x.hex() for x in repository._fetch(parts)]))
except HubError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_ranges_of_a_repository(tmp_path: Path) -> None:
    """Against a server: as many requests as runs, and its errors."""
    content = DATA["a"]
    offsets = [*range(0, 20_000, 200), 1 << 20, 2 << 20]
    with serving(Hub({"a/b": {"a.bin": content}})) as hub:
        _, options = Call(hub, tmp_path).command()
        command = [sys.executable, "-c", _READ, "a/b", Hub.commit("a/b"), str(SIZE)]
        done = run([*command, json.dumps(offsets)], **options)
        assert json.loads(done.stdout) == [content[at : at + 8].hex() for at in offsets]
        ranges = sorted(asked for _, path, asked in hub.log if path.endswith("a.bin"))
        assert ranges == ["bytes=0-19807", "bytes=1048576-1048583", "bytes=2097152-2097159"]
        hub.busy = 503
        failed = run([*command, json.dumps(offsets)], **options)
        assert failed.returncode == 1
        assert "a.bin: the hub answers 503" in failed.stderr
