"""Figures of runs, made with matplotlib's Figure API: no global state, nothing to close, at home in threads.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure

from pagedlab.errors import ConfigError, nearest
from pagedlab.lab.measures import MEMORY_KINDS

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
_BAR = "#0072B2"


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
    at = [*steps["start"], table["time"][-1]]
    series = [np.array([*table[f"{k}_share"], table[f"{k}_share"][-1]]) * 100 for k in MEMORY_KINDS]
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
    """Running and waiting sequences over time, and preemptions."""
    steps = run.columns("steps")
    if not steps["step"]:
        return _empty(ax)
    end = steps["start"][-1] + steps["duration"][-1]
    at = [*steps["start"], end]
    for name, colour in (("running", _LINES[0]), ("waiting", _LINES[1])):
        values = steps[name]
        ax.step(at, [*values, values[-1]], where="post", color=colour, label=name, linewidth=1.3)
    lost = steps["preemptions"]
    when = [steps["start"][i] for i in range(len(lost)) if lost[i] > (lost[i - 1] if i else 0)]
    if when:
        ax.plot(when, [0] * len(when), "|", color="black", markersize=9, label="preemption")
    ax.set(title="Batch and queue", xlabel=f"time ({_time_unit(run)})", ylabel="sequences", xlim=(at[0], end))
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
    ax.legend(frameon=False, ncols=2)
    ax.set_ylim(bottom=0)
    return figure
