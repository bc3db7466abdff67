"""Parts as tasks of a Ray cluster. Placement, retries and transport are Ray's.

The job is put into Ray's object store once. A task whose worker or machine dies is run again, and
does what its journal lacks. An actor holds the latest progress of each part.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any

from requant.bit_allocation.measure import TrialRun
from requant.bit_allocation.measurements import MeasuredErrors
from requant.cluster.part_task import Job, MeasureJob, PartOutcome, measure_part, run_part
from requant.errors import CheckpointError, ClusterError, Problem
from requant.execution.executor import Progress
from requant.quantization.part import MAX_PARTS, Part
from requant.text import one_line

MAX_RETRIES = 8  # of a part whose worker or machine died
PARTS_PER_SLOT = 4  # so that machines of different speed end at about the same time
_CONNECT_S = 10.0
_POLL_S = 0.5
_REPORT_S = 1.0


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that the caller has is used and stays.

    Raises:
        ClusterError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError("--engine ray needs Ray: pip install 'requant[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    where = address or "auto"
    try:
        _check_reachable(where)
        ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many kinds, RuntimeError and ValueError among them
        raise ClusterError(
            f"no Ray cluster can be reached at --address {where} ({one_line(error)}). `ray start` "
            "makes this machine part of one; ray://HOST:10001 names one from outside"
        ) from error
    # Ray prints its warnings, such as those on machines that die, on standard output, the last of
    # them when it is shut down.
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing answers at a host and port, for which Ray waits a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


@dataclass(frozen=True, slots=True)
class Shape:
    """How a conversion is spread over a cluster."""

    threads: int  # of a task, and processors that Ray reserves for it
    parts: int

    def all_parts(self) -> list[Part]:
        """The parts in their order."""
        return [Part(number, self.parts) for number in range(1, self.parts + 1)]


def shape_of(cpus: list[float], threads: int | None, parts: int | None) -> Shape:
    """How many parts there are, and with how many threads each runs.

    Args:
        cpus: Processors of each machine.
        threads: Those of a task; by default as many as the smallest machine has.
        parts: Their number; by default ``PARTS_PER_SLOT`` for each that can run at a time.

    Raises:
        ClusterError: No machine has the processors of a task.

    Example:
        >>> shape_of([16, 16, 64], None, None)
        Shape(threads=16, parts=24)
    """
    usable = [int(count) for count in cpus if count >= 1]
    threads = threads or min(usable, default=1)
    slots = sum(count // threads for count in usable)
    if not slots and parts is None:
        raise ClusterError(
            f"no machine of the cluster has {threads} processors: give fewer --threads; where "
            "machines are started on demand, give --parts too"
        )
    return Shape(threads, parts or min(slots * PARTS_PER_SLOT, MAX_PARTS))


class _Board:
    """The latest progress of each part: an actor."""

    def __init__(self) -> None:
        self._parts: dict[Part, Progress] = {}

    def put(self, part: Part, progress: Progress) -> None:
        self._parts[part] = progress

    def read(self) -> dict[Part, Progress]:
        return self._parts


def _task(job: Job | MeasureJob, part: Part, share: Any, board: Any) -> PartOutcome:
    """What runs on a worker: the part, and a report about each second.

    ``share`` are the trials of a part that measures.
    """
    reported = 0.0

    def report(progress: Progress) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_S:
            reported = time.monotonic()
            board.put.remote(part, progress)

    if isinstance(job, MeasureJob):
        return measure_part(job, part, share, report)
    return run_part(job, part, report)


def run_on_ray(
    ray: Any,
    job: Job,
    parts: int | None,
    progress: Callable[[Progress], None] | None = None,
) -> list[PartOutcome]:
    """Run all parts of a job and return when they are done; ``ray`` is what ``connected`` gives.

    Raises:
        ClusterError: A part failed, or died more than ``MAX_RETRIES`` times.
        CheckpointError: Values of the source are NaN, or infinite: of all parts.
    """
    shape = _shape(ray, job.run.threads, parts)
    job = replace(job, run=replace(job.run, threads=shape.threads))
    shares = dict.fromkeys(shape.all_parts())
    bytes_total = sum(step.bytes_in for step in job.plan.steps)
    return _Run(ray, job, shape, job.plan.source, bytes_total).run(shares, progress)


def measure_on_ray(
    ray: Any,
    job: MeasureJob,
    trials: TrialRun,
    kept: MeasuredErrors,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Have tasks measure the layers that are not in ``kept``; as many parts as ``run_on_ray`` has.

    Raises:
        ClusterError, CheckpointError: As ``run_on_ray``.
    """
    of_job = job.job
    shape = _shape(ray, of_job.run.threads, of_job.run.parts)
    job = replace(job, job=replace(of_job, run=replace(of_job.run, threads=shape.threads)))
    left = set(trials.unmeasured(kept))
    shares = {
        part: trials.trials(layer for layer in trials.layers_of_part(part) if layer in left)
        for part in shape.all_parts()
    }
    shares = {part: share for part, share in shares.items() if share}
    bytes_total = sum(trial.bytes_in for share in shares.values() for trial in share)
    _Run(ray, job, shape, of_job.plan.source, bytes_total).run(shares, progress)


