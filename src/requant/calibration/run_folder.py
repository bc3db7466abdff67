"""What a calibration keeps next to its output, so that the same command resumes after a stop.

.OUTPUT.requant-calibrating/
lock                held by the process that calibrates
state.json          what is done: a ``BlockRunState``
00007.safetensors   statistics of one block
hidden-0, hidden-1  hidden states before and after a block: the two files take turns
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from requant.calibration.collector import Collector
from requant.core.files import replace_file
from requant.errors import CheckpointError, OutputError, Problem
from requant.importance.reader import merge_statistics, write_statistics
from requant.output.staging import lock_staging
from requant.text import os_error_text


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

    def with_block(self, collector: Collector, done: int, part: str | None) -> BlockRunState:
        """The state after one more block."""
        layers = {
            path: {"without_tokens": int((x.count == 0).sum()), "hessian": x.products is not None}
            for path, x in collector.sums.items()
        }
        return replace(
            self,
            done=done,
            parts=self.parts if part is None else (*self.parts, part),
            layers={**self.layers, **layers},
            too_wide=tuple(sorted({*self.too_wide, *collector.too_wide})),
            called=tuple(sorted({*self.called, *collector.called})),
        )


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
    statistics depend on; ``resume`` resumes a stopped run of the same key.
    """

    def __init__(self, source: str, output: Path, key: str, resume: bool) -> None:
        self._source, self._output, self._resume = source, output, resume
        self.path = output.with_name(f".{output.name}.requant-calibrating")
        self.state = BlockRunState(key)
        self._hidden: HiddenStates | None = None
        self._lock = -1

    def __enter__(self) -> RunFolder:
        with as_output_errors(self.path):
            self._lock = lock_staging(self.path, self._output)
        if self._resume:
            self.state = BlockRunState.load(self.path / "state.json", self.state.key)
        if self.state.done < 0:
            self.start_over()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self._lock)
        can_resume = self.state.done >= 0 and not (self._hidden and self._hidden.is_cut)
        if isinstance(error, KeyboardInterrupt | OSError) and can_resume:
            error.add_note(
                f"blocks done and kept in {self.path}: {self.state.done}; the same command "
                "resumes, --no-resume starts over"
            )

    def start_over(self) -> None:
        """Forget what an earlier run left."""
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()
        self.state = BlockRunState(self.state.key)

    def hidden_states(self, shape: tuple[int, ...]) -> HiddenStates:
        """The files of the hidden states, of windows, tokens and width in ``shape``."""
        self._hidden = HiddenStates(self.path, shape)
        return self._hidden

    def save_block(self, collector: Collector, done: int) -> None:
        """Write the sums of a block; from now on it is done.

        Raises:
            CheckpointError: They hold NaN or infinity.
        """
        sums = collector.sums
        message = "the text's inputs become NaN or infinite: weights before it hold such values"
        problems = [Problem(path, message) for path, x in sums.items() if not x.are_finite()]
        if problems:
            raise CheckpointError(self._source, problems)
        part = f"{done:05d}.safetensors" if sums else None
        if part is not None:
            layers = {path: x.statistics() for path, x in sums.items()}
            hessians = {path: x.hessian for path, x in sums.items() if x.products is not None}
            with as_output_errors(self.path / part):
                write_statistics(self.path / part, layers, hessians)
        self.state = self.state.with_block(collector, done, part)
        self.state.save(self.path / "state.json")

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Put the parts together under the output's name, and remove the folder."""
        parts = [self.path / name for name in self.state.parts]
        with as_output_errors(self._output):
            merge_statistics(parts, self._output, dict(metadata))
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def as_output_errors(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: {os_error_text(error)}") from error
