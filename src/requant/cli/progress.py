"""Progress on standard error: a bar on a terminal, a line now and then in a file or a pipe.

Rich is imported inside functions: ``--help`` and ``--version`` do not wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from requant.cli.words import format_seconds, format_size, printable

if TYPE_CHECKING:
    from requant.execute import Progress

# Without a terminal: a run shorter than this says nothing, a longer one speaks this often.
_FIRST_LINE_S = 2.0
_NEXT_LINE_S = 5.0


def memory_in_use() -> int:
    """Bytes that the process holds, mapped files aside where the system tells."""
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
    """Speed, time left, memory, and the layer at hand."""
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
    return printable("  ".join((*parts, where)))


@contextmanager
def progress_display(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Yield what ``convert`` calls to show its progress on standard error.

    A terminal gets a bar that disappears at the end; a file or a pipe gets a line every
    few seconds, and none from a short run. With ``quiet`` this is None.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _bar() as update:
            yield update
    else:
        yield _plain_lines()


@contextmanager
def counting_display(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield what shows a name, how many are done and how many there are, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return

    def update(what: str, done: int, of: int) -> None:
        print(f"\r\x1b[K{done:,} of {of:,}  {printable(what)[:60]}", end="", file=sys.stderr)

    yield update
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    text = TextColumn(
        "{task.description}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
    )
    console = Console(stderr=True, highlight=False)
    with Bar(
        BarColumn(20), TaskProgressColumn(), text, console=console, transient=True, expand=True
    ) as bar:
        task = bar.add_task("starting", total=None)

        def update(now: Progress) -> None:
            bar.update(
                task,
                description=describe_progress(now),
                completed=now.bytes_done,
                total=max(now.bytes_total, 1),
            )

        yield update


def _plain_lines() -> Callable[[Progress], None]:
    due_s = _FIRST_LINE_S

    def update(now: Progress) -> None:
        nonlocal due_s
        if now.elapsed_s < due_s:
            return
        due_s = now.elapsed_s + _NEXT_LINE_S
        percent = 100 * now.bytes_done // max(now.bytes_total, 1)
        # A log that is gone must not end the conversion.
        with suppress(OSError):
            print(f"{percent:3}%  {describe_progress(now)}", file=sys.stderr, flush=True)

    return update
