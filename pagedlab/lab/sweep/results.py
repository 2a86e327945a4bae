"""`Sweep`: one row per point, as tables, figures and files."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedlab.errors import ConfigError, ResultsError, nearest
from pagedlab.lab import page
from pagedlab.lab.environment import versions
from pagedlab.lab.sweep import files
from pagedlab.lab.sweep.axes import RESERVED
from pagedlab.lab.sweep.points import Point
from pagedlab.lab.sweep.work import Outcome

if TYPE_CHECKING:
    import pandas as pd

    from pagedlab.lab.plots import Figure

Row = dict[str, Any]

_LAST = ("error", "seconds", "workload", "workload_digest", "seed", *(c for c in RESERVED if c not in
         ("error", "seconds", "workload_digest")))  # fmt: skip
_SHOWN = (
    ("tokens_per_s", "tokens/s", page.number),
    ("goodput_per_s", "goodput/s", page.number),
    ("goodput_share", "in time", page.percent),
    ("ttft_mean", "TTFT mean", page.seconds),
    ("ttft_p95", "TTFT p95", page.seconds),
    ("tpot_mean", "TPOT mean", page.seconds),
    ("accesses", "accesses", page.number),
    ("hits", "hits", page.number),
    ("hit_ratio", "hit ratio", page.percent),
    ("miss_ratio", "miss ratio", page.percent),
    ("preemptions", "preemptions", page.number),
    ("mean_batch_size", "mean batch", page.number),
    ("waste", "KV waste", page.percent),
)
"""Measures that a table shows: column, heading, and how to write it."""
_MORE_IS_BETTER = (
    "tokens_per_s", "goodput_per_s", "goodput_share", "hit_ratio", "hits", "finished", "request_hit_ratio",
    "requests_hit",
)  # fmt: skip
_TIMES = ("queue_time", "ttft", "tpot", "itl", "latency")
_LESS_IS_BETTER = (
    *(f"{time}_{m}" for time in _TIMES for m in ("mean", "p50", "p90", "p95", "p99")),
    "duration", "seconds", "refused", "preemptions", "recomputed_tokens", "swapped_out", "waste",
    "misses", "miss_ratio", "requests_missed",
)  # fmt: skip
_OF_A_REPLAY = ("eviction", "num_blocks", "semantics", "touch_order", "block_size")
"""Columns that a replay fills whether they are axes or not."""
_MOST_ROWS = 30
"""Of a table in a notebook."""


class Sweep:
    """What came out of a sweep: a row per point that was done, in the order of the grid.

    A row has the values of the axes, then the measures (None where the point failed), then ``error``, ``seconds``
    (wall time of the point alone), ``workload`` and a digest of its content, ``seed``, ``how``, ``config`` and
    ``options`` as JSON, the versions of ``pagedlab`` and ``python``, and ``point``, a digest of all that the numbers
    depend on.
    """

    def __init__(self, rows: Sequence[Row], facts: Mapping[str, Any], *, path: Path | None = None) -> None:
        self.rows = uniform(rows, list(facts["axes"]))
        self.facts = dict(facts)
        """``how``, ``axes``, ``workloads``, ``options``, ``points``, ``interrupted``, versions and hardware."""
        self.path = path
        """The file that it is in, if any."""

    @property
    def axes(self) -> dict[str, list[Any]]:
        """What the values of each axis are called."""
        return dict(self.facts["axes"])

    @property
    def interrupted(self) -> bool:
        """True if somebody stopped the sweep before all points were done; the same call goes on with the others."""
        return bool(self.facts.get("interrupted"))

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong, by point."""
        return {self._name(row): row["error"] for row in self.rows if row["error"]}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point; latencies are in seconds."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def best(self, measure: str, *, highest: bool | None = None) -> Row:
        """Return the row with the best value of ``measure``, the first of several.

        ``highest`` says which end is the better one where the measure does not (`ConfigError`, if it has to).
        """
        if highest is None:
            if measure not in (*_MORE_IS_BETTER, *_LESS_IS_BETTER):
                self._check(measure)
                raise ConfigError(f"is more of {measure!r} better? Say highest=True or highest=False")
            highest = measure in _MORE_IS_BETTER
        rows = self.with_value(measure)
        return (max if highest else min)(rows, key=lambda row: row[measure])

    def pivot(self, measure: str, rows: str, columns: str | None = None, *, aggregate: str = "mean") -> Any:
        """Return a frame of ``measure`` over two axes (or a series over one), in the order of the axes.

        Points that differ in other axes only are put together by ``aggregate``, as pandas calls it.
        """
        import pandas as pd

        found = self.with_value(measure)
        names = [self._axis(name) for name in (rows, columns) if name is not None]
        frame = pd.DataFrame({name: [row[name] for row in found] for name in (*names, measure)})
        table = frame.groupby(names, sort=False, dropna=False)[measure].agg(aggregate)
        if columns is None:
            return table
        wide = table.unstack(columns)
        order = [list(dict.fromkeys(row[name] for row in found)) for name in names]
        return wide.reindex(index=order[0], columns=order[1])

    def plot(self, measure: str, x: str | None = None, by: str | None = None) -> Figure:
        """Return ``measure`` over the axis ``x``, a line for each value of ``by``; bars where ``x`` is no number.

        Points that differ in other axes only are drawn as their mean, with their range shaded. Left out, ``x`` is the
        first axis of numbers and ``by`` the first other axis of several values.
        """
        from pagedlab.lab.sweep.figure import of_sweep

        return of_sweep(self, measure, x, by)

    def with_value(self, measure: str) -> list[Row]:
        """Return the rows in which ``measure`` is a number; `ConfigError` if there is none, or no such measure."""
        self._check(measure)
        found = [row for row in self.rows if isinstance(row[measure], int | float)]
        if not found:
            raise ConfigError(f"no point has a number for {measure!r}")
        return found

    def _check(self, measure: str) -> None:
        known = list(self.rows[0]) if self.rows else []
        if measure not in known:
            raise ConfigError(f"no measure {measure!r} in this sweep{nearest(measure, known)}")

    def _axis(self, name: str) -> str:
        if name not in self.facts["axes"]:
            axes = ", ".join(self.facts["axes"])
            raise ConfigError(f"no axis {name!r}; the axes are: {axes}{nearest(name, self.facts['axes'])}")
        return name

    # ---- shown and kept ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the sweep to a Parquet or JSON file, by suffix, and return it.

        Raises `ResultsError` if there is a file that holds anything but a sweep.
        """
        file = files.check_path(path)
        if file.exists():
            files.read(file)
        files.write(file, self.rows, self.facts)
        return file

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of text: the axes and the measures that are looked at first."""
        axes = list(self.facts["axes"])
        shown = [
            (k, heading, f) for k, heading, f in _SHOWN if any(row.get(k) is not None for row in self.rows)
        ]
        shown = [column for column in shown if column[0] not in axes]
        failed = ["error"] if self.errors else []
        headings = [*axes, *(heading for _, heading, _ in shown), *failed]
        rows = [
            [
                *(str(row[name]) for name in axes),
                *(f(row[k]) for k, _, f in shown),
                *(page.shorten(row["error"] or "", 80) for _ in failed),
            ]
            for row in self.rows
        ]
        return headings, rows

    def verdict(self) -> str:
        """Return one sentence on how much was done."""
        failed, points = len(self.errors), self.facts.get("points", len(self.rows))
        text = f"{len(self.rows)} of {points} points" + (f", {failed} failed" if failed else "")
        return text + (" (interrupted)." if self.interrupted else ".")

    def _name(self, row: Row) -> str:
        return " ".join(f"{name}={row[name]}" for name in self.facts["axes"])

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        sizes = " × ".join(f"{len(values)} {name}" for name, values in self.facts["axes"].items())
        return f"<sweep of {sizes or 'one point'}: {self.verdict()[:-1]}>"

    def _repr_html_(self) -> str:
        headings, rows = self.table()
        more = f" The first {_MOST_ROWS} of them:" if len(rows) > _MOST_ROWS else ""
        title = f"{self.facts['how']}, {', '.join(self.facts['workloads'])}: {self.verdict()}{more}"
        return page.table(headings, rows[:_MOST_ROWS], caption=title)


