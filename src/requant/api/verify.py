"""``verify``: is an output what its record says, and what its source gives?

Two questions: hashes and files against ``requant.json``, and, where the source is given, the
whole conversion again into a sink that compares. It writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from requant.checkpoints.checkpoint import Checkpoint, FileRange, SourceTensor
from requant.checkpoints.folder_files import CONFIG, INDEX, RECORD, file_size, is_repository_id
from requant.core.files import hash_file, hash_range, open_regular
from requant.core.regex import regex_time_budget
from requant.core.types import Source
from requant.errors import (
    MAX_PROBLEMS,
    CheckpointError,
    ParseError,
    Problem,
    UsageError,
    error_action,
)
from requant.execution.executor import Progress, run_plan
from requant.execution.resources import ResourceLimits, plan_resources
from requant.formats import read_layout
from requant.output.record import encode_json, read_record, record_hash, version
from requant.planning.plan import OutputTensor, Plan
from requant.planning.plan_source import PlanSource
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository, open_source
from requant.sources.open import as_checkpoint, read_checkpoint
from requant.text import format_value


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found.

    Attributes:
        output: The folder that was checked.
        source: What it was compared with; None where only its own record was.
        tensors: Tensors that were compared.
        nbytes: Their bytes.
        problems: Everything that differs, tensor by tensor.
    """

    output: str
    source: str | None
    tensors: int
    nbytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The verification as JSON data."""
        return asdict(self) | {"ok": self.ok}


@error_action("verified")
@regex_time_budget()
def verify(
    folder: Source,
    output: Source | None = None,
    *,
    config_from: Source | None = None,
    statistics: Source | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Check an output of ``convert`` bit for bit.

    ``verify(source, output)`` repeats the conversion that ``requant.json`` records and compares
    every byte. ``verify(output)`` holds tensors and files against the hashes recorded there, and
    index, config and layers against each other.

    Args:
        folder: The source, or the output where that is all there is.
        output: The output, if a source is given.
        config_from: What the conversion of a GGUF source was given under this name.
        statistics: The statistics file or imatrix that the conversion was given.
        threads: Worker threads; every processor by default.
        max_memory: Most bytes to hold in memory, where the conversion is repeated.
        progress: Called after each tensor whose hash is compared, then about ten times a second
            while the conversion is repeated.

    Returns:
        What differs; ``.ok`` if nothing does.

    Raises:
        CheckpointError: The source cannot be read, or the output has no record.

    Example:
        >>> requant.verify("source", "output").ok  # doctest: +SKIP
        True
    """
    place = Path(folder if output is None else output)
    found = _ProblemCollector()
    record = _read_record(place, found, None if output is None else Path(folder))
    checkpoint = _read_output(place, found)
    if checkpoint is not None:
        workers = threads or os.cpu_count() or 1
        _check_hashes(checkpoint, record, workers, found, progress)
        _check_layers(checkpoint, found)
    _check_files(place, record, found)
    if output is not None:
        requested = None if config_from is None else os.fspath(config_from)
        source = _source(folder, record, requested)
        known = None if statistics is None else os.fspath(statistics)
        planned = _repeated_plan(source, record, requested, known, found)
        if planned is not None:
            budget = plan_resources(planned.plan, threads, max_memory)
            _compare(*planned, place, found, budget, progress)
    tensors = checkpoint.tensors.values() if checkpoint is not None else ()
    return Verification(
        str(place),
        None if output is None else str(folder),
        len(tensors),
        sum(tensor.info.nbytes for tensor in tensors),
        tuple(found.problems),
    )


class _ProblemCollector:
    """Problems, one a place, from any thread."""

    def __init__(self) -> None:
        self.by_place: dict[str, Problem] = {}
        self._lock = threading.Lock()

    @property
    def problems(self) -> list[Problem]:
        return list(self.by_place.values())

    def add(self, where: str, message: str) -> None:
        with self._lock:
            if len(self.by_place) < MAX_PROBLEMS:
                self.by_place.setdefault(where, Problem(where, message))


def _read_record(place: Path, found: _ProblemCollector, source: Path | None) -> dict[str, Any]:
    instead = ""
    if source is not None and os.path.lexists(source / RECORD):
        instead = f"is missing, but {source} has one: the source comes first, then the output"
    record = read_record(place, instead)
    if record.get("sha256") != record_hash(record):
        found.add(RECORD, "is not as it was written: its own hash differs")
    return record


