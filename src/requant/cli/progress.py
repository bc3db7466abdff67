"""Progress on standard error: a bar on a terminal, occasional lines in a file or a pipe.

Rich is imported inside functions: ``--help`` and ``--version`` do not wait for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from requant.text import escape_control_chars, format_seconds, format_size

if TYPE_CHECKING:
    from requant.execution.executor import Progress

# Lines without a terminal: the first after 2 s, then one whenever a tenth of the elapsed time has
# passed, but after at least 5 s and at most 60 s. After a line at 20 s the next is due at 25 s,
# after one at 300 s at 330 s.
_FIRST_LINE_S = 2.0
_LEAST_INTERVAL_S = 5.0
_MOST_INTERVAL_S = 60.0

# Called with what is done, the total, and a function that describes it if it is shown.
_Show = Callable[[int, int, Callable[[], str]], None]


def memory_in_use() -> int:
    """Resident bytes of the process: without mapped files on Linux, the peak elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def describe_progress(now: Progress) -> str:
    """Speed, time left, memory, and the current layer."""
    if now.steps_total:
        return _describe_calibration(now)
    rate = now.bytes_done / max(now.elapsed_s, 1e-9)
    parts = [f"{format_size(rate)}/s"]
    if now.bytes_done >= now.bytes_total:
        where = "waiting for the disk"
    else:
        where = now.layer
        if rate:
            parts.append(f"{format_seconds((now.bytes_total - now.bytes_done) / rate)} left")
    if now.bytes_to_download:
        sizes = f"{format_size(now.bytes_downloaded)} of {format_size(now.bytes_to_download)}"
        parts.append(f"{sizes} downloaded")
    if held := memory_in_use():
        parts.append(f"{format_size(held)} held")
    return escape_control_chars("  ".join((*parts, where)))


def _describe_calibration(now: Progress) -> str:
    """Time left, memory, and the current block with its speed."""
    parts = ["calibrating"]
    if done := now.steps_done - now.steps_before:
        left_s = (now.steps_total - now.steps_done) * now.elapsed_s / done
        parts.append(f"{format_seconds(left_s)} left")
    if held := memory_in_use():
        parts.append(f"{format_size(held)} held")
    return escape_control_chars("  ".join((*parts, now.layer)))


def describe_count(what: str, done: int, of: int, left_s: float | None = None) -> str:
    """``3 of 12  8.1 s left  NAME``."""
    left = "" if left_s is None else f"{format_seconds(left_s)} left  "
    return escape_control_chars(f"{done:,} of {of:,}  {left}{what}")


@contextmanager
def progress_display(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Yield a function that shows a ``Progress`` on standard error; None with ``quiet``.

    A terminal gets a bar that disappears at the end, a file or a pipe occasional lines and none
    from a short run.
    """
    with _display(quiet) as show:
        yield show and (
            lambda now: show(
                now.steps_done if now.steps_total else now.bytes_done,
                now.steps_total or now.bytes_total,
                partial(describe_progress, now),
            )
        )


@contextmanager
def counting_display(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """The same for counts: yield a function of a name, the number done and the total."""
    # Time and number done of the first call, number done and total of the last.
    first, last = (0.0, 0), (0, -1)

    def left_s(done: int, of: int) -> float | None:
        nonlocal first, last
        now = time.monotonic()
        if of != last[1] or done < last[0]:  # another count begins
            first = now, done
        last = done, of
        rate = (done - first[1]) / max(now - first[0], 1e-9)
        return (of - done) / rate if rate else None

    with _display(quiet) as show:
        yield show and (
            lambda what, done, of: show(
                done, of, partial(describe_count, what, done, of, left_s(done, of))
            )
        )


@contextmanager
def _display(quiet: bool) -> Iterator[_Show | None]:
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _bar() as show:
            yield show
    else:
        yield _plain_lines()


@contextmanager
def _bar() -> Iterator[_Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    text = TextColumn(
        "{task.description}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(
        BarColumn(20), TaskProgressColumn(), text, console=console, transient=True, expand=True
    ) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, of: int, describe: Callable[[], str]) -> None:
            bar.update(task, description=describe(), completed=done, total=max(of, 1))

        yield show


def _plain_lines() -> _Show:
    # Time is measured here, since several runs, each from 0, may be shown.
    began_s: float | None = None
    due_s = _FIRST_LINE_S

    def show(done: int, of: int, describe: Callable[[], str]) -> None:
        nonlocal began_s, due_s
        if began_s is None:
            began_s = time.monotonic()
        elapsed_s = time.monotonic() - began_s
        if elapsed_s < due_s:
            return
        due_s = elapsed_s + min(max(elapsed_s / 10, _LEAST_INTERVAL_S), _MOST_INTERVAL_S)
        # Continue if the log cannot be written.
        with suppress(OSError):
            print(f"{100 * done // max(of, 1):3}%  {describe()}", file=sys.stderr, flush=True)

    return show
