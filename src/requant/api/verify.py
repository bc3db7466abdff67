"""``verify``: compare an output with its record and with its source.

Files and tensors are compared with the hashes in ``requant.json``. If the source is given, the
conversion is also repeated into a sink that compares. Nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from requant.api.export import plan_folder
from requant.checkpoints.byte_ranges import FileRange
from requant.checkpoints.checkpoint import Checkpoint, SourceTensor
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
from requant.execution.sink import TensorOffsets
from requant.formats import read_layout
from requant.gguf.file_selection import WITHOUT
from requant.libraries.load_check import LoadCheck, check_load
from requant.output.record import encode_json, read_record, record_hash, version
from requant.planning.layout_selection import vision_part
from requant.planning.parts import part_of, steps_of_part
from requant.planning.plan import Plan
from requant.planning.planner import Planned, plan_with_source
from requant.quantization.export_options import split_export
from requant.quantization.options import STATISTICS, ConvertOptions
from requant.quantization.part import Part
from requant.sources.hub_repository import find_repository, open_source
from requant.sources.open import as_checkpoint, read_checkpoint
from requant.text import format_value, join_first, os_error_text


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a verification.

    Attributes:
        output: The folder that was checked.
        source: The source it was compared with; None if only with its record.
        tensors: Number of tensors that were compared.
        nbytes: Their bytes.
        problems: Every difference, tensor by tensor.
        part: The part that was compared; None for the whole output.
        load: Whether the output's library loads it and computes finite values; None if that was
            not asked for.
    """

    output: str
    source: str | None
    tensors: int
    nbytes: int
    problems: tuple[Problem, ...]
    part: Part | None = None
    load: LoadCheck | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs, and the output loads if that was asked for."""
        return not self.problems and (self.load is None or self.load.ok)

    def to_dict(self) -> dict[str, Any]:
        """The verification as JSON data."""
        load = None if self.load is None else self.load.to_dict()
        part = None if self.part is None else str(self.part)
        return asdict(self) | {"part": part, "load": load, "ok": self.ok}


@error_action("verified")
@regex_time_budget()
def verify(
    folder: Source,
    output: Source | None = None,
    *,
    config_from: Source | None = None,
    statistics: Source | None = None,
    part: Part | str | None = None,
    load: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Check an output of ``convert`` bit for bit.

    ``verify(source, output)`` repeats the conversion that ``requant.json`` records and compares
    every byte. ``verify(output)`` compares tensors and files with the hashes recorded there, and
    checks that index, config and layers agree.

    Args:
        folder: The source, or the output if no source is given.
        output: The output, if ``folder`` is the source.
        config_from: As given to the conversion of a GGUF source.
        statistics: The statistics file or imatrix, as given to the conversion.
        part: "3/8" repeats and compares one part of the conversion, as ``convert(part="3/8")`` cuts
            it. Of the record, the hashes of the tensors of that part are compared, and all that
            is not a tensor. Needs the source.
        load: Also load the output with its MLX library, strictly and on the CPU, and run one short
            forward pass. The folder then needs no record; the model must fit in memory.
        threads: Worker threads; every processor by default.
        max_memory: Most bytes to hold in memory while the conversion is repeated.
        progress: Called after each tensor whose hash is compared, then about ten times a second
            while the conversion is repeated.

    Returns:
        Every difference; ``.ok`` is true if there is none.

    Raises:
        CheckpointError: The source cannot be read, or the output has no record.
        UsageError: ``part`` is not a part, or is given without the source.

    Example:
        >>> requant.verify("source", "output").ok  # doctest: +SKIP
        True
    """
    place = Path(folder if output is None else output)
    chosen = None if part is None else Part.parse(part)
    if chosen is not None and output is None:
        raise UsageError(
            "--part is cut by the plan, which needs the source: requant verify SOURCE "
            f"{shlex.quote(str(place))} --part {chosen}"
        )
    problems = _ProblemCollector()
    if load and output is None and (place / CONFIG).is_file() and not (place / RECORD).exists():
        return Verification(str(place), None, 0, 0, (), load=check_load(place))
    record = _read_record(place, problems, None if output is None else Path(folder))
    checkpoint = _read_output(place, problems)
    planned = None
    if output is not None:
        requested = None if config_from is None else os.fspath(config_from)
        source = _source(folder, record, requested)
        known = None if statistics is None else os.fspath(statistics)
        planned = _repeated_plan(source, record, requested, known, problems)
    compared = None  # the plan of what is compared; None compares every tensor with its hash
    if planned is not None:
        plan = planned.plan
        compared = plan if chosen is None else part_of(plan, steps_of_part(plan, chosen))
    of_part = None if chosen is None or compared is None else _tensor_names(compared)
    tensors: list[SourceTensor] = []
    if checkpoint is not None:
        tensors = [t for t in checkpoint.tensors.values() if of_part is None or t.name in of_part]
        workers = threads or os.cpu_count() or 1
        _check_hashes(checkpoint, tensors, record, problems, workers=workers, progress=progress)
        _check_layers(checkpoint, problems)
    _check_files(place, record, problems)
    if planned is not None and compared is not None:
        budget = plan_resources(compared, threads, max_memory)
        _compare(planned, compared, place, problems, budget=budget, progress=progress)
    return Verification(
        str(place),
        None if output is None else str(folder),
        len(tensors),
        sum(tensor.info.nbytes for tensor in tensors),
        problems.as_tuple(),
        part=chosen,
        load=check_load(place, _recorded_layout(record))
        if load and checkpoint is not None
        else None,
    )


