"""Weight files that come from a hub on loopback while others are converted."""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import requant
from requant.checkpoints.checkpoint import Checkpoint, OpenedSource
from requant.errors import HubError
from requant.sources.hub_repository import Repository
from tests.support.checkpoints import tree
from tests.support.hub_commands import Call, call, ok  # noqa: F401  (a fixture)
from tests.support.hub_server import Hub, either_way, serving

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")
NAME = "a/large"
SHARDS = [f"model-{n:05}-of-00006.safetensors" for n in range(1, 7)]
OPTIONS = ("--bits", "4", "--layout", "keep")
STAGING = ".out.requant-partial"


def shards(seed: int = 0) -> dict[str, bytes]:
    """Six shards of two layers, 1 MB each."""
    random = np.random.default_rng(seed)
    files: dict[str, bytes] = {"config.json": b'{"model_type": "x"}', "tokenizer.json": b"{}"}
    shard_of = {}
    for n, name in enumerate(SHARDS):
        layers = [f"l{n}.a.weight", f"l{n}.b.weight"]
        tensors = {x: random.standard_normal((256, 1024)).astype(np.float16) for x in layers}
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"shard-{os.getpid()}"
        save_file(tensors, path)
        files[name] = path.read_bytes()
        path.unlink()
        shard_of |= dict.fromkeys(layers, name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shard_of}).encode()
    return files


