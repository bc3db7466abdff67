"""``convert(engine="ray")`` on a real cluster of three raylets on this machine.

Skipped where Ray is not installed; ``scripts/test-ray`` installs it and runs these tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import requant
from requant.errors import ClusterError
from requant.output.staging import staging_dir
from tests.support.checkpoints import MICRO_LLAMA, ROOT, tree, write_checkpoint
from tests.support.hub_server import Hub, serving
from tests.support.number_formats import bf16
from tests.support.part_jobs import JOBS

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STORE_BYTES = 80 << 20  # of one raylet; Ray's least is 75 MiB
OPTIONS: dict[str, Any] = {"bits": 4, "layout": "keep"}
MEASURED: dict[str, Any] = {"budget": 4.5, "layout": "keep"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model in three shards; processes that are started from now on use it."""
    pytest.importorskip("huggingface_hub")
    shards = {f"model-{n:05}-of-00003.safetensors": n for n in (1, 2, 3)}
    files = {"config.json": b'{"model_type": "x"}'}
    shard_of = {}
    for name, number in shards.items():
        layer = f"model.layers.{number}.mlp.up_proj.weight"
        save_file({layer: bf16(256, 1024, seed=number)}, tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
        shard_of[layer] = name
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shard_of}).encode()
    with serving(Hub({"a/m": files})) as running:
        settings = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "hf")}
        for key, value in {**settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(key, value)
        yield running


@pytest.fixture
def hub_cluster(hub: Hub, cluster: Any) -> Any:
    """A cluster whose machines use the hub."""
    return cluster


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


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < deadline, "no part began"
        time.sleep(0.02)


def wait_for_journal(output: Path) -> None:
    """Wait until a part has recorded rows."""
    parts = staging_dir(output) / "parts"
    wait_for(lambda: any(b'"rows"' in path.read_bytes() for path in parts.glob("[0-9]*-of-*.*")))


def started(source: Path | str, output: Path, address: str, *asked: str) -> subprocess.Popen[str]:
    """The command, in a process of its own; 4 bits with a search, if nothing else is asked."""
    words = [sys.executable, "-m", "requant", "convert", source, output]
    words += [*(asked or ("--bits", "4", "--search", "best"))]
    words += ["--layout", "keep", "--json", "--engine", "ray"]
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


@pytest.mark.parametrize("name", ["budget", "GPTQ", "computed"])
def test_what_is_decided_once_or_shared(name: str, cluster: Any, tmp_path: Path) -> None:
    """Bits that are measured by tasks, a Hessian of several layers, tensors of computed values."""
    source, options = JOBS[name](tmp_path)
    requant.convert(source, tmp_path / "one", **options)
    requant.convert(source, tmp_path / "out", **options, engine="ray", address=cluster.address)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_machine_that_dies_while_it_measures(cluster: Any, source: Path, tmp_path: Path) -> None:
    """What it has measured and saved is not measured again by what takes its place."""
    requant.convert(source, tmp_path / "one", **MEASURED)
    with started(source, tmp_path / "out", cluster.address, "--budget", "4.5") as command:
        wait_for(lambda: list((staging_dir(tmp_path / "out") / "parts").glob("measured.*")))
        node = next(iter(cluster.worker_nodes))
        cluster.remove_node(node, allow_graceful=False)
        _, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_source_on_the_hub(hub: Hub, hub_cluster: Any, tmp_path: Path) -> None:
    """A task downloads the files that its part needs; machines that share a cache, each once."""
    command = started("a/m", tmp_path / "out", hub_cluster.address, "--bits", "4")
    _, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    asked = [path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET"]
    whole = [name for name in asked if name.endswith(".safetensors")][3:]  # after the headers
    assert sorted(whole) == sorted(x for x in hub.repositories["a/m"] if "-of-" in x)
    words = [sys.executable, "-m", "requant", "convert", "a/m", tmp_path / "one", "--bits", "4"]
    subprocess.run([*map(str, words), "--layout", "keep", "--quiet"], cwd=ROOT, check=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


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
