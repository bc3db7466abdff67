"""What a calibration keeps next to its output, so that the same command resumes after a stop.

.OUTPUT.requant-calibrating/
lock                held by the process that calibrates
state.json          what is done: a ``BlockRunState``
00007.safetensors   statistics of one block
00007.4-6           with parts: sums of one block over the sections 4 and 5
hidden-0, hidden-1  hidden states before and after a block: the two files take turns
finished.json       with parts: a ``FinishedRun``, once the part is done
3-of-8/             with parts: the same files for part 3
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from requant.calibration.collector import Collector, Sums
from requant.core.files import fsync, replace_file
from requant.errors import CheckpointError, OutputError, Problem, UsageError
from requant.importance.reader import merge_statistics, write_statistics
from requant.output.staging import lock_staging
from requant.quantization.part import Part
from requant.text import os_error_text

FINISHED = "finished.json"


@dataclass(frozen=True, slots=True)
class BlockRunState:
    """What of a calibration is done."""

    key: str  # hash of everything that the statistics depend on
    done: int = -1  # how many blocks are done, the head included; -1 before the text is embedded
    parts: tuple[str, ...] = ()  # files with their statistics
    # Layer path -> the number of its experts ``without_tokens``, and whether it has a ``hessian``.
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    too_wide: tuple[str, ...] = ()  # layers that are too wide for a Hessian
    called: tuple[str, ...] = ()  # layers whose inputs were seen

    @classmethod
    def load(cls, path: Path, key: str) -> BlockRunState:
        """The state that a stopped run of the same key left, else that of a new one."""
        try:
            data = json.loads(path.read_text("utf-8"))
            values: dict[str, Any] = {
                name: tuple(x) if isinstance(x, list) else x for name, x in data.items()
            }
            saved = cls(**values)
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(key)
        return saved if saved.key == key else cls(key)

    def save(self, path: Path) -> None:
        """Write the state, durably, or leave the file as it is."""
        with as_output_errors(path), replace_file(path) as file:
            file.write(json.dumps(asdict(self)).encode())

    def with_block(self, collector: Collector, done: int, parts: Sequence[str]) -> BlockRunState:
        """The state after one more block, whose statistics or sums are in the files ``parts``."""
        layers = {
            path: {"without_tokens": int((x.count == 0).sum()), "hessian": x.products is not None}
            for path, x in collector.sums.items()
        }
        return replace(
            self,
            done=done,
            parts=(*self.parts, *parts),
            layers={**self.layers, **layers},
            too_wide=tuple(sorted({*self.too_wide, *collector.too_wide})),
            called=tuple(sorted({*self.called, *collector.called})),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What is known of a calibration that is done, apart from its statistics."""

    source: str
    tokens: int
    windows: int
    images: int
    reason: str  # why the model was run as a whole; "" where it was not
    metadata: Mapping[str, str]  # of the statistics file
    watched: tuple[str, ...]  # layers that should have statistics
    embeddings: tuple[str, ...]


