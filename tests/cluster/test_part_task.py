"""A shipped plan run part by part gives the bytes of one process; what differs is rejected."""

import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import MonkeyPatch

import requant
from requant.api import budget_parts, runs
from requant.api import convert as conversion
from requant.cluster import part_task
from requant.cluster.part_task import Job, MeasureJob, PartOutcome, measure_part, run_part
from requant.cluster.ray_engine import Shape, shape_of
from requant.errors import CheckpointError, ClusterError, UsageError
from requant.output.staging import staging_dir
from requant.quantization.part import Part
from tests.support.checkpoints import MICRO_LLAMA, tree
from tests.support.fixture_folders import fixture
from tests.support.number_formats import bf16
from tests.support.published_models import published

KEEP_4_BITS: dict[str, Any] = {"bits": 4, "layout": "keep"}
Ran = list[tuple[Job, list[PartOutcome]]]


@pytest.fixture
def ran(monkeypatch: MonkeyPatch) -> Ran:
    """Run the tasks in this process, each with the job as it arrives at a worker."""
    jobs: Ran = []

    def run(ray: object, job: Job, parts: int | None, progress: object) -> None:
        count = parts or 3
        numbers = range(1, count + 1)
        outcomes = [run_part(pickle.loads(pickle.dumps(job)), Part(n, count)) for n in numbers]
        jobs.append((job, outcomes))
        if any(x.failure for x in outcomes):
            raise ClusterError(next(x.failure for x in outcomes if x.failure))
        if problems := [x for outcome in outcomes for x in outcome.problems]:
            raise CheckpointError(job.source, problems)

    monkeypatch.setattr(conversion, "connected", lambda address: nullcontext("ray"))
    monkeypatch.setattr(runs, "run_on_ray", run)
    return jobs


@pytest.mark.parametrize(
    "name", ["dense", "AWQ", *(pytest.param(x, marks=pytest.mark.slow) for x in ("GGUF", "FP8"))]
)
def test_a_shipped_plan_gives_the_bytes_of_one_process(
    name: str, tmp_path: Path, ran: Ran, monkeypatch: MonkeyPatch
) -> None:
    """It is made once: a task only opens the source."""
    source, options = {
        "dense": (MICRO_LLAMA, KEEP_4_BITS),
        "AWQ": (fixture("awq-gemm-g64-skip") / "checkpoint", {"layout": "keep"}),
        "GGUF": (fixture("gguf-q4_k_m") / "checkpoint" / "model.gguf", {"layout": "keep"}),
        "FP8": (fixture("fp8-block-llama") / "checkpoint", KEEP_4_BITS),
    }[name]
    requant.convert(source, tmp_path / "one", **options)
    monkeypatch.setattr(part_task, "plan_with_source", None)
    requant.convert(source, tmp_path / "out", **options, engine="ray", parts=4)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert not staging_dir(tmp_path / "out").exists()
    ((job, outcomes),) = ran
    assert sum(x.bytes_in for x in outcomes) == sum(step.bytes_in for step in job.plan.steps)


@pytest.mark.slow
def test_computed_tensors_are_planned_again(tmp_path: Path, ran: Ran) -> None:
    published(tmp_path / "m", "deepseek_v3")
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "layout": "mlx-lm"}
    requant.convert(tmp_path / "m", tmp_path / "one", **options)
    requant.convert(tmp_path / "m", tmp_path / "out", **options, engine="ray")
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_the_join_does_nothing_again(tmp_path: Path, ran: Ran, monkeypatch: MonkeyPatch) -> None:
    def no_write(*_: object) -> None:
        raise AssertionError("written twice")

    publish = runs.run_and_publish

    def join(*given: Any) -> Any:
        monkeypatch.setattr("requant.output.shard_files.ShardFiles.write", no_write)
        return publish(*given)

    monkeypatch.setattr(runs, "run_and_publish", join)
    requant.convert(MICRO_LLAMA, tmp_path / "out", **KEEP_4_BITS, engine="ray")


def test_nonfinite_values_of_all_parts_are_named(
    checkpoint: Callable[..., Path], tmp_path: Path, ran: Ran
) -> None:
    bad = bf16(64, 128)
    bad[3, 5] = np.nan
    source = checkpoint({f"{name}.weight": bad for name in "abc"})
    with pytest.raises(CheckpointError) as caught:
        requant.convert(source, tmp_path / "out", bits=4, engine="ray")
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "out").exists()


