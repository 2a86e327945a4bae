"""How fast a simulation is: a real trace through the whole engine and its policy objects, on one core.

Llama-3.1-8B on an H100, chunked prefill with 8,192 tokens a step, at most 256 sequences, prefix caching with LRU, the
pool that fits the card. ``leap`` skips ahead, ``walk`` takes every step, ``events`` leaps and keeps the event log.
Per-request results and the memory accounting of every step are on throughout; the seconds are CPU time and end when
both tables are there. The trace is Mooncake's conversations where it is at hand, else the shipped generator. Then a
growing number of synthetic requests at a rate that the card can just serve, with the process's largest memory.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from typing import Any

from pagedlab.config import Config
from pagedlab.errors import WorkloadError
from pagedlab.lab.results import Run
from pagedlab.lab.simulate import simulate
from pagedlab.workloads import Workload, conversations, load, sharegpt_like

MODEL, HARDWARE = "llama-3.1-8b", "h100-sxm"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
RATE = 20.0
"""Synthetic requests a second."""
MODES: dict[str, dict[str, Any]] = {
    "leap": {"skip_ahead": True, "events": False},
    "walk": {"skip_ahead": False, "events": False},
    "events": {"skip_ahead": True, "events": True},
}


def the_trace() -> Workload:
    """Return Mooncake's conversation trace, or conversations like it."""
    try:
        return load("mooncake-conversation")
    except WorkloadError:
        return conversations(
            sessions=3000, system=2000, question=(200, 4000), answer=(100, 600), hash_block=512
        )


def timed(workload: Workload, block_size: int, mode: str) -> tuple[float, Run]:
    """Return CPU seconds and the run; its requests and steps are tables by then."""
    config = Config(
        block_size=block_size,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        allocator="fifo",
        null_block=True,
    )
    gc.collect()
    start = time.process_time()
    run = simulate(
        config, workload, model=MODEL, hardware=HARDWARE, num_blocks="fit", progress=False, **MODES[mode]
    )
    run.arrays("requests")
    run.arrays("steps")
    seconds = time.process_time() - start
    return seconds, run


def trace_rows(block_size: int, modes: tuple[str, ...], repeats: int) -> list[dict[str, Any]]:
    """Time the trace in each mode, in turn, and return a row for each."""
    workload = the_trace()
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    steps: dict[str, int] = {}
    for _ in range(repeats):
        for mode in modes:
            took, run = timed(workload, block_size, mode)
            seconds[mode].append(took)
            steps[mode] = len(run.arrays("steps")["step"])
    return [
        {
            "workload": workload.name,
            "requests": len(workload),
            "block_size": block_size,
            "mode": mode,
            "cpu_seconds": round(statistics.median(seconds[mode]), 2),
            "best": round(min(seconds[mode]), 2),
            "requests_per_s": round(len(workload) / statistics.median(seconds[mode])),
            "steps": steps[mode],
            "repeats": repeats,
        }
        for mode in modes
    ]


def growth_rows(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time more and more synthetic requests."""
    rows = []
    for n in sizes:
        workload = sharegpt_like(num_requests=n, rate=RATE, hashed=True)
        took, run = timed(workload, 16, "leap")
        rows.append(
            {
                "workload": workload.name,
                "requests": n,
                "block_size": 16,
                "mode": "leap",
                "cpu_seconds": round(took, 2),
                "requests_per_s": round(n / took),
                "steps": len(run.arrays("steps")["step"]),
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
        del run, workload
    return rows


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure and return the rows. ``PAGEDLAB_BENCH_REPEATS`` sets the rounds (3), ``PAGEDLAB_BENCH_REQUESTS`` the
    largest number of synthetic requests (1,000,000).
    """
    repeats = int(os.environ.get("PAGEDLAB_BENCH_REPEATS", "3"))
    most = int(os.environ.get("PAGEDLAB_BENCH_REQUESTS", str(SIZES[-1])))
    return [
        *trace_rows(512, ("leap", "walk", "events"), repeats),
        *trace_rows(16, ("leap",), 1),
        *growth_rows(tuple(n for n in SIZES if n <= most)),
    ]