FILES = shards()
WEIGHT_BYTES = sum(len(FILES[name]) for name in SHARDS)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({NAME: dict(FILES)})) as running:
        yield running
    assert running.late == [], "a gate was not opened in time"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion of the same folder gives, but for the record."""
    source, output = (tmp_path_factory.mktemp("local") / name for name in ("source", "output"))
    source.mkdir()
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    requant.convert(source, output, bits=4, layout="keep")
    return without_record(output)


def without_record(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "requant.json"}


def journal(tmp_path: Path) -> str:
    path = tmp_path / STAGING / "journal"
    return path.read_text() if path.exists() else ""


def converted(tmp_path: Path) -> int:
    """How many layers a running conversion has written whole."""
    return journal(tmp_path).count('"hash"') // 3  # words, scales, biases


def begin(call: Call, tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:  # noqa: F811
    command, options = call.command(*arguments)  # type: ignore[attr-defined]
    return subprocess.Popen(command, **options)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come to it"
        time.sleep(0.01)


@either_way
def test_layers_are_written_before_all_shards_are_here(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
    option: tuple[str, ...],
) -> None:
    """The last shard comes only when eight layers of the others are written."""
    hub.gates[SHARDS[5]] = (200_000, lambda: converted(tmp_path) >= 8)
    done = call("convert", NAME, "out", *OPTIONS, *option, "--json")
    assert json.loads(ok(done))["bytes_downloaded"] == WEIGHT_BYTES
    assert without_record(tmp_path / "out") == expected
    assert not (tmp_path / STAGING).exists()


def test_shards_come_in_the_order_in_which_they_are_needed(hub: Hub, call: Call) -> None:  # noqa: F811
    ok(call("convert", NAME, "out", *OPTIONS, "--quiet"))
    asked = [path.rpartition("/")[2] for method, path, r in hub.log if method == "GET" and r]
    whole = [name for name in asked if name in SHARDS][len(SHARDS) :]  # after the headers
    assert sorted(whole) == SHARDS
    assert all(abs(whole.index(name) - n) <= 1 for n, name in enumerate(SHARDS))  # two at a time


@either_way
def test_killed_while_it_downloads_and_converts_it_resumes(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
    option: tuple[str, ...],
) -> None:
    hub.gates[SHARDS[3]] = (700_000, lambda: False)  # never, in this process
    process = begin(call, tmp_path, "convert", NAME, "out", *OPTIONS, *option, "--quiet")
    until(lambda: converted(tmp_path) >= 6 and growing(tmp_path, SHARDS[3]) >= 500_000, process)
    kill(process)
    assert not (tmp_path / "out").exists()
    hub.gates.clear()
    ok(call("convert", NAME, "out", *OPTIONS, *option, "--quiet"))
    assert without_record(tmp_path / "out") == expected
    ok(call("verify", "out"))
    # What was not yet written to the disk comes twice, and with it at most the headers.
    assert hub.sent < WEIGHT_BYTES + 2_000_000
    starts = {path.rpartition("/")[2]: r for _, path, r in hub.log if r}
    assert int(starts[SHARDS[3]][6:].split("-")[0]) >= 500_000
    for name in SHARDS[:3]:
        asked = [r for _, path, r in hub.log if path.endswith(name)]
        assert len(asked) == 2, (name, asked)  # header, and once the whole


def growing(tmp_path: Path, name: str) -> int:
    """Bytes of an unfinished download."""
    digest = hashlib.sha256(FILES[name]).hexdigest()[:12]
    found = tmp_path.rglob(f"{digest}*.requant.incomplete")
    return max((path.stat().st_size for path in found), default=0)


def test_few_shards_are_on_the_disk_at_a_time(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    """Whenever bytes go out, no more than three weight files are here, none in the cache."""
    most = 0

    def counted() -> bool:
        nonlocal most
        here = list((tmp_path / STAGING / "hub").glob("*"))
        most = max(most, len(here))
        return True

    hub.gates = dict.fromkeys(SHARDS, (0, counted))
    ok(call("convert", NAME, "out", *OPTIONS, "--consume-source", "--quiet"))
    assert without_record(tmp_path / "out") == expected
    assert 1 <= most <= 3
    blobs = [path.stat().st_size for path in tmp_path.rglob("blobs/*")]
    assert blobs and max(blobs) < 10_000
    ok(call("verify", NAME, "out"))


def test_consumed_or_not_may_change_on_the_way(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    """Nothing here is the only copy: a stopped run resumes with or without the option."""
    hub.gates[SHARDS[3]] = (200_000, lambda: False)
    command = ("convert", NAME, "out", *OPTIONS, "--quiet")
    process = begin(call, tmp_path, *command, "--consume-source")
    until(lambda: converted(tmp_path) >= 6, process)
    kill(process)
    hub.gates.clear()
    sent = hub.sent
    ok(call(*command))
    assert hub.sent - sent < 4.5 * len(FILES[SHARDS[3]])
    assert without_record(tmp_path / "out") == expected


def test_files_of_the_cache_are_used_and_stay(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    ok(call("convert", NAME, "first", *OPTIONS, "--quiet"))
    sent = hub.sent
    ok(call("convert", NAME, "out", *OPTIONS, "--consume-source", "--quiet"))
    assert hub.sent == sent
    snapshot = next((tmp_path / "hf" / "hub").glob("models--*/snapshots/*"))
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES
    asked = len(hub.log)
    command, options = call.command()
    code = """if True:
        import sys, huggingface_hub as hub
        for file in sys.argv[3:]:
            hub.hf_hub_download(sys.argv[1], file, revision=sys.argv[2])
    """
    done = subprocess.run([command[0], "-c", code, NAME, Hub.commit(NAME), *FILES], **options)
    assert done.returncode == 0, done.stderr
    assert len(hub.log) == asked  # huggingface_hub finds every file


@either_way
def test_numbers_that_are_none_are_rejected(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    option: tuple[str, ...],
) -> None:
    content = bytearray(FILES[SHARDS[1]])
    content[-2:] = b"\x00\x7e"  # NaN in float16
    hub.repositories[NAME][SHARDS[1]] = bytes(content)
    done = call("convert", NAME, "out", *OPTIONS, *option, "--quiet")
    assert done.returncode == 1 and "l1.b.weight: 1 value is NaN" in done.stderr
    assert not (tmp_path / STAGING).exists() and not (tmp_path / "out").exists()
    if option:  # it is not downloaded to the end
        assert not [1 for _, path, r in hub.log if path.endswith(SHARDS[5]) and "=0-13" not in r]
    ok(call("convert", NAME, "out", *OPTIONS, *option, "--allow-nonfinite", "--quiet"))
    ok(call("verify", NAME, "out"))


# -- parts ---------------------------------------------------------------------------------
def test_a_machine_downloads_the_files_of_its_part(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    """Each with a cache of its own; the join downloads nothing."""
    for number in (3, 1, 2):
        home = str(tmp_path / f"hf-{number}")
        ok(call("convert", NAME, "out", *OPTIONS, "--part", f"{number}/3", "--quiet", HF_HOME=home))
        there = {x.name for x in Path(home).rglob("snapshots/*/*.safetensors")}
        assert there == {*SHARDS[2 * number - 2 : 2 * number]}
    sent = hub.sent
    ok(call("join", "out", "--quiet"))
    assert hub.sent - sent < len(FILES[SHARDS[0]])
    assert without_record(tmp_path / "out") == expected


# -- what goes wrong -----------------------------------------------------------------------
@either_way
def test_the_network_fails_on_the_way(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
    option: tuple[str, ...],
) -> None:
    def fail() -> bool:
        hub.down = converted(tmp_path) >= 4
        return False

    hub.gates[SHARDS[3]] = (500_000, fail)
    done = call("convert", NAME, "out", *OPTIONS, *option, "--quiet")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the hub cannot be reached" in done.stderr and "What came is kept" in done.stderr
    assert "is done and kept in" in done.stderr
    hub.down, hub.gates, before = False, {}, hub.sent
    ok(call("convert", NAME, "out", *OPTIONS, *option, "--quiet"))
    assert without_record(tmp_path / "out") == expected
    assert hub.sent - before < 4.5 * len(FILES[SHARDS[3]])


def test_a_file_that_changes_on_the_server_is_rejected(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Half of it comes before, half after; the hub still lists what it was."""
    kill(cut_in_the_fourth(hub, call, tmp_path))
    listed = hub.repositories[NAME]
    hub.served[NAME] = listed | {SHARDS[3]: shards(seed=1)[SHARDS[3]]}
    hub.gates.clear()
    done = call("convert", NAME, "out", *OPTIONS, "--quiet")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{SHARDS[3]}: what came has the hash" in done.stderr
    assert "it was changed there, or damaged on its way" in done.stderr
    hub.served.clear()
    ok(call("convert", NAME, "out", *OPTIONS, "--quiet"))
    ok(call("verify", NAME, "out"))