class _ProblemCollector:
    """Collects problems from any thread, at most one for each place."""

    def __init__(self) -> None:
        self.by_place: dict[str, Problem] = {}
        self._lock = threading.Lock()

    def as_tuple(self) -> tuple[Problem, ...]:
        return tuple(self.by_place.values())

    def add(self, where: str, message: str) -> None:
        with self._lock:
            if len(self.by_place) < MAX_PROBLEMS:
                self.by_place.setdefault(where, Problem(where, message))


def _read_record(place: Path, problems: _ProblemCollector, source: Path | None) -> dict[str, Any]:
    instead = ""
    if source is not None and os.path.lexists(source / RECORD):
        instead = f"is missing, but {source} has one: the source comes first, then the output"
    record = read_record(place, instead)
    if record.get("sha256") != record_hash(record):
        problems.add(RECORD, "is not as it was written: its own hash differs")
    return record


def _read_output(place: Path, problems: _ProblemCollector) -> Checkpoint | None:
    try:
        return read_checkpoint(place)
    except CheckpointError as error:
        for problem in error.problems:
            problems.add(problem.where, problem.message)
        return None


def _recorded_layout(record: Mapping[str, Any]) -> str:
    options = record.get("options")
    layout = options.get("layout") if isinstance(options, Mapping) else None
    return layout if isinstance(layout, str) else ""


def _hashes(record: Mapping[str, Any], key: str) -> dict[str, str]:
    """A table of names and hashes in the record; empty if it has none."""
    table = record.get(key)
    return dict(table) if isinstance(table, Mapping) else {}


def _tensor_names(plan: Plan) -> frozenset[str]:
    return frozenset(tensor.name for shard in plan.shards for tensor in shard.tensors)


