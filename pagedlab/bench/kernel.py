"""How fast does paged attention read the KV cache, next to dense attention and to a plain copy?

Here are the contenders that stand for dense attention, and the batch that the paged kernels are given. The CPU's decode
grid is measured in `pagedlab.bench.kernel_grid`, its prefill in `pagedlab.bench.kernel_prefill`, its thread pools in
`pagedlab.bench.kernel_threads`; where there is a GPU `pagedlab.bench.kernel_gpu` and
`pagedlab.bench.kernel_gpu_prefill` add their rows.

A full run takes about ten minutes on two cores. ``PAGEDLAB_BENCH_POINTS=16x1024,1x128`` measures only these points,
``PAGEDLAB_BENCH_SECONDS`` sets the seconds for each (4), ``PAGEDLAB_BENCH_THREADS=1,2`` the numbers of threads (one,
and all cores), ``PAGEDLAB_BENCH_DEVICE=cuda`` leaves the CPU out, and ``PAGEDLAB_BENCH_KEEP=rows.jsonl`` keeps the rows
of every decode point in that file as it is done and measures only what is not there.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.bench import ONE_BYTE
from pagedlab.errors import ConfigError
from pagedlab.kernels.base import AttentionBatch
from pagedlab.policies.layout import Layout

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 8, 64
GROUP = NUM_HEADS // NUM_KV_HEADS
SCALE = HEAD_SIZE**-0.5


def dense_forms(query: torch.Tensor) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The ways to say grouped-query attention with torch; ``query`` [num_seqs, num_heads, head_size]."""
    alone = query[:, :, None]
    grouped = query.view(len(query), NUM_KV_HEADS, GROUP, HEAD_SIZE)

    def expanded(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(-1, -1, GROUP, -1, -1).flatten(1, 2)

    return {
        "sdpa enable_gqa": lambda k, v: sdpa(alone, k, v, enable_gqa=True),
        "sdpa regrouped": lambda k, v: sdpa(grouped, k, v),
        "sdpa expand": lambda k, v: sdpa(alone, expanded(k), expanded(v)),
    }


def chunk_batch(
    layout: Layout,
    num_seqs: int,
    query_len: int,
    context_len: int,
    block_size: int,
    rng: torch.Generator,
    *,
    adjacent: bool = False,
) -> AttentionBatch:
    """The last ``query_len`` tokens of each of ``num_seqs`` sequences, whose blocks lie in random order, or
    ``adjacent`` in one piece.
    """
    per_seq = context_len // block_size
    count = num_seqs * per_seq
    order = list(range(count)) if adjacent else torch.randperm(count, generator=rng).tolist()
    layout.reset(max_rows=num_seqs, max_blocks=per_seq)
    for row in range(num_seqs):
        layout.open(row, order[row * per_seq : (row + 1) * per_seq])
    entries, index = layout.arrays()
    return AttentionBatch(
        query_start=np.arange(0, num_seqs * query_len + 1, query_len, dtype=np.int32),
        context_lens=np.full(num_seqs, context_len, np.int32),
        rows=np.arange(num_seqs, dtype=np.int32),
        slots=np.zeros(num_seqs * query_len, np.int64),
        entries=entries,
        index=index,
        block_size=block_size,
        max_query_len=query_len,
        max_context_len=context_len,
    )


def asked_points() -> tuple[tuple[int, int], ...] | None:
    """The points that ``PAGEDLAB_BENCH_POINTS`` names, "16x1024,1x128"; None if it names none."""
    text = os.environ.get("PAGEDLAB_BENCH_POINTS", "")
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise ConfigError(
            f"PAGEDLAB_BENCH_POINTS must look like 16x1024,1x128 (sequences x tokens), not {text!r}"
        )
    sizes = (part.split("x") for part in text.split(","))
    return tuple((int(seqs), int(tokens)) for seqs, tokens in sizes)


def asked_seconds() -> float:
    """The seconds for each point that ``PAGEDLAB_BENCH_SECONDS`` names, or 4."""
    text = os.environ.get("PAGEDLAB_BENCH_SECONDS") or "4"
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise ConfigError(f"PAGEDLAB_BENCH_SECONDS must be a number of seconds, not {text!r}")
    return float(text)


def asked_threads() -> tuple[int, ...]:
    """The numbers of threads that ``PAGEDLAB_BENCH_THREADS`` names, or one and as many as there are cores."""
    text = os.environ.get("PAGEDLAB_BENCH_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text:
        return tuple(sorted({1, cores}))
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) or max(map(int, text.split(","))) > cores:
        raise ConfigError(f"PAGEDLAB_BENCH_THREADS must look like 1,2, up to {cores}, not {text!r}")
    return tuple(map(int, text.split(",")))


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Give torch, and the kernels that follow it, ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def asked_devices() -> tuple[str, ...]:
    """The devices to measure: the one that ``PAGEDLAB_BENCH_DEVICE`` names, or the CPU, and a GPU if there is one."""
    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    asked = os.environ.get("PAGEDLAB_BENCH_DEVICE", "")
    if asked and asked not in there:
        raise ConfigError(f"PAGEDLAB_BENCH_DEVICE must be one of {', '.join(there)} here, not {asked!r}")
    return (asked,) if asked else there


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure the CPU, and the GPU where there is one; return the rows (the command line prints them)."""
    devices = asked_devices()
    rows: list[dict[str, Any]] = []
    if "cpu" in devices:
        rows += _on_the_cpu()
    if "cuda" in devices:
        from pagedlab.bench import kernel_gpu, kernel_gpu_prefill

        rows += kernel_gpu.measure()
        rows += kernel_gpu_prefill.measure()
    return rows


def _on_the_cpu() -> list[dict[str, Any]]:
    from pagedlab.bench import kernel_grid, kernel_prefill, kernel_threads

    keep = os.environ.get("PAGEDLAB_BENCH_KEEP")
    seconds, threads = asked_seconds(), asked_threads()
    rows = kernel_grid.measure(
        points=asked_points() or kernel_grid.POINTS,
        threads=threads,
        peers=True,
        flex_points=kernel_grid.FLEX_POINTS,
        seconds=seconds,
        keep=Path(keep) if keep else None,
    )
    rows += kernel_prefill.measure(threads=threads, seconds=seconds / 2)
    return [*rows, *kernel_threads.measure(threads=threads, seconds=seconds)]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, by dtype and threads, what the paged kernel reaches at worst, in the middle, and at 16 x 1,024; and for a
    GPU, point by point, its share of a copy's bandwidth or of a matrix product's rate, and how it stands to dense.
    """
    rows = list(rows)
    if any("graph" in row for row in rows):
        from pagedlab.bench import kernel_gpu

        cpu = [row for row in rows if "graph" not in row]
        return [*(summary(cpu) if cpu else []), *kernel_gpu.summary(rows)]
    rows = [row for row in rows if row.get("kernel") in ("cpu-paged", None) and row["dtype"] not in ONE_BYTE]
    found = []
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in rows if "phase" in row):
        mine = [row for row in rows if (row["dtype"], row["threads"]) == (dtype, threads)]
        decode = [row for row in mine if row["phase"] == "decode"]
        main_point = [row for row in decode if (row["num_seqs"], row["context_len"]) == (16, 1024)]
        measured: dict[str, tuple[Callable[[list[float]], float], list[float]]] = {
            "decode_dense_least": (min, [row["ratio_dense"] for row in decode]),
            "decode_dense_median": (statistics.median, [row["ratio_dense"] for row in decode]),
            "decode_16x1024_dense": (statistics.median, [row["ratio_dense"] for row in main_point]),
            "decode_16x1024_copy": (statistics.median, [row["ratio_copy"] for row in main_point]),
            "decode_16x1024_gather": (statistics.median, [row["ratio_gather"] for row in main_point]),
            "decode_16x1024_gather_batch": (
                statistics.median,
                [row["ratio_gather_batch"] for row in main_point],
            ),
            "prefill_sdpa_least": (min, [row["ratio_sdpa"] for row in mine if row["phase"] == "prefill"]),
            "threads_alone": (min, [row["ratio_alone"] for row in mine if row["phase"] == "threads"]),
        }
        figures = {name: of(values) if values else None for name, (of, values) in measured.items()}
        found.append({"dtype": dtype, "threads": threads, **figures})
    return found


def draw(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return the picture of `main`'s rows: the GPU's, if there is one among them."""
    from pagedlab.bench import figures

    rows = list(rows)
    if any("graph" in row for row in rows):
        return figures.of_gpu(rows)
    return figures.of_grid(list(rows))
