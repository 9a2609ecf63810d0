"""Tables for a terminal, and for pipes and files the same without colours, lines or cuts."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pithwood.observe.console import format_count

PLAIN_WIDTH = 10_000
"""Columns of a pipe or file: nothing is cut or wrapped there."""
NAME_WIDTH = 16
"""Columns below which no column of names is folded."""


@dataclass(frozen=True)
class Table:
    """Rows of short texts under a title; the first column stands to the left, all others to the right."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)
    """Columns that stand to the left."""


def on_terminal() -> bool:
    """Whether the command's result goes to a terminal; a redirected `sys.stdout` in between does not matter."""
    stream = sys.__stdout__
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def render(parts: Sequence[str | Table], terminal: bool | None = None, width: int | None = None) -> str:
    """The lines and tables one after another as text to print.

    terminal  with colours and lines, wrapped to `width` columns (default: the terminal's); default: if stdout is one
    """
    terminal = on_terminal() if terminal is None else terminal
    columns = (width or shutil.get_terminal_size((80, 24)).columns) if terminal else PLAIN_WIDTH
    out = StringIO()
    console = Console(file=out, width=columns, force_terminal=terminal, highlight=False, legacy_windows=False)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part))
            continue
        console.print()
        console.print(Text(part.title, style="bold" if terminal else ""))
        console.print(_table(part, terminal, columns))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; "-" for None and for one that is not a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share in per cent; "-" for None and for one that is not a number."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}%}"


def count(value: float | None) -> str:
    """A short count (12.3k); "-" for None."""
    return "-" if value is None else format_count(value)


def _table(table: Table, terminal: bool, columns: int) -> RichTable:
    rich_table = RichTable(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, show_edge=False)
    for index, (name, width) in enumerate(zip(table.header, _widths(table, columns), strict=True)):
        left = index in table.left
        rich_table.add_column(
            Text(name),
            justify="left" if left else "right",
            overflow="fold" if left else "ellipsis",
            no_wrap=not left,
            width=width,
        )
    for row in table.rows:
        rich_table.add_row(*(Text(cell) for cell in row))
    return rich_table


def _widths(table: Table, columns: int) -> list[int]:
    """Width of each column so that all fit: names are folded down to NAME_WIDTH first, then the widest numbers cut."""
    widths = [
        max(len(name), max((len(row[index]) for row in table.rows), default=0))
        for index, name in enumerate(table.header)
    ]
    room = columns - 3 * (len(widths) - 1)  # a space to either side of each divider
    for least, shrinking in (
        (NAME_WIDTH, [index for index in range(len(widths)) if index in table.left]),
        (4, [index for index in range(len(widths)) if index not in table.left]),
    ):
        while sum(widths) > room:
            widest = max(shrinking, key=lambda index: widths[index], default=None)
            if widest is None or widths[widest] <= least:
                break
            widths[widest] -= 1
    return widths