def is_time(measure: str) -> bool:
    """Whether a measure is in seconds."""
    return measure in ("duration", "seconds") or measure.startswith(tuple(f"{time}_" for time in _TIMES))


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from the file that `sweep` or `Sweep.save` wrote. `ResultsError`, in one line, if it is none."""
    file = files.check_path(path)
    if not file.is_file():
        raise ResultsError(f"{file}: no such file")
    rows, facts = files.read(file)
    return Sweep(rows, facts, path=file)


def row_of(point: Point, outcome: Outcome, how: str) -> Row:
    """Return the row of a point that was done."""
    known, config = point.facts, outcome.config or point.facts["config"]
    more = {
        "error": outcome.error,
        "seconds": outcome.seconds,
        "workload": known["workload"],
        "workload_digest": known["workload_digest"],
        "seed": known["seed"],
        "how": how,
        "config": None if config is None else json.dumps(config),
        "options": json.dumps(known["options"], sort_keys=True),
        "pagedlab": versions().get("pagedlab"),
        "python": versions()["python"],
        "point": point.id,
    }
    return {**outcome.measures, **more, **point.at}


def row_again(row: Row, point: Point, axes: Container[str]) -> Row:
    """Return a row of a file that was written for the axes ``axes``, as the row of ``point`` in another grid."""
    left = {name: v for name, v in row.items() if name not in axes or name in _OF_A_REPLAY}
    return {**left, "workload": point.facts["workload"], "seed": point.facts["seed"], **point.at}


def uniform(rows: Sequence[Row], axes: Sequence[str]) -> list[Row]:
    """Return rows that all have the same columns in the same order: axes, measures, the rest."""
    found = dict.fromkeys(name for row in rows for name in row)
    names = dict.fromkeys(axes) | {name: None for name in found if name not in _LAST}
    names |= {name: None for name in _LAST if found and name not in names}
    return [{name: row.get(name) for name in names} for row in rows]
