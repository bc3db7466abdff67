"""Errors and kills at the system calls of a conversion, one after the other, in real processes.

``REQUANT_FAULTS=1`` tries every call; without it every so many.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.gguf_files import gguf_file
from tests.support.number_formats import bf16

ROOT = Path(__file__).parents[2]
EVERY_CALL = bool(os.environ.get("REQUANT_FAULTS"))
STRIDE = 1 if EVERY_CALL else 11

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is preloaded."""
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    source = ROOT / "tests" / "support" / "fault_injection.c"
    flags = ["-std=c11", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(path), str(source), "-ldl"], check=True)
    return path


Build = Callable[..., Path]


def experts(checkpoint: Build) -> Path:
    """Two shards, a stack of experts, and a file in a folder."""
    source = checkpoint(
        {
            "model.embed_tokens.weight": bf16(32, 64, seed=1),
            "model.layers.0.mlp.experts.gate_up_proj.weight": bf16(2, 64, 64, seed=2),
            "model.layers.0.mlp.up_proj.weight": bf16(64, 64, seed=3),
            "model.norm.weight": bf16(64, seed=4),
        },
        shards=2,
    )
    (source / "pooling" / "deep").mkdir(parents=True)
    (source / "pooling" / "deep" / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    return source


def job(name: str, checkpoint: Build, place: Path) -> dict[str, Any]:
    """A source and what is asked of it."""
    options: dict[str, Any] = {"bits": 4, "layout": "keep", "shard_size": 8000}
    if name == "consumed":
        options |= {"consume_source": True, "yes": True}
    if name == "gguf":
        options = {"layout": "keep"}
    source = gguf_file(place) if name == "gguf" else experts(checkpoint)
    reported = {"place": str(place / "work"), "source": str(source), "options": options}
    return reported | {"trace": str(place / "trace"), "old": name == "replaced"}


def struck(library: Path, reported: dict[str, Any], modes: dict[str, int]) -> dict[str, Any]:
    """What tests/support/fault_injection.py says of a job."""
    preloaded = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.fault_injection",
            json.dumps(reported),
            json.dumps(modes),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": preloaded},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", ["plain", "replaced", "consumed", "gguf"])
@pytest.mark.parametrize("mode", ["once", "full", "kill"])
def test_struck_at_its_calls(
    mode: str, name: str, library: Path, checkpoint: Build, tmp_path: Path
) -> None:
    """An error, a full disk or ``kill -9``: OUTPUT is whole or not there, and then it is whole."""
    found = struck(library, job(name, checkpoint, tmp_path), {mode: STRIDE})
    assert found["calls"] > 60
    assert found["tried"][mode] >= found["calls"] // STRIDE - 3
    if EVERY_CALL:
        print(name, mode, found)


# -- what is on the disk when the name is given ----------------------------------------------
def folder_of(path: str) -> str:
    """Where the entry is that names a file."""
    return str(Path(path).parent)


class Disk:
    """What a trace of calls has made durable: a disk that forgets what was not synced."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()  # files with data, folders with entries, that no sync followed

    def change(self, call: str, path: str) -> None:
        if call in ("write", "pwrite", "ftruncate"):
            self.dirty.add(path)
        elif call == "fsync":
            self.dirty.discard(path)
        elif call in ("create", "mkdir", "unlink", "rmdir"):
            self.dirty.add(folder_of(path))
            if call == "mkdir" or call == "create":
                self.dirty.add(path)

    def below(self, folder: str) -> list[str]:
        return sorted(x for x in self.dirty if x == folder or x.startswith(folder + "/"))


@pytest.mark.parametrize("name", ["plain", "replaced", "consumed", "gguf"])
def test_all_is_synced_before_it_has_its_name(
    name: str, library: Path, checkpoint: Build, tmp_path: Path
) -> None:
    """No file or folder of OUTPUT, however deep, waits for a sync; nor does the name after it."""
    reported = job(name, checkpoint, tmp_path)
    struck(library, reported, {})
    disk, named, gone, synced, removed = Disk(), 0, 0, False, False
    place = reported["place"]
    inside = f"{place}/.out.requant-partial/output"
    for line in Path(reported["trace"]).read_text().splitlines():
        call, path, other = line.split("\t")
        if call == "rename" and (path, other) == (inside, f"{place}/out"):
            assert disk.below(inside) == []
            named += 1
        elif call == "rename":
            assert path not in disk.dirty, f"{path} is renamed before it is synced"
            disk.dirty |= {folder_of(path), folder_of(other)}
        elif named and call == "fsync" and path == place:
            synced = True
        elif named and call in ("unlink", "unlinkat", "rmdir"):
            removed = True
            assert synced, "the hidden folder goes before OUTPUT's name is on the disk"
        elif call == "unlink" and path.startswith(f"{place}/source/"):
            waiting = [x for x in disk.below(inside) if x.endswith(".safetensors")]
            journal = f"{place}/.out.requant-partial/journal"
            assert journal not in disk.dirty, (
                "a source file goes before the journal's line is synced"
            )
            assert waiting == [], "a source file goes before what was made from it is synced"
            gone += 1
        disk.change(call, path)
    assert (named, synced, removed) == (1, True, True)
    assert gone == (2 if name == "consumed" else 0)