def _read_output(place: Path, found: _ProblemCollector) -> Checkpoint | None:
    try:
        return read_checkpoint(place)
    except CheckpointError as error:
        for problem in error.problems:
            found.add(problem.where, problem.message)
        return None


def _hashes(record: Mapping[str, Any], key: str) -> dict[str, str]:
    """A table of the record, whatever its content."""
    table = record.get(key)
    return dict(table) if isinstance(table, Mapping) else {}


def _check_hashes(
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    workers: int,
    found: _ProblemCollector,
    progress: Callable[[Progress], None] | None,
) -> None:
    expected = _hashes(record, "tensors")
    for name in expected.keys() - checkpoint.tensors.keys():
        found.add(name, "is missing; requant.json knows it")
    for name in checkpoint.tensors.keys() - expected.keys():
        found.add(name, "is in no requant.json: it was added later")
    headers = _hashes(record, "headers")
    for file in checkpoint.files:
        if headers.get(file.name) != file.header_sha256:
            found.add(file.name, "its header is not the one that was written")
    with ExitStack() as stack:
        fds: dict[str, int] = {}
        for file in checkpoint.files:
            fds[file.name] = open_regular(checkpoint.path / file.name)
            stack.callback(os.close, fds[file.name])

        def check(tensor: SourceTensor) -> None:
            part: FileRange = tensor.ranges[0]  # type: ignore[union-attr]  # read, not computed
            try:
                actual = hash_range(fds[part.file], part.offset, part.nbytes)
            except OSError as error:
                found.add(tensor.name, f"{part.file} cannot be read: {error.strerror or error}")
                return
            if actual != expected[tensor.name]:
                found.add(
                    tensor.name,
                    f"its bytes in {part.file} are not those that were written: SHA-256 "
                    f"{actual[:12]}..., expected {str(expected[tensor.name])[:12]}...",
                )

        known = [t for name, t in checkpoint.tensors.items() if name in expected]
        began, done, total = time.perf_counter(), 0, sum(t.info.nbytes for t in known)
        with ThreadPoolExecutor(workers) as pool:
            for tensor, _ in zip(known, pool.map(check, known), strict=True):
                done += tensor.info.nbytes
                if progress is not None:
                    progress(Progress(tensor.name, done, total, time.perf_counter() - began))


def _check_layers(checkpoint: Checkpoint, found: _ProblemCollector) -> None:
    """Every quantized layer must be whole, and as the config says."""
    for problem in read_layout(checkpoint)[1].problems:
        found.add(problem.where, problem.message)


def _check_files(place: Path, record: Mapping[str, Any], found: _ProblemCollector) -> None:
    for name, digest in _hashes(record, "files").items():
        if name not in (CONFIG, INDEX) and (".." in Path(name).parts or Path(name).is_absolute()):
            found.add(f"{RECORD}: {name}", "leads out of the folder")
            continue
        try:
            _, wrong = file_size(place, name)  # a link may lead out of the folder
            if wrong:
                found.add(name, wrong)
            elif hash_file(place / name) != digest:
                found.add(name, "is not the file that was written")
        except OSError as error:
            found.add(name, f"cannot be read: {error.strerror or error}")
        except ValueError:  # a NUL, or half a letter
            found.add(f"{RECORD}: {format_value(name)}", "is not a file name")


def _source(
    folder: Source, record: Mapping[str, Any], config_from: str | None
) -> Path | Checkpoint:
    """What the output was made from: a folder, or a repository at the recorded commit."""
    recorded = record.get("source")
    made = recorded.get("repository") if isinstance(recorded, Mapping) else None
    name, revision = os.fspath(folder), None
    if isinstance(made, list) and len(made) == 2 and is_repository_id(folder):
        then, commit = map(str, made)
        if name in (then, then.partition(":")[0]):  # which GGUF file it was need not be said
            name, revision = then, commit
    return open_source(name, find_repository(name, revision), config_from)