def test_a_cluster_measures_for_a_budget(
    tmp_path: Path, ran: Ran, monkeypatch: MonkeyPatch
) -> None:
    """Tasks measure, each with its own trials; the bits are chosen once."""
    options: dict[str, Any] = {"budget": 4.5, "layout": "keep"}
    requant.convert(MICRO_LLAMA, tmp_path / "one", **options)
    measured: list[set[str]] = []

    def measure(ray: object, job: MeasureJob, trials: Any, kept: Any, progress: object) -> None:
        for part in (Part(2, 2), Part(1, 2)):
            share = pickle.loads(pickle.dumps(trials.trials(trials.layers_of_part(part))))
            outcome = measure_part(pickle.loads(pickle.dumps(job)), part, share)
            assert not outcome.failure
            assert outcome.bytes_in == sum(trial.bytes_in for trial in share)
            measured.append({trial.layer for trial in share})

    monkeypatch.setattr(budget_parts, "measure_on_ray", measure)
    requant.convert(MICRO_LLAMA, tmp_path / "out", **options, engine="ray")
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    assert not measured[0] & measured[1]
    assert all(measured)


# -- what a machine of the cluster may lack ------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: MonkeyPatch) -> Job:
    """A job whose output is begun, of which no part has run."""
    jobs: list[Job] = []

    def stop(ray: object, job: Job, *_: object) -> None:
        jobs.append(job)
        raise ClusterError("stopped")

    monkeypatch.setattr(conversion, "connected", lambda address: nullcontext("ray"))
    monkeypatch.setattr(runs, "run_on_ray", stop)
    with pytest.raises(ClusterError, match="stopped"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", **KEEP_4_BITS, engine="ray")
    return jobs[0]


def test_a_machine_without_the_shared_folder(job: Job, tmp_path: Path) -> None:
    """Nothing is made there: parts on a disk of its own would be missing in the join."""
    outcome = run_part(replace(job, output=str(tmp_path / "elsewhere" / "out")), Part(1, 2))
    assert "on a disk that all machines of the cluster share" in outcome.failure
    assert not (tmp_path / "elsewhere").exists()


def test_a_machine_with_another_version(job: Job) -> None:
    outcome = run_part(replace(job, requant="0.0.1"), Part(1, 2))
    assert "the plan was made by 0.0.1; install that version" in outcome.failure


def test_a_machine_with_another_source(
    job: Job, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = checkpoint({"a.weight": bf16(64, 128)})
    outcome = run_part(replace(job, source=str(other)), Part(1, 2))
    assert "is another file here" in outcome.failure
    outcome = run_part(replace(job, source=str(tmp_path / "no-such")), Part(1, 2))
    assert "no-such" in outcome.failure


def test_a_cluster_that_went_away(job: Job, tmp_path: Path) -> None:
    """What parts have done stays, and ``join`` completes it."""
    assert not run_part(job, Part(2, 3)).failure
    requant.join(tmp_path / "out")
    requant.convert(MICRO_LLAMA, tmp_path / "one", **KEEP_4_BITS)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_ray_is_not_installed(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'requant\[ray\]'"):
        requant.convert(MICRO_LLAMA, tmp_path / "out", **KEEP_4_BITS, engine="ray")
    assert list(tmp_path.iterdir()) == []


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "auto"}, "--address is for a cluster"),
        ({"parts": 3}, "--parts is for a cluster"),
        ({"engine": "ray", "part": "1/2"}, "--part and --engine"),
        ({"engine": "ray", "parts": 0}, "expected 1 to 10,000"),
        ({"engine": "ray", "calibrate": True}, "--calibrate and --engine"),
    ],
)
def test_options_that_contradict_each_other(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        requant.convert(MICRO_LLAMA, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_shape_of_a_cluster() -> None:
    assert shape_of([16, 16, 64], None, None) == Shape(threads=16, parts=24)
    assert shape_of([0, 4, 4], 2, None) == Shape(threads=2, parts=16)
    assert shape_of([4], None, 100) == Shape(threads=4, parts=100)
    assert shape_of([], 8, 5) == Shape(threads=8, parts=5)  # machines are started on demand
    with pytest.raises(ClusterError, match="no machine of the cluster has 8 processors"):
        shape_of([4, 4], 8, None)
