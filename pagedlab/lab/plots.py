"""Figures of runs, made with matplotlib's Figure API: no global state, nothing to close, at home in threads."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure

from pagedlab.errors import ConfigError, nearest
from pagedlab.lab.measures import MEMORY_KINDS, check_bounds, offered_rate
from pagedlab.lab.panels import (
    BAR,
    COLOURS,
    LABELS,
    LINES,
    MARKERS,
    batch,
    hit_ratio,
    latency,
    legend,
    memory,
    moved,
    moved_per_s,
    one_time,
    output_rate,
    preemptions,
    prefill_rate,
    recomputed,
    time_unit,
)

if TYPE_CHECKING:
    from pagedlab.lab.compare import Comparison
    from pagedlab.lab.results import Run

FIGURES: dict[str, tuple[Callable[[Run, Any], None], ...]] = {
    "overview": (memory, batch, latency),
    "memory": (memory,),
    "batch": (batch,),
    "latency": (latency,),
    "queue_time": (one_time("queue_time"),),
    "ttft": (one_time("ttft"),),
    "tpot": (one_time("tpot"),),
    "itl": (one_time("itl"),),
    "e2e_latency": (one_time("latency"),),
    "throughput": (output_rate, prefill_rate),
    "hits": (hit_ratio, recomputed),
    "preemptions": (preemptions,),
    "moved": (moved, moved_per_s),
}
"""Figures of a run by name: their panels, from the top."""


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
    if what not in FIGURES:
        raise ConfigError(f"no figure {what!r}; known: {', '.join(FIGURES)}{nearest(what, FIGURES)}")
    panels = FIGURES[what]
    figure, axes = _figure(9, 0.4 + 3.1 * len(panels), rows=len(panels))
    for ax, draw in zip(axes[:, 0], panels):
        draw(run, ax)
    return figure


def of_comparison(comparison: Comparison) -> Figure:
    """Bars per configuration: speed, latency, hits, and where the memory went while requests waited."""
    rows = comparison.rows
    # Names come from outside: a dollar sign in one begins no mathematics.
    names = [str(r["config"]).replace("$", r"\$") for r in rows][::-1]
    figure, axes = _figure(10, 1.9 + 0.36 * len(rows) * 2, rows=2, columns=2)
    units = {time_unit(r) for r in comparison.runs.values()}
    unit = units.pop() if len(units) == 1 else "s"
    slow = unit != "s" or max(r["ttft_mean"] or 0.0 for r in rows) >= 1
    panels = (
        (axes[0, 0], "tokens_per_s", 1.0, "Throughput", f"output tokens per {unit.rstrip('s') or 's'}"),
        (axes[0, 1], "ttft_mean", 1.0 if slow else 1e3, "Mean time to first token", unit if slow else "ms"),
        (axes[1, 0], "hit_ratio", 100.0, "Prompt tokens found in the cache", "%"),
    )
    for ax, key, scale, title, label in panels:
        values = [(r[key] or 0.0) * scale for r in rows][::-1]
        bars = ax.barh(names, values, color=BAR)
        ax.bar_label(bars, [f"{v:,.4g}" for v in values], padding=3, fontsize=8)
        ax.set(title=title, xlabel=label)
        ax.set_xlim(0, max(values) * 1.18 or 1.0)
    ax = axes[1, 1]
    left = np.zeros(len(rows))
    for kind in MEMORY_KINDS:
        shares = np.array([(r[f"{kind}_share"] or 0.0) * 100 for r in rows][::-1])
        if shares.any():
            ax.barh(names, shares, left=left, color=COLOURS[kind], label=LABELS[kind])
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
        units |= {time_unit(run).rstrip("s") or "s" for run in several}
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
            "color": LINES[i % len(LINES)],
            "linestyle": ("-", "--", ":")[i // len(LINES) % 3],
            "marker": MARKERS[i % len(MARKERS)],
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
    offered, reached = offered_rate({"requests": run.arrays("requests")}), run.goodput(**bounds)
    if offered is None:
        raise ConfigError(f"a run of {name!r} has no request rate: its requests came all at once")
    return offered, reached.share or 0.0, reached.per_s or 0.0


def of_queue(
    times: Any,
    simulated: Mapping[str, Any],
    ticks: list[float],
    measured: dict[str, list[int]],
    title: str,
    share: tuple[Any, list[float]] | None = None,
) -> Figure:
    """Return running and waiting sequences over time: lines are simulated, dots measured.

    ``share`` is the pool in use, simulated and measured, in percent; it gets axes of its own.
    """
    figure, axes = _figure(9.0, 3.6 if share is None else 5.6, rows=1 if share is None else 2)
    if share is not None:
        ax = axes[1, 0]
        ax.plot(times, share[0], color=LINES[2], linewidth=1.2, label="in use, simulated")
        ax.plot(ticks, share[1], ".", color=LINES[2], markersize=4, label="in use, measured")
        ax.set_xlabel("time (s)")
        ax.set_ylabel("KV cache (%)")
        ax.set_ylim(0, 105)
        legend(ax)
    ax = axes[0, 0]
    for colour, name in zip(LINES, simulated):
        ax.plot(times, simulated[name], color=colour, linewidth=1.2, label=f"{name}, simulated")
        ax.plot(ticks, measured[name], ".", color=colour, markersize=4, label=f"{name}, measured")
    ax.set_xlabel("time (s)")
    ax.set_ylabel("sequences")
    ax.set_title(title)
    ax.set_ylim(bottom=0)
    legend(ax)
    return figure
