"""What a block table costs to keep, layout by layout, without a kernel: bytes, a full build, one block more for each.

256 sequences whose blocks lie in random order (as a free list leaves them) or adjacent (as a contiguous allocator
does), all of one length or one of them sixteen times as long. ``nbytes`` are the encoding's own, ``bytes_per_block``
divides by the blocks of all sequences, ``bytes_read`` is what a kernel reads of it to visit all of them. ``build_us``
opens all rows, ``append_us`` appends a block to every row, ``arrays_us`` asks for the arrays that a kernel is handed,
once a step. Layouts take turns; medians in microseconds.

Beside it, the engine end to end with each layout (rows with ``tokens_per_s``): the model and requests of
`pagedlab.bench.engine` in bfloat16, the first of them, on the default kernel. ``ratio_default`` is the median of the
rounds' ratios to the default layout. ``PAGEDLAB_BENCH_REPEATS`` sets the rounds (5).
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pagedlab.errors import ConfigError
from pagedlab.policies.layout import Layout
from pagedlab.registry import make, policy_names

NUM_SEQS = 256
BLOCKS_PER_SEQ = (64, 512)
ORDERS = ("random", "adjacent")
LENGTHS = ("equal", "one long")
LONG = 16
"""How many times as long the long sequence is."""
APPENDS = 32
NOISE = 0.05
"""How far from 1 the ratio of two equal engines may be on a quiet machine."""


def make_tables(num_seqs: int, blocks_per_seq: int, *, blocks: str, lengths: str) -> list[list[int]]:
    """Return a block table for each sequence, with ``APPENDS`` blocks more than ``blocks_per_seq`` at its end."""
    if blocks not in ORDERS:
        raise ConfigError(f"blocks lie {' or '.join(ORDERS)}, not {blocks!r}")
    if lengths not in LENGTHS:
        raise ConfigError(f"lengths are {' or '.join(map(repr, LENGTHS))}, not {lengths!r}")
    sizes = [blocks_per_seq + APPENDS] * num_seqs
    if lengths == "one long":
        sizes[0] = LONG * blocks_per_seq + APPENDS
    order = list(range(sum(sizes)))
    if blocks == "random":
        random.Random(0).shuffle(order)
    ends = list(itertools.accumulate(sizes))
    return [order[end - size : end] for size, end in zip(sizes, ends)]


def timed(layout: Layout, tables: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Build ``tables`` but for their last `APPENDS` blocks, then append those one by one; seconds by kind of work."""
    layout.reset(max_rows=len(tables), max_blocks=max(map(len, tables)))
    times: dict[str, list[float]] = {"build": [], "append": [], "arrays": []}

    def since(start: float, kind: str) -> None:
        times[kind].append(time.perf_counter() - start)

    start = time.perf_counter()
    for row, table in enumerate(tables):
        layout.open(row, table[:-APPENDS])
    since(start, "build")
    for step in range(-APPENDS, 0):
        one = [(table[step],) for table in tables]
        start = time.perf_counter()
        for row, block in enumerate(one):
            layout.append(row, block)
        since(start, "append")
        start = time.perf_counter()
        layout.arrays()
        since(start, "arrays")
    return times


def measure(
    *,
    layouts: Iterable[str] | None = None,
    num_seqs: int = NUM_SEQS,
    blocks_per_seq: Iterable[int] = BLOCKS_PER_SEQ,
    orders: Iterable[str] = ORDERS,
    lengths: Iterable[str] = LENGTHS,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Return one row per length of tables, order of blocks and layout."""
    names = list(policy_names("layout") if layouts is None else layouts)
    rows = []
    for size, order, kind in itertools.product(blocks_per_seq, orders, lengths):
        tables = make_tables(num_seqs, size, blocks=order, lengths=kind)
        held: dict[str, Any] = {name: make("layout", name) for name in names}
        times: dict[str, dict[str, list[float]]] = {
            name: {"build": [], "append": [], "arrays": []} for name in names
        }
        for _ in range(repeats):
            for name, layout in held.items():
                for work, seconds in timed(layout, tables).items():
                    times[name][work] += seconds
        total = sum(map(len, tables))
        for name, layout in held.items():
            rows.append(
                {
                    "layout": name,
                    "num_seqs": num_seqs,
                    "blocks_per_seq": size,
                    "blocks": order,
                    "lengths": kind,
                    "nbytes": layout.nbytes,
                    "bytes_per_block": layout.nbytes / total,
                    "bytes_read": sum(layout.bytes_read(len(table)) for table in tables),
                    **{f"{work}_us": statistics.median(times[name][work]) * 1e6 for work in times[name]},
                }
            )
    return rows


def measure_engine(
    *, layouts: Iterable[str] | None = None, num_requests: int = 16, repeats: int = 5, dtype: str = "bfloat16"
) -> list[dict[str, Any]]:
    """Return one row per layout: tokens a second of the engine on a real model, layouts in turn."""
    import torch

    from pagedlab.bench import engine
    from pagedlab.config import Config
    from pagedlab.executors.model import ModelExecutor
    from pagedlab.executors.shapes import random_model

    default = Config().policies()
    names = list(dict.fromkeys([default.layout.name, *(layouts or policy_names("layout"))]))
    requests = engine.make_requests(num_requests)
    rates: dict[str, list[float]] = {name: [] for name in names}
    executors = {}
    for name in names:
        layout: Any = make("layout", name)
        model = random_model(engine.SHAPE, getattr(torch, dtype))
        executors[name] = ModelExecutor(model, layout=layout, kernel=default.kernel)
        engine.pagedlab_rate(executors[name], requests[:2], 2)  # compiles
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            rates[name].append(engine.pagedlab_rate(executors[name], requests, num_requests))
    return [
        {
            "layout": name,
            "dtype": dtype,
            "requests": num_requests,
            "requested_tokens": engine.requested(requests),
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "tokens_per_s": statistics.median(mine),
            "ratio_default": statistics.median(m / d for m, d in zip(mine, rates[names[0]])),
        }
        for name, mine in rates.items()
    ]


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure and return the rows (the command line prints them)."""
    return [*measure(), *measure_engine(repeats=int(os.environ.get("PAGEDLAB_BENCH_REPEATS", "5")))]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tokens a second by layout, and whether the engine is slower with it than with the default (by over 5%)."""
    columns = ("layout", "tokens_per_s", "ratio_default")
    return [
        {name: row[name] for name in columns} | {"slower": row["ratio_default"] < 1 - NOISE}
        for row in rows
        if "ratio_default" in row
    ]