class HiddenStates:
    """The hidden states of all windows before each block, in files: float32, window by window.

    ``shape`` has windows, tokens of a window and width of the model.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder, self._shape = folder, shape
        self.is_cut = False

    def _path(self, number: int) -> Path:
        return self._folder / f"hidden-{number % 2}"

    def write(self, number: int, states: Iterable[np.ndarray]) -> None:
        """Write the hidden states before a block; those before the last but one are replaced."""
        path = self._path(number)
        with as_output_errors(path), path.open("wb") as file:
            for row in states:
                file.write(np.ascontiguousarray(row, np.float32).data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, number: int) -> Iterator[np.ndarray]:
        """The hidden states before a block.

        Raises:
            OutputError: The file is shorter than it was written.
        """
        path = self._path(number)
        with path.open("rb") as file:
            for _ in range(self._shape[0]):
                row = np.empty(self._shape[1:], np.float32)
                if file.readinto(row.data.cast("B")) < row.nbytes:
                    self.is_cut = True
                    message = "is not what the stopped run left; --no-resume starts over"
                    raise OutputError(f"{path}: {message}")
                yield row

    def keep(self, number: int, place: Path) -> None:
        """Give the file of the hidden states before a block another name."""
        with as_output_errors(place):
            self._path(number).replace(place)


class RunFolder:
    """The folder of one calibration; a context manager that holds its lock.

    It is next to ``output``, the statistics file to be. ``key`` is the hash of everything that the
    statistics depend on; ``resume`` resumes a stopped run of the same key. A ``part`` has a folder
    of its own in it. With ``joins`` what parts have left is kept until ``finish``.
    """

    def __init__(
        self,
        source: str,
        output: Path,
        key: str,
        resume: bool,
        part: Part | None = None,
        *,
        joins: bool = False,
    ) -> None:
        self._source, self._output, self._resume, self._part = source, output, resume, part
        self._joins = joins
        self.path = calibrating_dir(output)
        if part is not None:
            self.path /= f"{part.number}-of-{part.count}"
        self.state = BlockRunState(key)
        self._hidden: HiddenStates | None = None
        self._locks: list[int] = []

    def __enter__(self) -> RunFolder:
        with as_output_errors(self.path):
            if self._part is not None:
                self._locks.append(lock_staging(self.path.parent, self._output, shared=True))
            self._locks.append(lock_staging(self.path, self._output))
        if self._joins:
            return self
        if self._part is None and self._resume and any(part_folders(self._output)):
            self._unlock()
            raise OutputError(
                f"{self.path} has parts of a calibration: requant join "
                f"{shlex.quote(str(self._output))} completes it, --no-resume starts over"
            )
        if self._resume:
            self.state = BlockRunState.load(self.path / "state.json", self.state.key)
        if self.state.done < 0:
            self.start_over()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._unlock()
        can_resume = self.state.done >= 0 and not (self._hidden and self._hidden.is_cut)
        if isinstance(error, KeyboardInterrupt | OSError) and can_resume:
            error.add_note(
                f"blocks done and kept in {self.path}: {self.state.done}; the same command "
                "resumes, --no-resume starts over"
            )

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def start_over(self) -> None:
        """Forget what an earlier run left."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        self.state = BlockRunState(self.state.key)

    def hidden_states(self, shape: tuple[int, ...]) -> HiddenStates:
        """The files of the hidden states, of windows, tokens and width in ``shape``."""
        self._hidden = HiddenStates(self.path, shape)
        return self._hidden

    def check_finite(self, sums: Mapping[str, Sums]) -> None:
        """Check sums before they are kept.

        Raises:
            CheckpointError: They hold NaN or infinity.
        """
        message = "the text's inputs become NaN or infinite: weights before it hold such values"
        problems = [Problem(path, message) for path, x in sums.items() if not x.are_finite()]
        if problems:
            raise CheckpointError(self._source, problems)

    def save_block(self, collector: Collector, done: int, parts: Sequence[str] = ()) -> None:
        """Write the statistics of a block, or note the files with its sums; it is done then."""
        sums = collector.sums
        if sums:
            part = f"{done:05d}.safetensors"
            parts = (*parts, part)
            layers = {path: x.statistics() for path, x in sums.items()}
            hessians = {path: x.hessian for path, x in sums.items() if x.products is not None}
            with as_output_errors(self.path / part):
                write_statistics(self.path / part, layers, hessians)
        self.state = self.state.with_block(collector, done, parts)
        self.state.save(self.path / "state.json")

    def finish(self, finished: FinishedRun) -> None:
        """Put the blocks together under the output's name, and remove the folder.

        A part says that it is done instead; ``join`` needs its files.
        """
        if self._part is not None:
            with as_output_errors(self.path), replace_file(self.path / FINISHED) as file:
                file.write(json.dumps(asdict(finished)).encode())
            with as_output_errors(self.path):
                fsync(self.path)
                for name in ("hidden-0", "hidden-1"):
                    (self.path / name).unlink(missing_ok=True)
            return
        parts = [self.path / name for name in self.state.parts]
        with as_output_errors(self._output):
            merge_statistics(parts, self._output, dict(finished.metadata))
        shutil.rmtree(self.path, ignore_errors=True)


def calibrating_dir(output: Path) -> Path:
    """The hidden folder in which a calibration keeps what is done."""
    return output.with_name(f".{output.name}.requant-calibrating")


def part_folders(output: Path) -> Iterator[tuple[Part, Path]]:
    """The parts of a calibration that were begun, with their folders."""
    for path in sorted(calibrating_dir(output).glob("*-of-*")):
        with suppress(UsageError):
            yield Part.parse(path.name.replace("-of-", "/")), path


@contextmanager
def as_output_errors(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: {os_error_text(error)}") from error
