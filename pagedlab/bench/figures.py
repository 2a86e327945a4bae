"""Figures of what `kernel_grid`, `layouts` and simulations over block sizes measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from matplotlib.ticker import FuncFormatter

from pagedlab.bench import ONE_BYTE
from pagedlab.lab.plots import Figure

COLOURS = {"padded": "#0072B2", "csr": "#D55E00", "two-level": "#009E73", "extents": "#CC79A7"}
_OTHERS = ("#E69F00", "#56B4E9", "#000000", "#0072B2", "#D55E00")
_MARKERS = "osD^vP"
_BAND = "#BBBBBB"
_PEERS = {
    "cpu-paged": "#0072B2", "sdpa": "#D55E00", "copy": "#777777", "gather-sdpa": "#CC79A7",
    "gather-batch": "#56B4E9", "flex_attention": "#E69F00",
}  # fmt: skip
_NAMES = {
    "cpu-paged": "paged, best layout and block size", "sdpa": "fastest dense", "copy": "copy, read and written",
    "gather-sdpa": "gather + SDPA", "gather-batch": "gather + SDPA, batch at once",
    "flex_attention": "flex_attention, paged",
}  # fmt: skip
_GPU = {
    "triton-paged": ("paged, best layout and block size", "#0072B2"), "sdpa": ("fastest dense (flash)", "#D55E00"),
    "flashinfer": ("FlashInfer, paged", "#009E73"), "flex_attention": ("flex_attention", "#E69F00"),
}  # fmt: skip
_PLAIN = FuncFormatter(lambda x, _: f"{x:g}")
FIGURE_18A = (1.20, 1.26)
"""Attention latency of PagedAttention over FasterTransformer's: Kwon et al. 2023, section 7.1 and figure 18a."""


