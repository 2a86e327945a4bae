"""Do torch's and numba's thread pools stand in each other's way? A decode step's work, alternating and alone.

A step is one product of 16 rows with a weight of 2,048 x 2,048 (torch) and one attention over 16 sequences of 1,024
tokens (`cpu-paged`), as a layer of a model has them. ``ratio_alone`` divides the time of a product and an attention,
each measured in a loop of its own, by the time of both in turn: 1 is no contention. Loops take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pagedlab.bench.kernel import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, chunk_batch, threads_of
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.policies.layout import CSR

NUM_SEQS, CONTEXT_LEN, BLOCK_SIZE, WIDTH = 16, 1024, 16, 2048
STEPS = 10
"""Steps of a loop, between two looks at the clock."""


def measure(*, threads: Iterable[int], seconds: float = 3.0) -> list[dict[str, Any]]:
    """Return one row per number of threads, the same in both pools; each takes about ``seconds``."""
    rng = torch.Generator().manual_seed(0)
    layout = CSR()
    batch = chunk_batch(layout, NUM_SEQS, 1, CONTEXT_LEN, BLOCK_SIZE, rng)
    attention = CPUPagedAttention(layout)
    shape = (NUM_SEQS * CONTEXT_LEN // BLOCK_SIZE, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    keys, values = torch.randn(2, *shape, generator=rng)
    query = torch.randn(NUM_SEQS, NUM_HEADS, HEAD_SIZE, generator=rng)
    x, weight = torch.randn(NUM_SEQS, WIDTH, generator=rng), torch.randn(WIDTH, WIDTH, generator=rng)

    def product() -> None:
        x @ weight

    def attend() -> None:
        attention.attend(query, keys, values, batch, scale=SCALE)

    loops: dict[str, tuple[Callable[[], None], ...]] = {
        "torch": (product,),
        "cpu-paged": (attend,),
        "in turn": (product, attend),
    }
    rows = []
    for count in threads:
        with torch.inference_mode(), threads_of(count):
            times: dict[str, list[float]] = {name: [] for name in loops}
            for calls in loops.values():
                _loop(calls)
            end = time.perf_counter() + seconds
            while not times["in turn"] or time.perf_counter() < end:
                for name, calls in loops.items():
                    times[name].append(_loop(calls))
        alone = [a + b for a, b in zip(times["torch"], times["cpu-paged"])]
        rows.append(
            {
                "phase": "threads",
                "num_seqs": NUM_SEQS,
                "context_len": CONTEXT_LEN,
                "dtype": "float32",
                "threads": count,
                **{f"us_{name.replace(' ', '_')}": statistics.median(t) * 1e6 for name, t in times.items()},
                "ratio_alone": statistics.median(a / t for a, t in zip(alone, times["in turn"])),
                "calls": STEPS * len(alone),
            }
        )
    return rows


def _loop(calls: tuple[Callable[[], None], ...]) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(STEPS):
        for call in calls:
            call()
    return (time.perf_counter() - start) / STEPS
