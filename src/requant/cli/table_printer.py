"""Lines and aligned columns on standard output.

Rich is imported inside functions: ``--help`` and ``--version`` do not wait for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from requant.text import escape_control_chars

if TYPE_CHECKING:
    from rich.console import RenderableType

_NAME_LINES = 40
_GAP = 2  # spaces between columns
_FOLDED_COLUMNS = 24  # a column is not folded to less than this
_NO_WIDTH = 1 << 16


def without_numbers(path: str) -> str:
    """``model.layers.3.mlp.gate`` -> ``model.layers.*.mlp.gate``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


class TablePrinter:
    """Lines and aligned columns on standard output."""

    def __init__(self) -> None:
        from rich.console import Console

        class LayoutConsole(Console):
            """A console that leaves a closed pipe to the caller."""

            def on_broken_pipe(self) -> None:
                raise  # the BrokenPipeError that is being handled

        # Nothing is cut: a pipe has no width, and a terminal continues long lines on the next.
        self.width = Console().width if sys.stdout.isatty() else _NO_WIDTH
        self.console = LayoutConsole(markup=False, highlight=False, emoji=False, width=_NO_WIDTH)

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print one line, however long."""
        self._print(escape_control_chars(text), style=style, soft_wrap=True)

    def columns(
        self, rows: Sequence[Sequence[str]], right: Sequence[int], header: Sequence[str] = ()
    ) -> None:
        """Print rows as columns; those whose index is in ``right`` are right-aligned.

        If the terminal is slightly too narrow, the widest text column is folded.
        """
        from rich.cells import cell_len
        from rich.table import Table

        all_rows = [*rows, header] if header else rows
        widths = [
            max(cell_len(escape_control_chars(cell)) for cell in cells)
            for cells in zip(*all_rows, strict=True)
        ]
        texts = [index for index in range(len(widths)) if index not in right]
        longest = max(texts, key=lambda index: widths[index], default=-1)
        excess = sum(widths) + _GAP * (len(widths) - 1) - self.width
        if texts and excess > 0 and widths[longest] - excess >= _FOLDED_COLUMNS:
            widths[longest] -= excess
        table = Table(box=None, pad_edge=False, show_header=bool(header), padding=(0, _GAP, 0, 0))
        for index, width in enumerate(widths):
            table.add_column(
                header[index] if header else "",
                justify="right" if index in right else "left",
                width=width,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*map(escape_control_chars, row))
        self._print(table)

    def _print(self, content: RenderableType, **how: Any) -> None:
        # Rich pads lines with spaces, which are not printed.
        with self.console.capture() as captured:
            self.console.print(content, **how)
        for line in captured.get().splitlines():
            print(line.rstrip())

    def names(
        self, rows: Sequence[Sequence[str]], right: Sequence[int], header: Sequence[str]
    ) -> None:
        """Print a row for each of the first names, and how many more there are."""
        self.columns(rows[:_NAME_LINES], right, header)
        if len(rows) > _NAME_LINES:
            self.line(f"and {len(rows) - _NAME_LINES:,} more names; --json lists all")
