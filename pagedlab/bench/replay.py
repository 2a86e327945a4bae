"""How fast `replay` is: block accesses a second through the public policy interface, on one core.

The stream is the Mooncake conversation trace where it is at hand (288,500 accesses), else a Zipf stream of as many.
Beside the library's own policies runs the shortest LRU that Python has: a loop over an `OrderedDict`, with no policy,
no blocks and nothing else to say than how many it missed. Other simulators are not run from here.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import OrderedDict
from itertools import chain
from typing import Any

from pagedlab.errors import WorkloadError
from pagedlab.lab.accesses import Accesses, accesses
from pagedlab.lab.replay import replay
from pagedlab.workloads import zipf

POLICIES = ("lru", "fifo", "lfu")
NUM_BLOCKS = (5_000, 50_000)
ACCESSES = 288_500
BASELINE = "OrderedDict"


def stream() -> Accesses:
    """Return the accesses to replay."""
    try:
        return accesses("mooncake-conversation")
    except WorkloadError:
        return accesses(zipf(num_requests=ACCESSES, blocks=100_000, alpha=0.9, tail=0, hashed=True))


def ordered_dict_misses(keys: list[int], capacity: int) -> int:
    """Return the misses of an LRU that is nothing but a dictionary."""
    cached: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in keys:
        if key in cached:
            cached.move_to_end(key)
        else:
            misses += 1
            if len(cached) == capacity:
                cached.popitem(last=False)
            cached[key] = None
    return misses


def measure(repeats: int = 5) -> list[dict[str, Any]]:
    """Run every contender ``repeats`` times, alternating, and return a row for each size and contender."""
    trace = stream()
    keys = list(chain.from_iterable(request.keys for request in trace.requests))
    gc.collect()
    gc.freeze()
    rows = []
    for num_blocks in NUM_BLOCKS:
        rates: dict[str, list[float]] = {name: [] for name in (BASELINE, *POLICIES)}
        ratios: dict[str, float] = {}
        for _ in range(repeats):
            for name, values in rates.items():
                start = time.perf_counter()
                if name == BASELINE:
                    missed = ordered_dict_misses(keys, num_blocks)
                else:
                    missed = replay(trace, name, num_blocks, semantics="plain", progress=False).misses
                values.append(len(keys) / (time.perf_counter() - start))
                ratios[name] = missed / len(keys)
        if ratios["lru"] != ratios[BASELINE]:
            raise RuntimeError(f"two LRUs missed {ratios['lru']} and {ratios[BASELINE]}")
        baseline = statistics.median(rates[BASELINE])
        for name, values in rates.items():
            rows.append(
                {
                    "trace": trace.name,
                    "contender": name,
                    "num_blocks": num_blocks,
                    "accesses_per_s": round(statistics.median(values)),
                    "best": round(max(values)),
                    "worst": round(min(values)),
                    "ratio_ordereddict": round(statistics.median(values) / baseline, 2),
                    "miss_ratio": round(ratios[name], 6),
                    "accesses": len(keys),
                    "repeats": repeats,
                }
            )
    gc.unfreeze()
    return rows


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure and return the rows (the command line prints them)."""
    return measure()