def test_a_new_commit_does_not_resume_with_the_old_one(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    kill(cut_in_the_fourth(hub, call, tmp_path))
    hub.gates.clear()
    hub.heads[NAME] = "f" * 40
    done = call("convert", NAME, "out", *OPTIONS, "--quiet")
    assert done.returncode == 1 and "changed since; --no-resume starts over" in done.stderr
    ok(call("convert", NAME, "out", *OPTIONS, "--quiet", "--revision", Hub.commit(NAME)))
    assert without_record(tmp_path / "out") == expected


def cut_in_the_fourth(hub: Hub, call: Call, tmp_path: Path) -> subprocess.Popen[str]:  # noqa: F811
    hub.gates[SHARDS[3]] = (500_000, lambda: False)
    process = begin(call, tmp_path, "convert", NAME, "out", *OPTIONS, "--quiet")
    until(lambda: converted(tmp_path) >= 6 and growing(tmp_path, SHARDS[3]) >= 250_000, process)
    return process


def test_two_conversions_share_one_download(
    hub: Hub,
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    both = [begin(call, tmp_path, "convert", NAME, out, *OPTIONS, "--quiet") for out in "ab"]
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert without_record(tmp_path / "a") == without_record(tmp_path / "b")
    assert hub.sent < WEIGHT_BYTES + 2 * 6 * 140_000 + 100_000


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is looked at before anything comes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = Repository(NAME, "0" * 40, {"config.json": 2, "model.safetensors": 1 << 60})
    empty = Checkpoint(
        files=(),
        tensors={},
        config={},
        config_text="",
        side_files=(),
        left_out=(),
        opened=OpenedSource(tmp_path),
    )
    with pytest.raises(HubError, match="too full: 1,152,921,504,606,846,978 bytes are to be"):
        source.start_download(empty)


@pytest.mark.parametrize(
    "fault, declared",
    [
        ("gated", "is gated: accept its terms"),
        ("gone", "is not on the hub at"),
        ("token", "the hub answers 401: Invalid credentials in Authorization header; log in with"),
    ],
)
def test_what_is_rejected_while_shards_come(
    hub: Hub,
    call: Call,  # noqa: F811
    fault: str,
    declared: str,
) -> None:
    """The headers were given, the shards are not; the message names the file."""
    ok(call("plan", NAME, *OPTIONS, HF_TOKEN="hf_x"))
    if fault == "gated":
        hub.gated.add(NAME)
    elif fault == "gone":
        hub.served[NAME] = {k: v for k, v in FILES.items() if k != SHARDS[4]}
    else:
        hub.tokens = ("hf_y",)
    env = {"HF_TOKEN": "hf_x"} if fault == "token" else {}
    done = call("convert", NAME, "out", *OPTIONS, "--quiet", **env)
    assert done.returncode == 1 and declared in done.stderr and "Traceback" not in done.stderr
    if fault == "gone":
        assert f"{NAME}: {SHARDS[4]} is not on the hub" in done.stderr


def test_offline_with_everything_here(hub: Hub, call: Call, tmp_path: Path) -> None:  # noqa: F811
    """HF_HUB_OFFLINE: what was planned can be planned, what was downloaded converted."""
    offline = {"HF_HUB_OFFLINE": "1"}
    ok(call("plan", NAME, *OPTIONS))
    asked = len(hub.log)
    ok(call("plan", NAME, *OPTIONS, **offline))
    done = call("convert", NAME, "out", *OPTIONS, "--quiet", **offline)
    assert done.returncode == 1 and "HF_HUB_OFFLINE forbids" in done.stderr
    assert "Traceback" not in done.stderr and len(hub.log) == asked
    ok(call("convert", NAME, "out", *OPTIONS, "--quiet"))
    asked = len(hub.log)
    ok(call("convert", NAME, "again", *OPTIONS, "--quiet", **offline))
    assert len(hub.log) == asked
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_interrupted_by_the_user(hub: Hub, call: Call, tmp_path: Path) -> None:  # noqa: F811
    """Ctrl-C ends it soon, also while a server keeps it waiting, and says how to continue."""
    process = cut_in_the_fourth(hub, call, tmp_path)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, declared = process.communicate()
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "interrupted; " in declared and "the same command resumes" in declared
    assert "Traceback" not in declared


def test_progress_tells_of_downloads(hub: Hub, call: Call, tmp_path: Path) -> None:  # noqa: F811
    began = time.monotonic()
    hub.gates[SHARDS[5]] = (700_000, lambda: time.monotonic() - began > 8)
    done = call("convert", NAME, "out", *OPTIONS, "--json")
    json.loads(ok(done))
    assert re.search(r"\d% .* of 6\.29 MB downloaded", done.stderr), done.stderr