def _check_hashes(
    checkpoint: Checkpoint,
    tensors: Iterable[SourceTensor],
    record: Mapping[str, Any],
    problems: _ProblemCollector,
    *,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    expected = _hashes(record, "tensors")
    for name in expected.keys() - checkpoint.tensors.keys():
        problems.add(name, "is missing, but requant.json lists it")
    for name in checkpoint.tensors.keys() - expected.keys():
        problems.add(name, "is not listed in requant.json: it was added later")
    headers = _hashes(record, "headers")
    for file in checkpoint.files:
        if headers.get(file.name) != file.header_sha256:
            problems.add(file.name, "its header is not the one that was written")
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
                problems.add(tensor.name, f"{part.file} cannot be read: {os_error_text(error)}")
                return
            if actual != expected[tensor.name]:
                problems.add(
                    tensor.name,
                    f"its bytes in {part.file} are not those that were written: SHA-256 "
                    f"{actual[:12]}..., expected {str(expected[tensor.name])[:12]}...",
                )

        known = [tensor for tensor in tensors if tensor.name in expected]
        began, done, total = time.perf_counter(), 0, sum(t.info.nbytes for t in known)
        with ThreadPoolExecutor(workers) as pool:
            for tensor, _ in zip(known, pool.map(check, known), strict=True):
                done += tensor.info.nbytes
                if progress is not None:
                    progress(Progress(tensor.name, done, total, time.perf_counter() - began))


def _check_layers(checkpoint: Checkpoint, problems: _ProblemCollector) -> None:
    """Check that every quantized layer is complete and agrees with the config."""
    for problem in read_layout(checkpoint)[1].problems:
        problems.add(problem.where, problem.message)


def _check_files(place: Path, record: Mapping[str, Any], problems: _ProblemCollector) -> None:
    for name, digest in _hashes(record, "files").items():
        if name not in (CONFIG, INDEX) and (".." in Path(name).parts or Path(name).is_absolute()):
            problems.add(f"{RECORD}: {name}", "leads out of the folder")
            continue
        try:
            _, wrong = file_size(place, name)  # a link may lead out of the folder
            if wrong:
                problems.add(name, wrong)
            elif hash_file(place / name) != digest:
                problems.add(name, "is not the file that was written")
        except OSError as error:
            problems.add(name, f"cannot be read: {os_error_text(error)}")
        except ValueError:  # a NUL, or half a letter
            problems.add(f"{RECORD}: {format_value(name)}", "is not a file name")


def _source(
    folder: Source, record: Mapping[str, Any], config_from: str | None
) -> Path | Checkpoint:
    """The source of the output: a folder, or a repository at the recorded commit."""
    source = record.get("source")
    repository = source.get("repository") if isinstance(source, Mapping) else None
    name, revision = os.fspath(folder), None
    if isinstance(repository, list) and len(repository) == 2 and is_repository_id(folder):
        recorded, commit = map(str, repository)
        if name in (recorded, recorded.partition(":")[0]):  # the GGUF file may be left out
            name, revision = recorded, commit
    recorded_options = record.get("options")
    part = recorded_options.get("mmproj") if isinstance(recorded_options, Mapping) else None
    mmproj = part if isinstance(part, str) else WITHOUT
    return open_source(name, find_repository(name, revision, mmproj), config_from)


def _repeated_plan(
    source: Path | Checkpoint,
    record: Mapping[str, Any],
    config_from: str | None,
    statistics: str | None,
    problems: _ProblemCollector,
) -> Planned | None:
    """Make the plan of the recorded conversion again.

    Raises:
        UsageError: The conversion used a statistics file, and none is given; or the reverse.
    """
    options = record.get("options")
    try:
        exported, rest = split_export(options if isinstance(options, Mapping) else {})
        recorded = ConvertOptions.from_dict(rest)
        if recorded.calibrate is not None and statistics is None:
            raise UsageError(
                "the conversion collected statistics itself, and did not keep them. To repeat it, "
                f"make them again: {shlex.join(recorded.calibration_words('SOURCE'))}, then "
                f"requant verify SOURCE OUTPUT --imatrix {STATISTICS}"
            )
        if recorded.statistics is not None and statistics is None:
            raise UsageError(
                f"the output was made with statistics, {recorded.statistics}: name that file with "
                "--imatrix, so that the conversion can be repeated"
            )
        if (recorded.statistics, recorded.calibrate) == (None, None) and statistics is not None:
            raise UsageError(f"--imatrix {statistics}: the output was made without statistics")
        repeated = replace(recorded, config_from=config_from, statistics=statistics)
        checkpoint = as_checkpoint(source, config_from, mmproj=vision_part(repeated))
        if exported is None:
            planned = plan_with_source(checkpoint, repeated)
        else:
            planned = plan_folder(checkpoint, exported)
    except ParseError as error:
        problems.add(f"{RECORD}: options", str(error))
        return None
    plan = planned.plan
    if plan.hash != record.get("plan"):
        maker = record.get("requant")
        other = maker if isinstance(maker, str) else format_value(maker)
        by = "" if maker == version() else f"; it was made by requant {other}, this is {version()}"
        why = _describe_source_changes(plan, record)
        if not by and not why and statistics is not None:
            named = recorded.statistics or "one of the conversion"
            why = f"; {statistics} is probably another file than the recorded {named}"
        problems.add(f"{RECORD}: plan", f"this source gives another plan{by}{why}")
    return planned


def _describe_source_changes(plan: Plan, record: Mapping[str, Any]) -> str:
    """Name the source files that differ from those of the record; "" for none."""
    source = record.get("source")
    files = source.get("files") if isinstance(source, Mapping) else None
    now = [asdict(file) for file in plan.files]
    if not isinstance(files, list) or files == now:
        return ""
    other = [file["name"] for file in now if file not in files]
    return f"; source files have changed: {join_first(other) or 'there are fewer'}"


def _compare(
    planned: Planned,
    compared: Plan,
    place: Path,
    problems: _ProblemCollector,
    *,
    budget: ResourceLimits,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Repeat the conversion, or of its tensors those of the plan ``compared``."""
    plan, source = planned
    for name, value in ((CONFIG, dict(plan.config)), (INDEX, plan.index())):
        with suppress(OSError):
            if (place / name).read_bytes() != encode_json(value):
                problems.add(name, "is not what the conversion of this source gives")
    for name in plan.side_files:
        with suppress(OSError):
            generate = source.opened.generated_files.get(name)
            if generate is None:
                expected = hash_file(source.opened.path / name)
            else:
                expected = hashlib.sha256(generate()).hexdigest()
            _, wrong = file_size(place, name)
            if wrong or hash_file(place / name) != expected:
                problems.add(name, wrong or "is not the source's")
    with _CompareSink(plan, place, problems) as sink:
        run_plan(compared, source, sink, budget, progress)


class _CompareSink:
    """A sink that compares the bytes of a conversion with those of an existing output."""

    shards = progress_log = None

    def __init__(self, plan: Plan, place: Path, problems: _ProblemCollector) -> None:
        self.place, self.problems = place, problems
        self._fds: dict[str, int] = {}
        self._offsets = TensorOffsets(plan)
        self._headers = {shard.name: shard.header() for shard in plan.shards}

    def __enter__(self) -> _CompareSink:
        for name, header in self._headers.items():
            try:
                self._fds[name] = open_regular(self.place / name)
            except OSError as error:
                self.problems.add(name, f"cannot be read: {os_error_text(error)}")
                continue
            if os.pread(self._fds[name], len(header), 0) != header:
                self.problems.add(
                    name, "its header is not what the conversion of this source gives"
                )
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
        tensor, start = self._offsets.find(file, offset)
        at = start + _first_difference(actual, data)
        self.problems.add(
            tensor.name, f"differs from the conversion of this source, first at byte {at:,}"
        )


def _first_difference(a: Iterable[int], b: Iterable[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
