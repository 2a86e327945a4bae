"""What a figure of a run is made of: each panel draws one thing that a run knows on matplotlib axes.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from pagedlab.lab import measures, page
from pagedlab.lab.measures import MEMORY_KINDS, Columns

if TYPE_CHECKING:
    from pagedlab.lab.results import Run

COLOURS = {
    "stored": "#0072B2",
    "reserved": "#E69F00",
    "internal": "#D55E00",
    "external": "#CC79A7",
    "cached": "#56B4E9",
    "free": "#E5E5E5",
}
LABELS = {
    "stored": "stored",
    "reserved": "reserved",
    "internal": "internal fragmentation",
    "external": "external fragmentation",
    "cached": "cached prefixes",
    "free": "free",
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
BAR = "#0072B2"
_MOST_POINTS = 600
"""Of a line over time: as many as a figure has room to show."""
_RATE_BINS = 150
_TIMES = {
    "queue_time": "Queueing time",
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "latency": "End-to-end latency",
}
_LINKS = {
    "to_host": "device to host",
    "to_device": "host to device",
    "copied": "inside the device",
    "to_disk": "host to disk",
    "from_disk": "disk to host",
}


def memory(run: Run, ax: Any) -> None:
    """Stacked: where the pool's token slots were, step by step."""
    table, steps = run.arrays("memory"), run.arrays("steps")
    if not len(table["step"]):
        return _empty(ax)
    edges = np.append(steps["start"], table["time"][-1])
    at, means, _, _ = _thinned(edges, [table[f"{kind}_share"] for kind in MEMORY_KINDS])
    series = [np.append(row, row[-1]) * 100 for row in means]
    shown = [i for i, s in enumerate(series) if s.any() or MEMORY_KINDS[i] in ("stored", "free")]
    names = [MEMORY_KINDS[i] for i in shown]
    ax.stackplot(
        at,
        [series[i] for i in shown],
        labels=[LABELS[n] for n in names],
        colors=[COLOURS[n] for n in names],
        step="post",
        linewidth=0,
    )
    ax.set(
        title="KV memory",
        xlabel=f"time ({time_unit(run)})",
        ylabel="share of the pool (%)",
        ylim=(0, 100),
        xlim=(at[0], at[-1]),
    )
    legend(ax)


def batch(run: Run, ax: Any) -> None:
    """Running and waiting sequences over time, and preemptions. Of very many steps: means, and the range shaded."""
    steps = run.arrays("steps")
    if not len(steps["step"]):
        return _empty(ax)
    edges = _edges(steps)
    names = ("running", "waiting")
    at, means, lows, highs = _thinned(edges, [steps[name] for name in names])
    thinned = len(at) < len(edges)
    for name, colour, mean, low, high in zip(names, LINES, means, lows, highs):
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
    _over_time(
        run, ax, at, "Batch and queue (means; ranges shaded)" if thinned else "Batch and queue", "sequences"
    )


def latency(run: Run, ax: Any) -> None:
    """Empirical distributions of all that a person waits for, of sequences that finished."""
    for name, colour, dash in zip(_TIMES, LINES, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))):
        _distribution(run, ax, name, color=colour, linestyle=dash, label=_TIMES[name])
    _share_within(run, ax, "Latency", "sequences or gaps within (%)")


def one_time(name: str) -> Callable[[Run, Any], None]:
    """Return the panel of one of the times: its distribution, with its percentiles marked."""

    def draw(run: Run, ax: Any) -> None:
        _distribution(run, ax, name, color=BAR)
        s, unit = run.summary(), time_unit(run)
        for q, marker in zip((50, 90, 95, 99), MARKERS):
            if (value := s[f"{name}_p{q}"]) is not None:
                said = page.seconds(value) if unit == "s" else f"{value:.4g} {unit}"
                ax.plot([value], [q], marker, color=LINES[1], markersize=5, label=f"p{q}: {said}")
        what = "gaps between tokens" if name == "itl" else "sequences"
        _share_within(run, ax, _TIMES[name], f"{what} within (%)")

    return draw


