"""What commands print and write: one JSON object, tables, comparisons, files."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import typer

from pagedlab.errors import ConfigError

_NO_TERMINAL = 160
"""Width of tables that go to a file or a pipe."""
_NAME_WIDTH = 16
"""Of a configuration's name, before it is broken between words."""
_BETWEEN = 3
"""Blanks between two columns of a table."""


def print_json(command: str, results: Any, **more: Any) -> None:
    """Print one JSON object: the command, versions and hardware, ``more``, and the results last."""
    typer.echo(json_object(command, results, **more))


def json_object(command: str, results: Any, **more: Any) -> str:
    """Return the text that `print_json` prints."""
    from pagedlab.lab.environment import environment

    return json_module.dumps({"command": command, **environment(), **more, "results": results}, indent=2)


def print_comparison(comparison: Any) -> None:
    """Print a `Comparison`: a column a configuration, the verdict on the outputs, and errors."""
    headings, rows = comparison.table()
    # A column for each configuration, and a table for as many of them as there is room for side by side.
    measures = headings[1:]
    names = [_broken(row) for row in rows]
    widths = [_BETWEEN + max(map(len, [*name.split("\n"), *row[1:]])) for name, row in zip(names, rows)]
    room = _width() - max(map(len, measures)) - _BETWEEN
    for first, last in _fitting(widths, room):
        part = [row[1:] for row in rows[first:last]]
        print_table(["", *names[first:last]], [list(line) for line in zip(measures, *part)])
    typer.echo(comparison.verdict())
    for name, run in comparison.runs.items():
        for request_id, error in list(run.errors.items())[:3]:
            typer.echo(f"{name}: {printable(request_id)}: {printable(error)}")
    if comparison.interrupted:
        typer.echo("Interrupted: the numbers are those of the work that was done.")


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Print rows of cells below headings: as wide as the terminal, or 160 columns where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        # Text, not str: brackets in a name are no markup.
        table.add_row(*(Text(cell) for cell in row))
    Console(width=_width()).print(table)


def _width() -> int:
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else _NO_TERMINAL


def _broken(row: list[str]) -> str:
    """Return a configuration's name, broken between words where it is wider than its numbers."""
    longest = max(_NAME_WIDTH, *map(len, row[0].split()), *map(len, row[1:]))
    return "\n".join(wrap(row[0], longest, break_long_words=False, break_on_hyphens=False))


def _fitting(widths: list[int], room: int) -> Iterator[tuple[int, int]]:
    """Return the ranges of columns that fit into ``room`` side by side, each at least one column."""
    first = 0
    while first < len(widths):
        last, used = first + 1, widths[first]
        while last < len(widths) and used + widths[last] <= room:
            used += widths[last]
            last += 1
        yield first, last
        first = last


def printable(text: str) -> str:
    """Keep a model's words from steering the terminal: control characters are shown, not sent."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def write_text(path: str, text: str) -> None:
    """Write a text file; `ConfigError` if that cannot be done."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def save_figure(figure: Any, path: str) -> None:
    """Write a matplotlib figure to a picture file; `ConfigError` if that cannot be done."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None
