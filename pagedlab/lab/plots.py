"""Figures of runs, made with matplotlib's Figure API: no global state, nothing to close, at home in threads.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from numpy.typing import NDArray

from pagedlab.errors import ConfigError, nearest
from pagedlab.lab.measures import MEMORY_KINDS, check_bounds, offered_rate

if TYPE_CHECKING:
    from pagedlab.lab.compare import Comparison
    from pagedlab.lab.results import Run

COLOURS = {
    "stored": "#0072B2",
    "reserved": "#E69F00",
    "internal": "#D55E00",
    "external": "#CC79A7",
    "cached": "#56B4E9",
    "free": "#E5E5E5",
}
_LABELS = {
    "stored": "stored",
    "reserved": "reserved",
    "internal": "internal fragmentation",
    "external": "external fragmentation",
    "cached": "cached prefixes",
    "free": "free",
}
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_BAR = "#0072B2"
_MOST_POINTS = 600
"""Of a line over time: as many as a figure has room to show."""


class Figure(MatplotlibFigure):
    """A matplotlib figure that a notebook shows by itself, whatever backend is set."""

    def png(self, dpi: float = 110) -> bytes:
        """Return the figure as PNG."""
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=dpi)
        return out.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def of_run(run: Run, what: str = "overview") -> Figure:
    """Return the figure called ``what``; `ConfigError` with the names that there are, for another."""
    if what == "overview":
        figure, axes = _figure(9, 9.5, rows=3)
        for ax, draw in zip(axes[:, 0], KINDS.values()):
            draw(run, ax)
        return figure
    if what not in KINDS:
        known = ("overview", *KINDS)
        raise ConfigError(f"no figure {what!r}; known: {', '.join(known)}{nearest(what, known)}")
    figure, axes = _figure(9, 3.6)
    KINDS[what](run, axes[0, 0])
    return figure


def memory(run: Run, ax: Any) -> None:
    """Stacked: where the pool's token slots were, step by step."""
    table, steps = run.columns("memory"), run.columns("steps")
    if not table["step"]:
        return _empty(ax)
    at, means, _, _ = _thinned(
        [*steps["start"], table["time"][-1]], [table[f"{kind}_share"] for kind in MEMORY_KINDS]
    )
    series = [np.append(row, row[-1]) * 100 for row in means]
    shown = [i for i, s in enumerate(series) if s.any() or MEMORY_KINDS[i] in ("stored", "free")]
    names = [MEMORY_KINDS[i] for i in shown]
    ax.stackplot(
        at,
        [series[i] for i in shown],
        labels=[_LABELS[n] for n in names],
        colors=[COLOURS[n] for n in names],
        step="post",
        linewidth=0,
    )
    ax.set(
        title="KV memory",
        xlabel=f"time ({_time_unit(run)})",
        ylabel="share of the pool (%)",
        ylim=(0, 100),
        xlim=(at[0], at[-1]),
    )
    _legend(ax)