def of_layouts(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Bytes a block, a full build and one block more for each sequence, by layout and how the blocks lie."""
    rows = list(rows)
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    cases = list(dict.fromkeys((row["blocks"], row["lengths"]) for row in rows))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = {
        "bytes_per_block": "bytes a block",
        "build_us": "full build (µs)",
        "append_us": "a block more for each (µs)",
    }
    for ax, (column, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for i, case in enumerate(cases):
            mine = [row for row in rows if (row["blocks"], row["lengths"]) == case]
            heights = [next(row[column] for row in mine if row["layout"] == name) for name in layouts]
            at = [x + (i - (len(cases) - 1) / 2) * 0.8 / len(cases) for x in range(len(layouts))]
            ax.bar(at, heights, 0.8 / len(cases), label=", ".join(case), color=_OTHERS[i % len(_OTHERS)])
        ax.set_xticks(range(len(layouts)), layouts)
        ax.set_title(title, fontsize=11)
        if column == "bytes_per_block":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(_PLAIN)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(cases), frameon=False
    )
    return figure


def of_kernel(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Time of paged over the fastest dense attention by block size, a panel a point, a line a layout.

    Blocks lie at random. The grey band is what the PagedAttention paper measured on a GPU: 20 to 26% more than
    FasterTransformer.
    """
    paged = [
        row
        for row in rows
        if row["kernel"] == "cpu-paged" and row["blocks"] == "random" and row.get("dtype") not in ONE_BYTE
    ]
    points = list(dict.fromkeys((row["num_seqs"], row["context_len"]) for row in paged))
    figure = Figure(figsize=(0.8 + 3.1 * len(points), 3.5), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for ax, point in zip(axes, points):
        here = [row for row in paged if (row["num_seqs"], row["context_len"]) == point]
        ax.axhspan(*FIGURE_18A, color=_BAND, alpha=0.6, lw=0, label="the paper, on a GPU")
        ax.axhline(1, color="black", lw=1, ls="--", label="fastest dense")
        for i, layout in enumerate(dict.fromkeys(row["layout"] for row in here)):
            mine = sorted(
                (row["block_size"], 1 / row["ratio_dense"]) for row in here if row["layout"] == layout
            )
            colour = COLOURS.get(layout, _OTHERS[i % len(_OTHERS)])
            ax.plot(*zip(*mine), marker=_MARKERS[i % len(_MARKERS)], ms=5, color=colour, label=layout)
        _block_sizes(ax, [row["block_size"] for row in here])
        ax.set_title(f"{point[0]} × {point[1]:,} tokens", fontsize=11)
    axes[0].set_ylabel("time over dense")
    axes[0].set_ylim(bottom=0)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(6, len(handles[0])), frameon=False)
    return figure


def of_gpu(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Decoding as a share of a copy's bandwidth, chunks as one of a matrix product's rate, beside peers, by point."""
    rows = [row for row in rows if "graph" in row]
    kinds = {
        "ratio_copy": "decoding: share of a copy's bandwidth",
        "ratio_matmul": "chunks: share of a matrix product's rate",
    }
    panels = {name: title for name, title in kinds.items() if any(name in row for row in rows)}
    figure = Figure(figsize=(1 + 5.5 * len(panels), 4), layout="constrained")
    for ax, (column, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        mine = [row for row in rows if column in row]
        points = list(
            dict.fromkeys((row["num_seqs"], row.get("query_len"), row["context_len"]) for row in mine)
        )
        shown = [name for name in _GPU if any(row["kernel"].startswith(name) for row in mine)]
        for i, name in enumerate(shown):
            label, colour = _GPU[name]
            for x, point in enumerate(points):
                best = [
                    row[column]
                    for row in mine
                    if row["kernel"].startswith(name)
                    and (row["num_seqs"], row.get("query_len"), row["context_len"]) == point
                ]
                at, width = x + (i - (len(shown) - 1) / 2) * 0.8 / len(shown), 0.8 / len(shown)
                if best:
                    ax.bar(at, max(best), width, color=colour, label=None if x else label)
        ax.axhline(1, color="black", lw=1, ls="--")
        names = [f"{n} × {f'{q:,} of ' if q else ''}{context:,}" for n, q, context in points]
        ax.set_xticks(range(len(points)), names, rotation=20, ha="right", fontsize=9)
        ax.set_title(title, fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.3), ncols=2)
    return figure


def of_grid(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Decoding over the fastest dense attention and in GB/s beside peers, and prefill: a column a dtype and threads.

    The bars of the first row reach from the slowest to the fastest layout and block size, the tick is their median.
    """
    rows = [row for row in rows if "phase" in row]
    decode = [row for row in rows if row["phase"] == "decode" and row.get("gb_per_s")]
    prefill = [row for row in rows if row["phase"] == "prefill" and row["kernel"] == "cpu-paged"]
    columns = list(
        dict.fromkeys((row["dtype"], row["threads"]) for row in rows if row["dtype"] not in ONE_BYTE)
    )
    figure = Figure(figsize=(1 + 4.6 * len(columns), 9.5), layout="constrained")
    axes = figure.subplots(3, len(columns), squeeze=False, sharey="row")
    for (dtype, threads), (ratios, speeds, chunks) in zip(columns, axes.T):
        here = [row for row in decode if (row["dtype"], row["threads"]) == (dtype, threads)]
        points = list(dict.fromkeys((row["num_seqs"], row["context_len"]) for row in here))
        at = range(len(points))
        title = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"
        ratios.set_title(title, fontsize=11)
        for x, point in zip(at, points):
            mine = [
                row["ratio_dense"]
                for row in here
                if row["kernel"] == "cpu-paged" and (row["num_seqs"], row["context_len"]) == point
            ]
            ratios.bar(x, max(mine) - min(mine), 0.6, min(mine), color="#0072B2", alpha=0.5)
            ratios.plot([x - 0.3, x + 0.3], [median(mine)] * 2, color="#0072B2", lw=2)
        for kernel, colour in _PEERS.items():
            best = {
                point: [
                    row["gb_per_s"]
                    for row in here
                    if row["kernel"].startswith(kernel) and (row["num_seqs"], row["context_len"]) == point
                ]
                for point in points
            }
            found = [(x, max(best[point])) for x, point in zip(at, points) if best[point]]
            marker = "o" if len(found) == len(points) else "D"
            line = "-" if len(found) == len(points) else ""
            if found:
                speeds.plot(*zip(*found), marker=marker, ms=4, ls=line, color=colour, label=_NAMES[kernel])
        for ax in (ratios, speeds):
            ax.set_xticks(at, [f"{n} × {t:,}" for n, t in points], rotation=60, ha="right", fontsize=9)
        mine = [row for row in prefill if (row["dtype"], row["threads"]) == (dtype, threads)]
        shapes = list(dict.fromkeys((row["num_seqs"], row["query_len"], row["context_len"]) for row in mine))
        heights = [
            median(
                row["ratio_sdpa"]
                for row in mine
                if (row["num_seqs"], row["query_len"], row["context_len"]) == shape
            )
            for shape in shapes
        ]
        chunks.bar(range(len(shapes)), heights, 0.6, color="#009E73", alpha=0.7)
        names = [f"{n} × {q:,} of {t:,}" for n, q, t in shapes]
        chunks.set_xticks(range(len(shapes)), names, rotation=60, ha="right", fontsize=9)
        ratios.set_yscale("log", base=2)
        speeds.set_yscale("log")
        for ax in (ratios, speeds):
            ax.yaxis.set_major_formatter(_PLAIN)
        for ax in (ratios, chunks):
            ax.axhline(1, color="black", lw=1, ls="--")
        for ax in (ratios, speeds, chunks):
            ax.spines[["top", "right"]].set_visible(False)
    for ax, label in zip(
        axes[:, 0], ("decode: paged over fastest dense", "decode: GB/s", "prefill: paged over fastest SDPA")
    ):
        ax.set_ylabel(label)
    axes[2, 0].set_ylim(bottom=0)  # shared by the row
    figure.legend(
        *axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_PEERS), frameon=False
    )
    return figure


def of_block_sizes(
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]], best: Mapping[str, tuple[int, int]] | None = None
) -> Figure:
    """Waste, latency and running sequences by block size; ``runs`` holds a run's summary by workload and block size.

    ``best`` shades a range of block sizes for a workload, in its colour, under the latency.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = {
        "waste": "memory held and not used (%)",
        "latency_mean": "mean latency, relative to the best",
        "mean_batch_size": "sequences a step (mean)",
    }
    for ax, (column, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for i, (name, by_size) in enumerate(runs.items()):
            values = {size: float(summary[column]) for size, summary in by_size.items()}
            unit = {"waste": 0.01, "latency_mean": min(values.values())}.get(column, 1.0)
            colour = ("#0072B2", "#D55E00", "#009E73")[i % 3]
            if column == "latency_mean" and best and name in best:
                ax.axvspan(*best[name], ymin=0.04 * i, ymax=0.04 * (i + 1), color=colour, alpha=0.5, lw=0)
            ax.plot(
                list(values),
                [v / unit for v in values.values()],
                marker=_MARKERS[i],
                color=colour,
                label=name,
            )
        _block_sizes(ax, [size for by_size in runs.values() for size in by_size])
        ax.set_title(title, fontsize=11)
        ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _block_sizes(ax: Any, sizes: Iterable[int]) -> None:
    """A logarithmic axis of block sizes that names each."""
    ax.set_xscale("log", base=2)
    ticks = sorted(set(sizes))
    ax.set_xticks(ticks, [str(size) for size in ticks], fontsize=9)
    ax.set_xlabel("block size (tokens)")
    ax.spines[["top", "right"]].set_visible(False)