def _shape(ray: Any, threads: int | None, parts: int | None) -> Shape:
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return shape_of(cpus, threads, parts)


class _Run:
    """The tasks of one job, their outcomes and progress."""

    def __init__(
        self, ray: Any, job: Job | MeasureJob, shape: Shape, source: str, bytes_total: int
    ) -> None:
        self.ray, self.job, self.shape = ray, job, shape
        self.source, self.bytes_total = source, bytes_total
        self.board = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()
        self.pending: dict[Any, Part] = {}
        self.reported: Mapping[Part, Progress] = {}
        self.outcomes: list[PartOutcome] = []

    def run(
        self, shares: Mapping[Part, Any], progress: Callable[[Progress], None] | None
    ) -> list[PartOutcome]:
        """Run the parts, each with what is shipped to it alone."""
        began = time.perf_counter()
        shipped = self.ray.put(self.job)
        task = self.ray.remote(
            num_cpus=self.shape.threads, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD"
        )(_task)
        for part, share in shares.items():
            self.pending[task.remote(shipped, part, share, self.board)] = part
        try:
            while self.pending:
                ready, _ = self.ray.wait(list(self.pending), timeout=_POLL_S)
                for reference in ready:
                    self.outcomes.append(self._outcome(reference))
                if progress is not None:
                    progress(self._progress(time.perf_counter() - began))
        finally:
            for reference in self.pending:
                with suppress(Exception):  # the cluster may be gone
                    self.ray.cancel(reference, force=True)
            with suppress(Exception):
                self.ray.kill(self.board)
        problems: list[Problem] = [x for outcome in self.outcomes for x in outcome.problems]
        if problems:
            raise CheckpointError(self.source, problems)
        return self.outcomes

    def _outcome(self, reference: Any) -> PartOutcome:
        part = self.pending.pop(reference)
        errors = self.ray.exceptions
        try:
            outcome: PartOutcome = self.ray.get(reference)
        except errors.RayTaskError:
            raise  # a defect, with the traceback of the worker
        except errors.RayError as error:
            raise ClusterError(
                f"part {part} did not end: {one_line(error)}; what is done is kept, the same "
                "command resumes"
            ) from error
        if outcome.failure:
            raise ClusterError(f"part {part} on {outcome.host}: {outcome.failure}")
        return outcome

    def _progress(self, elapsed_s: float) -> Progress:
        """The sum over all parts; of a part that runs again, what the new run has done."""
        with suppress(self.ray.exceptions.RayError):  # the actor is started again on its own
            self.reported = self.ray.get(self.board.read.remote(), timeout=1)
        ended = {outcome.part: outcome for outcome in self.outcomes}
        running = {part: x for part, x in self.reported.items() if part not in ended}
        done = sum(x.bytes_in for x in ended.values()) + sum(x.bytes_done for x in running.values())
        written = sum(x.bytes_written for x in self.reported.values())
        layer = next(reversed([x.layer for x in running.values()]), "")
        return Progress(layer, done, self.bytes_total, elapsed_s, written)