def _distribution(run: Run, ax: Any, name: str, **style: Any) -> None:
    """Draw the empirical distribution of one of the times, if there is any."""
    values, counts = measures.times({t: run.arrays(t) for t in ("requests", "steps", "spans")}, name)
    if len(values):
        order = np.argsort(values)
        upto = np.arange(1, len(values) + 1) if counts is None else np.cumsum(counts[order])
        kept = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS * 2).astype(int))
        x, share = values[order][kept], upto[kept] / upto[-1] * 100
        ax.step(np.append(x[0], x), np.append(0, share), where="post", linewidth=1.6, **style)


def _share_within(run: Run, ax: Any, title: str, label: str) -> None:
    ends = [x for line in ax.lines for x in line.get_xdata()[[0, -1]]]
    if not ends:
        return _empty(ax)
    unit = time_unit(run)
    # A logarithmic axis has no room for 0: there a curve comes in from the left at the share that did not wait.
    low = min((x for x in ends if x > 0), default=0.0)
    if logarithmic := max(ends) > 3 * low > 0:
        ax.set_xscale("log", nonpositive="clip")
        wide = max(ends) > 300 * low
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(title=title, xlabel=f"time ({unit}, log)" if logarithmic else f"time ({unit})", ylabel=label)
    ax.set_ylim(0, 101)
    ax.grid(True, which="major", axis="both", alpha=0.25)
    legend(ax)


def hit_ratio(run: Run, ax: Any) -> None:
    """The share of prompt tokens found in the cache, of all requests admitted so far."""
    at, ratio = measures.hit_ratios({"requests": run.arrays("requests")})
    steps = run.arrays("steps")
    if not len(at) or not len(steps["step"]):
        return _empty(ax)
    kept, edges = _few(at), _edges(steps)
    x, y = np.append(at[kept], edges[-1]), np.append(ratio[kept], ratio[-1]) * 100
    ax.step(x, y, where="post", color=BAR, linewidth=1.6)
    _over_time(run, ax, edges, "Prefix hits, of all requests so far", "prompt tokens found (%)")
    ax.set_ylim(0, 101)


def recomputed(run: Run, ax: Any) -> None:
    """Tokens computed once more because their sequence had been preempted, since the run began."""
    tokens = run.arrays("steps")["recomputed_tokens"]
    _so_far(run, ax, {"": tokens}, "Recomputed after preemption, so far", "tokens")


def preemptions(run: Run, ax: Any) -> None:
    """Preemptions since the run began."""
    _so_far(run, ax, {"": run.arrays("steps")["preemptions"]}, "Preemptions so far", "preemptions")


def moved(run: Run, ax: Any) -> None:
    """What went over each link since the run began: bytes, or blocks where their weight is not known."""
    series, unit = _moved(run)
    _so_far(run, ax, series, "Moved so far", unit, by_step=True)


def moved_per_s(run: Run, ax: Any) -> None:
    """The same per second."""
    series, unit = _moved(run)
    _rates(run, ax, series, "Moved over time", unit)


def _moved(run: Run) -> tuple[dict[str, Any], str]:
    """Return what each link that was used carried in each step, and in which unit."""
    steps = run.arrays("steps")
    blocks = {_LINKS[link]: steps[f"blocks_{link}"] for link in measures.LINKS}
    # What a run of an older format does not know of (a disk) it did not have.
    blocks = {name: n for name, n in blocks.items() if _recorded(n)} or blocks
    if not _recorded(*blocks.values()):
        return blocks, "blocks"
    blocks = {name: np.asarray(n) for name, n in blocks.items() if np.any(n)}
    most = measures.moved_bytes(max((int(n.sum()) for n in blocks.values()), default=0), run.facts)
    if most is None:
        return blocks, "blocks"
    unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= u[1]), ("bytes", 1))
    return {name: measures.moved_bytes(n, run.facts) / size for name, n in blocks.items()}, unit


def output_rate(run: Run, ax: Any) -> None:
    """Output tokens per second over time."""
    made = measures.tokens_per_step({table: run.arrays(table) for table in ("steps", "spans")})
    _rates(run, ax, {"": made}, "Throughput: output", "tokens")


def prefill_rate(run: Run, ax: Any) -> None:
    """Prompt tokens computed per second over time, recomputed ones included."""
    _rates(run, ax, {"": run.arrays("steps")["prefill_tokens"]}, "Throughput: prefill", "tokens")


