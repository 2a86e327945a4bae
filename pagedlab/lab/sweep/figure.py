"""The figure of a sweep: a measure over one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from pagedlab.errors import ConfigError
from pagedlab.lab.plots import Figure
from pagedlab.lab.sweep.results import is_time

if TYPE_CHECKING:
    from pagedlab.lab.sweep.results import Sweep

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_DASHES = ("-", "--", ":", "-.")
_LOG_FROM = 20
"""An axis that spans at least this factor is logarithmic."""
_MOST_LINES = 24


def of_sweep(sweep: Sweep, measure: str, x: str | None, by: str | None) -> Figure:
    """Return ``measure`` over ``x``, a line (or a row of bars) for each value of ``by``. See `Sweep.plot`."""
    rows = sweep.with_value(measure)
    x, by = _axes(sweep, x, by)
    at = list(dict.fromkeys(row[x] for row in rows))
    numbers = all(_is_number(v) for v in at)
    if numbers:
        at.sort()
    lines = list(dict.fromkeys(row[by] for row in rows)) if by is not None else [None]
    if len(lines) > _MOST_LINES:
        raise ConfigError(f"{by} has {len(lines)} values, too many lines for one figure; choose another axis")
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    for i, line in enumerate(lines):
        values: dict[Any, list[float]] = {v: [] for v in at}
        for row in rows:
            if by is None or _same(row[by], line):
                values[row[x]].append(row[measure])
        label = None if by is None else _text(f"{by}={line}")
        style = {"color": _COLOURS[i % len(_COLOURS)], "label": label}
        if numbers:
            _line(ax, values, i, style)
        else:
            _bars(ax, values, i, len(lines), style)
    if numbers:
        if at[0] > 0 and at[-1] / at[0] >= _LOG_FROM:
            ax.set_xscale("log")
    else:
        ax.set_xticks(range(len(at)), [_text(v) for v in at], rotation=0 if len(at) < 7 else 30)
    over = [name for name, values in sweep.axes.items() if len(values) > 1 and name not in (x, by)]
    spread = f": mean and range over {', '.join(over)}" if over else ""
    ax.set(
        title=_text(", ".join(sweep.facts["workloads"])),
        xlabel=_text(x),
        ylabel=_text(measure + (" (s)" if is_time(measure) else "") + spread),
    )
    ax.set_axisbelow(True)
    ax.grid(True, axis="both" if numbers else "y", alpha=0.25)
    if by is not None:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    return figure


def _axes(sweep: Sweep, x: str | None, by: str | None) -> tuple[str, str | None]:
    axes = sweep.axes
    for name in (x, by):
        if name is not None:
            sweep._axis(name)
    if x is not None and x == by:
        raise ConfigError(f"x and by are both {x!r}")
    several = [name for name, values in axes.items() if len(values) > 1 and name != by]
    if x is None:
        numeric = [name for name in several if all(_is_number(v) for v in axes[name])]
        x = next(iter((*numeric, *several, *(name for name in axes if name != by))), None)
    if x is None:
        raise ConfigError("a sweep without an axis has nothing to draw over")
    if by is None:
        by = next((name for name in several if name != x), None)
    return x, by


def _line(ax: Any, values: dict[Any, list[float]], i: int, style: dict[str, Any]) -> None:
    found = [(v, ys) for v, ys in values.items() if ys]
    xs = [v for v, _ in found]
    dash, marker = _DASHES[i // len(_COLOURS) % len(_DASHES)], _MARKERS[i % len(_MARKERS)]
    ax.plot(xs, [_mean(ys) for _, ys in found], dash, marker=marker, markersize=4, linewidth=1.5, **style)
    if any(len(ys) > 1 for _, ys in found):
        low, high = [min(ys) for _, ys in found], [max(ys) for _, ys in found]
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _bars(ax: Any, values: dict[Any, list[float]], i: int, lines: int, style: dict[str, Any]) -> None:
    width = 0.8 / lines
    found = [(n, ys) for n, ys in enumerate(values.values()) if ys]
    means = [_mean(ys) for _, ys in found]
    spread = None
    if any(len(ys) > 1 for _, ys in found):
        spread = [
            [mean - min(ys) for mean, (_, ys) in zip(means, found)],
            [max(ys) - mean for mean, (_, ys) in zip(means, found)],
        ]
    xs = [n + (i - (lines - 1) / 2) * width for n, _ in found]
    ax.bar(xs, means, width * 0.92, yerr=spread, error_kw={"linewidth": 1}, **style)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    """Names come from outside: a dollar sign in one begins no mathematics."""
    return str(value).replace("$", r"\$")
