"""The rows of a sweep while it is under way, and the file that they are kept in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagedlab.errors import ResultsError
from pagedlab.lab.environment import environment
from pagedlab.lab.sweep import files
from pagedlab.lab.sweep.points import Grid
from pagedlab.lab.sweep.results import Row, Sweep, row_again, row_of, uniform
from pagedlab.lab.sweep.work import Outcome

PAUSE = 1.0
"""Seconds between two writings of the file, at least."""


class Book:
    """The rows of a sweep, and the file that they are written to."""

    def __init__(self, grid: Grid, how: str, file: Path | None, resume: bool) -> None:
        self.facts: dict[str, Any] = {
            "how": how,
            "axes": grid.axes,
            "workloads": grid.workloads,
            "points": len(grid.points),
            "interrupted": True,
            **environment(),
        }
        self._grid, self._how, self._file = grid, how, file
        self._rows: dict[int, Row] = {}
        self._others: list[Row] = []
        self._taken = 0
        self._next = 0.0
        for number, point in enumerate(grid.points):
            if point.error is not None:
                self._rows[number] = row_of(point, Outcome({}, point.error, 0.0, None), how)
        if file is not None and file.exists():
            rows, facts = files.read(file)
            if resume:
                self._check_same(facts)
                self.facts["workloads"] = {**facts["workloads"], **grid.workloads}
                self._take(rows, set(facts["axes"]))

    def _check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `ResultsError` if the file is about something else."""
        if facts["how"] != self._how:
            raise ResultsError(
                f"{self._file}: holds a sweep with how={facts['how']!r}, not {self._how!r}; it is left alone"
            )
        mine, there = self._grid.workloads, facts["workloads"]
        shared = [title for title in mine if title in there]
        if not shared or any(mine[title] != there[title] for title in shared):
            raise ResultsError(
                f"{self._file}: holds a sweep over another workload ({', '.join(map(str, there))}); it is left alone: "
                "choose another file, or resume=False to replace it"
            )

    def _take(self, rows: Sequence[Row], axes: set[str]) -> None:
        """Take over the rows of points that are done, and keep those of other points."""
        numbers = {point.id: number for number, point in enumerate(self._grid.points)}
        for row in rows:
            number = numbers.get(row["point"])
            if number is None:
                self._others.append(row)
            elif not row.get("error"):
                self._rows[number] = row_again(row, self._grid.points[number], axes)
                self._taken += 1

    @property
    def unwritten(self) -> bool:
        """True if there is a row that the file does not have."""
        return len(self._rows) > self._taken

    @property
    def todo(self) -> list[int]:
        """Points that have no row yet."""
        return [n for n in range(len(self._grid.points)) if n not in self._rows]

    def add(self, number: int, outcome: Outcome) -> None:
        """Note what came out of a point, and write the file if the last time was long enough ago."""
        self._rows[number] = row_of(self._grid.points[number], outcome, self._how)
        if time.monotonic() >= self._next:
            self.write(interrupted=True)

    def write(self, *, interrupted: bool) -> None:
        """Write all rows: those of the grid in its order, then what the file had besides."""
        self.facts["interrupted"] = interrupted
        if self._file is None:
            return
        began = time.monotonic()
        rows = [*(self._rows[n] for n in sorted(self._rows)), *self._others]
        files.write(self._file, uniform(rows, list(self._grid.axes)), self.facts | self._with_others())
        now = time.monotonic()
        self._next = now + max(PAUSE, 10 * (now - began))

    def _with_others(self) -> dict[str, Any]:
        """Return the axes and the number of points of all that is in the file."""
        kept = {
            name: [row[name] for row in self._others if row.get(name) is not None] for name in self._grid.axes
        }
        axes = {name: list(dict.fromkeys([*values, *kept[name]])) for name, values in self._grid.axes.items()}
        return {"axes": axes, "points": len(self._grid.points) + len(self._others)}

    def sweep(self, *, interrupted: bool) -> Sweep:
        """Return the grid's rows."""
        self.facts["interrupted"] = interrupted
        return Sweep([self._rows[n] for n in sorted(self._rows)], self.facts, path=self._file)