def _repeated_plan(
    source: Path | Checkpoint,
    record: Mapping[str, Any],
    config_from: str | None,
    statistics: str | None,
    found: _ProblemCollector,
) -> Planned | None:
    """The plan that the record was made from, made again.

    Raises:
        UsageError: It was made with a statistics file, and none is given; or the reverse.
    """
    options = record.get("options")
    try:
        made = ConvertOptions.from_dict(options if isinstance(options, Mapping) else {})
        if made.statistics is not None and statistics is None:
            raise UsageError(
                f"the output was made with statistics, {made.statistics}: name that file with "
                "--imatrix, so that the conversion can be repeated"
            )
        if made.statistics is None and statistics is not None:
            raise UsageError(f"--imatrix {statistics}: the output was made without statistics")
        repeated = replace(made, config_from=config_from, statistics=statistics)
        planned = plan_with_source(as_checkpoint(source, config_from), repeated)
    except ParseError as error:
        found.add(f"{RECORD}: options", str(error))
        return None
    plan = planned.plan
    if plan.hash != record.get("plan"):
        maker = record.get("requant")
        other = maker if isinstance(maker, str) else format_value(maker)
        by = "" if maker == version() else f"; it was made by requant {other}, this is {version()}"
        why = _describe_source_changes(plan, record)
        if not by and not why and statistics is not None:
            why = f"; {statistics} is another file than the {made.statistics} of then, it seems"
        found.add(f"{RECORD}: plan", f"this source gives another plan{by}{why}")
    return planned


def _describe_source_changes(plan: Plan, record: Mapping[str, Any]) -> str:
    """Which source files differ from those of the record."""
    then = record.get("source")
    files = then.get("files") if isinstance(then, Mapping) else None
    now = [asdict(file) for file in plan.files]
    if not isinstance(files, list) or files == now:
        return ""
    other = [file["name"] for file in now if file not in files]
    return f"; other source files than then: {', '.join(other[:3]) or 'fewer'}"


def _compare(
    plan: Plan,
    source: PlanSource,
    place: Path,
    found: _ProblemCollector,
    budget: ResourceLimits,
    progress: Callable[[Progress], None] | None,
) -> None:
    for name, value in ((CONFIG, dict(plan.config)), (INDEX, plan.index())):
        with suppress(OSError):
            if (place / name).read_bytes() != encode_json(value):
                found.add(name, "is not what the conversion of this source gives")
    for name in plan.side_files:
        with suppress(OSError):
            made = source.opened.generated_files.get(name)
            path = source.opened.path / name
            wanted = hash_file(path) if made is None else hashlib.sha256(made()).hexdigest()
            _, wrong = file_size(place, name)
            if wrong or hash_file(place / name) != wanted:
                found.add(name, wrong or "is not the source's")
    with _CompareSink(plan, place, found) as sink:
        run_plan(plan, source, sink, budget, progress)


class _CompareSink:
    """Takes the place of the output folder: what it is given is compared with what is there."""

    progress_log = None

    def __init__(self, plan: Plan, place: Path, found: _ProblemCollector) -> None:
        self.place, self.found = place, found
        self._fds: dict[str, int] = {}
        self._tensors: dict[str, tuple[list[int], list[OutputTensor]]] = {}
        self._headers = {shard.name: shard.header() for shard in plan.shards}
        for shard in plan.shards:
            tensors = sorted((t for t in shard.tensors if t.info.nbytes), key=lambda t: t.offset)
            self._tensors[shard.name] = [t.offset for t in tensors], tensors

    def __enter__(self) -> _CompareSink:
        for name, header in self._headers.items():
            try:
                self._fds[name] = open_regular(self.place / name)
            except OSError as error:
                self.found.add(name, f"cannot be read: {error.strerror or error}")
                continue
            if os.pread(self._fds[name], len(header), 0) != header:
                self.found.add(name, "its header is not what the conversion of this source gives")
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Compare ``data`` with the bytes at an absolute offset of a shard."""
        if file not in self._fds:
            return
        actual = os.pread(self._fds[file], len(data), offset)
        if actual == data:
            return
        offsets, tensors = self._tensors[file]
        tensor = tensors[bisect_right(offsets, offset) - 1]
        at = offset - tensor.offset + _first_difference(actual, data)
        self.found.add(
            tensor.name, f"differs from the conversion of this source, first at byte {at:,}"
        )


def _first_difference(a: Iterable[int], b: Iterable[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