def batch(run: Run, ax: Any) -> None:
    """Running and waiting sequences over time, and preemptions. Of very many steps: means, and the range shaded."""
    steps = run.columns("steps")
    if not steps["step"]:
        return _empty(ax)
    edges = [*steps["start"], steps["start"][-1] + steps["duration"][-1]]
    names = ("running", "waiting")
    at, means, lows, highs = _thinned(edges, [steps[name] for name in names])
    thinned = len(at) < len(edges)
    for name, colour, mean, low, high in zip(names, _LINES, means, lows, highs):
        ax.step(at, np.append(mean, mean[-1]), where="post", color=colour, label=name, linewidth=1.3)
        if thinned:
            least, most = np.append(low, low[-1]), np.append(high, high[-1])
            ax.fill_between(at, least, most, step="post", color=colour, alpha=0.22, linewidth=0)
    lost = np.flatnonzero(np.diff(steps["preemptions"], prepend=0) > 0)
    if len(lost):
        when = np.asarray(steps["start"])[lost]
        # Marks that would lie on top of each other are drawn once.
        when = when[
            np.unique((when - at[0]) * _MOST_POINTS // max(at[-1] - at[0], 1e-12), return_index=True)[1]
        ]
        ax.plot(when, np.zeros(len(when)), "|", color="black", markersize=9, label="preemption")
    ax.set(
        title="Batch and queue (means; ranges shaded)" if thinned else "Batch and queue",
        xlabel=f"time ({_time_unit(run)})",
        ylabel="sequences",
        xlim=(at[0], at[-1]),
    )
    ax.set_ylim(bottom=0)
    _legend(ax)


def latency(run: Run, ax: Any) -> None:
    """Empirical distributions of time to first token, time per token and latency of finished sequences."""
    table = run.columns("requests")
    drawn = False
    for (name, label), colour, dash in zip(
        (
            ("ttft", "time to first token"),
            ("tpot", "time per token after it"),
            ("latency", "latency, arrival to end"),
        ),
        _LINES,
        ("-", "--", "-."),
    ):
        ended = zip(table[name], table["finish_reason"])
        values = sorted(v for v, why in ended if v is not None and why in ("stop", "length"))
        if values:
            share = np.arange(1, len(values) + 1) / len(values) * 100
            ax.step(values, share, where="post", color=colour, linestyle=dash, label=label, linewidth=1.6)
            drawn = True
    if not drawn:
        return _empty(ax)
    logarithmic = all(line.get_xdata()[0] > 0 for line in ax.lines)
    if logarithmic:
        ax.set_xscale("log")
    ax.set(
        title="Latency",
        xlabel=f"time ({_time_unit(run)}, log)" if logarithmic else f"time ({_time_unit(run)})",
        ylabel="sequences within (%)",
        ylim=(0, 101),
    )
    ax.grid(True, which="major", axis="both", alpha=0.25)
    _legend(ax)


KINDS: dict[str, Callable[[Run, Any], None]] = {"memory": memory, "batch": batch, "latency": latency}


def of_comparison(comparison: Comparison) -> Figure:
    """Bars per configuration: speed, latency, hits, and where the memory went while requests waited."""
    rows = comparison.rows
    # Names come from outside: a dollar sign in one begins no mathematics.
    names = [str(r["config"]).replace("$", r"\$") for r in rows][::-1]
    figure, axes = _figure(10, 1.9 + 0.36 * len(rows) * 2, rows=2, columns=2)
    units = {_time_unit(r) for r in comparison.runs.values()}
    unit = units.pop() if len(units) == 1 else "s"
    slow = unit != "s" or max(r["ttft_mean"] or 0.0 for r in rows) >= 1
    panels = (
        (axes[0, 0], "tokens_per_s", 1.0, "Throughput", f"output tokens per {unit.rstrip('s') or 's'}"),
        (axes[0, 1], "ttft_mean", 1.0 if slow else 1e3, "Mean time to first token", unit if slow else "ms"),
        (axes[1, 0], "hit_ratio", 100.0, "Prompt tokens found in the cache", "%"),
    )
    for ax, key, scale, title, label in panels:
        values = [(r[key] or 0.0) * scale for r in rows][::-1]
        bars = ax.barh(names, values, color=_BAR)
        ax.bar_label(bars, [f"{v:,.4g}" for v in values], padding=3, fontsize=8)
        ax.set(title=title, xlabel=label)
        ax.set_xlim(0, max(values) * 1.18 or 1.0)
    ax = axes[1, 1]
    left = np.zeros(len(rows))
    for kind in MEMORY_KINDS:
        shares = np.array([(r[f"{kind}_share"] or 0.0) * 100 for r in rows][::-1])
        if shares.any():
            ax.barh(names, shares, left=left, color=COLOURS[kind], label=_LABELS[kind])
        left += shares
    ax.set(title="KV memory while requests wait", xlabel="share of the pool (%)", xlim=(0, 100))
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def of_goodput(
    runs: Mapping[str, Iterable[Run]], *, ttft: float | None = None, tpot: float | None = None
) -> Figure:
    """Return goodput over request rate, a line per configuration: the share of requests in time, and how many a second.

    ``runs`` maps the name of a configuration to its runs, each of which is a point at the rate at which its requests
    arrived. ``ttft`` and ``tpot`` are the service level in seconds, as `Run.goodput` takes them. The grey line is where
    every request would be in time. `ConfigError` if there is no run, or all requests of one came at once.
    """
    bounds = check_bounds(ttft, tpot)
    points: dict[str, list[tuple[float, float, float]]] = {}
    units = set()
    for name, given in runs.items():
        several = list(given)
        points[name] = sorted(_goodput_point(name, run, bounds) for run in several)
        units |= {_time_unit(run).rstrip("s") or "s" for run in several}
    if not any(points.values()):
        raise ConfigError("there is no run to draw: {'lru': [run, run, ...], ...}")
    unit = units.pop() if len(units) == 1 else "s"
    figure, axes = _figure(10, 4.2, columns=2)
    share, rate = axes[0]
    most = max(x for line in points.values() for x, _, _ in line)
    rate.plot([0, most], [0, most], color="#999999", linewidth=1, label="every request in time")
    for i, (name, line) in enumerate(points.items()):
        if not line:
            continue
        xs, shares, rates = zip(*line)
        style: dict[str, Any] = {
            "color": _LINES[i % len(_LINES)],
            "linestyle": ("-", "--", ":")[i // len(_LINES) % 3],
            "marker": _MARKERS[i % len(_MARKERS)],
            # Names come from outside: a dollar sign in one begins no mathematics.
            "label": str(name).replace("$", r"\$"),
        }
        share.plot(xs, np.array(shares) * 100, markersize=5, linewidth=1.5, **style)
        rate.plot(xs, rates, markersize=5, linewidth=1.5, **style)
    for ax, title, label in (
        (share, "Share of requests in time", "finished requests in time (%)"),
        (rate, "Goodput", f"requests in time per {unit}"),
    ):
        ax.set(title=title, xlabel=f"requests arriving per {unit}", ylabel=label)
        ax.set_xlim(0, most * 1.04)
        ax.set_ylim(bottom=0)
        ax.grid(True, alpha=0.25)
    share.set_ylim(0, 103)
    said = {"ttft": "first token within {:g} {}", "tpot": "then at most {:g} {} a token"}
    long = "s" if unit == "s" else "steps"
    figure.suptitle("In time: " + ", ".join(said[k].format(v, long) for k, v in bounds.items()), fontsize=10)
    handles, labels = rate.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8, frameon=False
    )
    return figure


def _goodput_point(name: str, run: Run, bounds: dict[str, float]) -> tuple[float, float, float]:
    offered, reached = offered_rate({"requests": run.columns("requests")}), run.goodput(**bounds)
    if offered is None:
        raise ConfigError(f"a run of {name!r} has no request rate: its requests came all at once")
    return offered, reached.share or 0.0, reached.per_s or 0.0


def _thinned(
    edges: list[float], series: list[list[Any]]
) -> tuple[NDArray[np.float64], list[Any], list[Any], list[Any]]:
    """Return fewer edges, and for each series its means over time, lows and highs between them.

    ``edges`` are the times at which values begin, and the end: one more than values. Few steps are left as they are.
    """
    at, rows = np.asarray(edges, dtype=float), [np.asarray(row, dtype=float) for row in series]
    if len(at) - 1 <= _MOST_POINTS or at[-1] <= at[0]:
        return at, rows, rows, rows
    bins = np.linspace(at[0], at[-1], _MOST_POINTS + 1)
    # The value of a step counts for as long as it lasts, also where a bin begins or ends within it.
    sums = [np.concatenate([[0.0], np.cumsum(row * np.diff(at))]) for row in rows]
    means = [np.diff(np.interp(bins, at, total)) / np.diff(bins) for total in sums]
    first = np.clip(np.searchsorted(at, bins[:-1], side="right") - 1, 0, len(at) - 2)
    last = np.clip(np.searchsorted(at, bins[1:], side="left"), first + 1, len(at) - 1)
    cuts = np.stack([first, last], axis=1).ravel()

    def over(which: np.ufunc, row: NDArray[np.float64]) -> Any:
        return which.reduceat(np.append(row, row[-1]), cuts)[::2]

    return bins, means, [over(np.minimum, r) for r in rows], [over(np.maximum, r) for r in rows]


def _time_unit(run: Run) -> str:
    """A step clock counts steps, one a second."""
    return "steps" if run.facts.get("clock") == "step" else "s"


def _legend(ax: Any) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _empty(ax: Any) -> None:
    ax.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=ax.transAxes, color="#777777")
    ax.set_axis_off()


def of_queue(
    times: Any,
    simulated: dict[str, list[int]],
    ticks: list[float],
    measured: dict[str, list[int]],
    title: str,
) -> Figure:
    """Return running and waiting sequences over time: lines are simulated, dots measured."""
    figure, axes = _figure(9.0, 3.6)
    ax = axes[0, 0]
    for colour, name in zip(_LINES, simulated):
        ax.plot(times, simulated[name], color=colour, linewidth=1.2, label=f"{name}, simulated")
        ax.plot(ticks, measured[name], ".", color=colour, markersize=4, label=f"{name}, measured")
    ax.set_xlabel("time (s)")
    ax.set_ylabel("sequences")
    ax.set_title(title)
    ax.set_ylim(bottom=0)
    _legend(ax)
    return figure
