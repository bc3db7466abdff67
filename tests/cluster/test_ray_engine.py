"""``convert(engine="ray")`` on a real cluster of three raylets on this machine.

Skipped where Ray is not installed; ``scripts/test-ray`` installs it and runs these tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.errors import ClusterError
from requant.output.staging import staging_dir
from tests.support.checkpoints import MICRO_LLAMA, ROOT, tree, write_checkpoint
from tests.support.number_formats import bf16

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STORE_BYTES = 80 << 20  # of one raylet; Ray's least is 75 MiB
OPTIONS: dict[str, Any] = {"bits": 4, "layout": "keep"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Three raylets with a processor each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes several seconds of one processor."""
    folder = tmp_path_factory.mktemp("source") / "m"
    rng = np.random.default_rng(0)
    matrix = bf16(2048, 2048)
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": rng.permuted(matrix, axis=0) for n in range(24)
    }
    return write_checkpoint(folder, tensors)


def wait_for_journal(output: Path) -> None:
    """Wait until a part has recorded rows."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in (staging_dir(output) / "parts").glob("*-of-*.*"):
            if b'"rows"' in path.read_bytes():
                return
        time.sleep(0.02)
    raise AssertionError("no part began")


def started(source: Path, output: Path, address: str) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    words = [sys.executable, "-m", "requant", "convert", source, output, "--bits", "4"]
    words += ["--search", "best", "--layout", "keep", "--json", "--engine", "ray"]
    words += ["--address", address, "--parts", "9"]
    return subprocess.Popen(
        list(map(str, words)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_same_bytes_and_one_progress(cluster: Any, tmp_path: Path) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "one", **OPTIONS)
    seen: list[Any] = []
    report = requant.convert(
        MICRO_LLAMA,
        tmp_path / "out",
        **OPTIONS,
        engine="ray",
        address=cluster.address,
        progress=seen.append,
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert report.part is None
    assert max(x.bytes_done for x in seen) == seen[0].bytes_total
    assert not ray.is_initialized()


def test_a_machine_that_dies(cluster: Any, source: Path, tmp_path: Path) -> None:
    """Its parts run again on the others; a second run of the cluster is not needed."""
    requant.convert(source, tmp_path / "one", **OPTIONS, search="best")
    with started(source, tmp_path / "out", cluster.address) as command:
        wait_for_journal(tmp_path / "out")
        node = next(iter(cluster.worker_nodes))
        cluster.remove_node(node, allow_graceful=False)
        out, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    assert json.loads(out)["part"] is None
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.parametrize("resumed_by", ["join", "the same command"])
def test_a_cluster_that_goes_away(
    cluster: Any, source: Path, tmp_path: Path, resumed_by: str
) -> None:
    with started(source, tmp_path / "out", cluster.address) as command:
        wait_for_journal(tmp_path / "out")
        os.kill(command.pid, signal.SIGKILL)
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        command.communicate()
    assert not (tmp_path / "out").exists()
    if resumed_by == "join":
        cluster.shutdown()
        time.sleep(2)  # workers end when they lose their raylet
        requant.join(tmp_path / "out")
    else:
        again = started(source, tmp_path / "out", cluster.address)
        _, err = again.communicate(timeout=200)
        assert again.returncode == 0, err
    requant.convert(source, tmp_path / "one", **OPTIONS, search="best")
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"])
def test_there_is_no_cluster(address: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster can be reached at --address {address}"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", **OPTIONS, engine="ray", address=address)
    assert list(tmp_path.iterdir()) == []