def _so_far(
    run: Run, ax: Any, series: Mapping[str, Any], title: str, label: str, *, by_step: bool = False
) -> None:
    """Draw counts since the run began (``by_step``: the sums of what each step did), as each step left them."""
    steps = run.arrays("steps")
    if not _drawable(ax, steps, series, title):
        return
    start, end = _times(steps)
    kept = _few(end)
    x = np.append(start[0], end[kept])
    for (name, counts), colour, dash in zip(series.items(), LINES, ("-", "--", "-.", ":", (0, (5, 1)))):
        reached = np.cumsum(counts) if by_step else np.asarray(counts)
        y = np.append(0, reached[kept])
        ax.step(x, y, where="post", color=colour, linestyle=dash, linewidth=1.5, label=name)
    _over_time(run, ax, x, title, label)


def _rates(run: Run, ax: Any, series: Mapping[str, Any], title: str, unit: str) -> None:
    """Draw what was done per second, in bins so wide that few steps are a spike by themselves; dashed: the mean."""
    steps = run.arrays("steps")
    if not _drawable(ax, steps, series, title):
        return
    start, end = _times(steps)
    bins = np.linspace(start[0], max(end[-1], start[0] + 1e-12), min(_RATE_BINS, len(start)) + 1)
    # Between the end of a step and the beginning of the next there may be a pause in which nothing is done.
    at = np.stack([start, end], axis=1).ravel()
    for (name, amounts), colour in zip(series.items(), LINES):
        total = np.append(0, np.repeat(np.cumsum(amounts), 2)[:-1])
        rate = np.diff(np.interp(bins, at, total)) / np.diff(bins)
        mean = float(total[-1] / (bins[-1] - bins[0]))
        said = f"mean {page.number(mean)}"
        label = f"{name}, {said}" if name else None
        ax.step(bins, np.append(rate, rate[-1]), where="post", color=colour, linewidth=1.3, label=label)
        ax.axhline(mean, color=colour, linestyle="--", linewidth=0.9, label=None if name else said)
    _over_time(run, ax, bins, title, f"{unit} per {time_unit(run).rstrip('s') or 's'}")


def _drawable(ax: Any, steps: Columns, series: Mapping[str, Any], title: str) -> bool:
    """Whether there is anything to draw; the axes say so if not."""
    if not _recorded(*series.values()):
        _empty(ax, f"{title}: not recorded in this run")
    elif not len(steps["step"]) or not series:
        _empty(ax, f"{title}: nothing")
    else:
        return True
    return False


def _recorded(*columns: Any) -> bool:
    """Whether a run knows these columns; one that was saved by an older version may not."""
    return all(not len(c) or c[0] is not None for c in columns)


def _edges(steps: Columns) -> NDArray[np.float64]:
    """Return the starts of the steps, and the end of the last."""
    return np.append(steps["start"], steps["start"][-1] + steps["duration"][-1])


def _times(steps: Columns) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return when each step began and ended."""
    start = np.asarray(steps["start"])
    return start, start + steps["duration"]


def _few(at: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return which of the sorted times to draw: the last of each stretch that a figure can tell apart, and no more."""
    if len(at) <= _MOST_POINTS:
        return np.arange(len(at))
    bins = np.linspace(at[0], at[-1], _MOST_POINTS + 1)
    return np.unique(np.append(np.clip(np.searchsorted(at, bins, side="right") - 1, 0, None), len(at) - 1))


def _over_time(run: Run, ax: Any, at: NDArray[np.float64], title: str, label: str) -> None:
    ax.set(title=title, xlabel=f"time ({time_unit(run)})", ylabel=label)
    if at[-1] > at[0]:
        ax.set_xlim(at[0], at[-1])
    top = max(ax.get_ylim()[1], 1e-12)
    if all(not np.any(line.get_ydata()) for line in ax.lines):
        top = 1.0
    if top >= 10_000:
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_ylim(0, top)
    legend(ax)


def _thinned(
    edges: ArrayLike, series: Sequence[ArrayLike]
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


def time_unit(run: Run) -> str:
    """A step clock counts steps, one a second."""
    return "steps" if run.facts.get("clock") == "step" else "s"


def legend(ax: Any) -> None:
    """Put the legend beside the axes, if anything has a label."""
    if any(ax.get_legend_handles_labels()[1]):
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _empty(ax: Any, why: str = "nothing to show") -> None:
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color="#777777")
    ax.set_axis_off()
