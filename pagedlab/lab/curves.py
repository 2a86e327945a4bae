"""Figures of miss ratio curves."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FuncFormatter, NullFormatter

from pagedlab.lab.plots import Figure

if TYPE_CHECKING:
    from pagedlab.lab.replayed import MissRatioCurve

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_BOUND = "#555555"
_LINE_HEIGHT = 0.045
"""Of a label, as a share of the axis."""


def of_miss_ratios(curve: MissRatioCurve) -> Figure:
    """Return miss ratios over the blocks of the cache, one line per policy, named where it ends."""
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ends: list[tuple[float, str, str]] = []
    drawn = bounds = 0
    for name in curve.policies:
        points = sorted((p.num_blocks, p.miss_ratio, p.is_bound) for p in curve if p.eviction == name)
        sizes, ratios = [n for n, _, _ in points], [ratio for _, ratio, _ in points]
        if points[0][2]:
            colour, style, marker = _BOUND, ("--", ":")[bounds % 2], ""
            bounds += 1
        else:
            colour, style = _COLOURS[drawn % len(_COLOURS)], ("-", ":")[drawn // len(_COLOURS) % 2]
            marker = _MARKERS[drawn % len(_MARKERS)]
            drawn += 1
        ax.plot(sizes, ratios, style, color=colour, marker=marker, markersize=4, linewidth=1.5)
        ends.append((ratios[-1], name, colour))
    ax.set_xscale("log")
    ticks = sorted(curve.sizes)
    if len(ticks) <= 8:
        ax.set_xticks(ticks)
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    counted = curve.points[0]
    ax.set(
        # Names come from outside: a dollar sign in one begins no mathematics.
        title=counted.trace.name.replace("$", r"\$"),
        xlabel="blocks in the cache (log)",
        ylabel=f"miss ratio ({counted.semantics})",
    )
    ax.grid(True, which="major", alpha=0.25)
    low, high = ax.get_ylim()
    ends.sort()
    heights = _apart([(ratio - low) / (high - low) for ratio, _, _ in ends])
    for height, (_, name, colour) in zip(heights, ends):
        ax.annotate(
            name.replace("$", r"\$"),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )
    return figure


def of_distances(curve: MissRatioCurve, to: str) -> Figure:
    """Return a map of the distances in points of hit ratio, nearest policy on top."""
    distance = curve.distance(to)
    names = [name for name in curve.ranked(to) if name != to]
    sizes = sorted({n for _, n in distance})
    cells = [[100 * distance.get((name, n), nan) for n in sizes] for name in names]
    figure = Figure(figsize=(1.6 + 1.1 * len(sizes), 1.3 + 0.28 * len(names)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    most = max((x for row in cells for x in row if x == x), default=0.0)
    ax.imshow(cells, aspect="auto", cmap="YlOrRd", vmin=0, vmax=max(most, 1e-9))
    for y, row in enumerate(cells):
        for x, points in enumerate(row):
            if points == points:
                # Yellow below, dark red above.
                colour = "white" if points > 0.6 * most else "black"
                ax.text(x, y, f"{abs(points):.1f}", ha="center", va="center", fontsize=8.5, color=colour)
    ax.set_xticks(range(len(sizes)), [f"{n:,}" for n in sizes])
    ax.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    name = curve.trace.name.replace("$", r"\$")
    ax.set_title(f"{name}: points of hit ratio below {to}", fontsize=10.5)
    ax.set_xlabel("blocks in the cache")
    return figure


def _apart(heights: list[float]) -> list[float]:
    """Return ascending heights, moved so that labels do not cover each other: up first, then down from the top."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LINE_HEIGHT) if placed else height)
    room = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], room)
        room = placed[i] - _LINE_HEIGHT
    return placed
