"""What is computed from a run's tables: speed, latency, and where the memory went.

Memory is averaged over time: each step counts as long as it took. Nothing here needs pandas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Columns = dict[str, list[Any]]

MEMORY_KINDS = ("stored", "reserved", "internal", "external", "cached", "free")
"""Where a token slot can be; together they are the pool."""
_QUANTILES = (50, 95, 99)


def summarise(columns: dict[str, Columns], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the run in numbers. What cannot be said (no output, no step) is None.

    ``tokens_per_s`` counts output tokens from the start of the first step to the end of the last. ``ttft``,
    ``tpot`` and ``latency`` (with ``_mean``, ``_p50``, ``_p95``, ``_p99``) are seconds from arrival to the first
    token, per token after it, and from arrival to the end, of sequences that finished. ``hit_ratio`` is the share
    of prompt tokens found in the cache at first admission. ``waste`` is the share of the memory held by running
    sequences that stores nothing: (reserved + internal + external) / (stored + reserved + internal + external).
    ``mean_batch_size`` is in sequences.
    """
    requests, steps, totals = columns["requests"], columns["steps"], facts["totals"]
    reasons = requests["finish_reason"]
    output = sum(requests["output_tokens"])
    duration = steps["start"][-1] + steps["duration"][-1] - steps["start"][0] if steps["start"] else 0.0
    summary: dict[str, Any] = {
        "requests": len(set(requests["request_id"])),
        "sequences": len(reasons),
        "finished": sum(r in ("stop", "length") for r in reasons),
        "refused": sum(r == "refused" for r in reasons),
        "failed": sum(r == "error" for r in reasons),
        "cancelled": sum(r == "cancelled" for r in reasons),
        "unfinished": sum(r is None for r in reasons),
        "steps": len(steps["step"]),
        "duration": duration,
        "prompt_tokens": totals["prompt_tokens"],
        "output_tokens": output,
        "tokens_per_s": output / duration if duration > 0 else None,
    }
    finished = [r in ("stop", "length") for r in reasons]
    for name in ("ttft", "tpot", "latency"):
        values = [v for v, f in zip(requests[name], finished) if f and v is not None]
        summary.update(_spread(name, values))
    shares = memory_shares(columns)
    summary |= {
        "hit_ratio": totals["hit_tokens"] / totals["prompt_tokens"] if totals["prompt_tokens"] else None,
        "waste": waste(columns),
        "preemptions": totals["preemptions"],
        "recomputed_tokens": totals["recomputed_tokens"],
        "swapped_out": totals["swapped_out"],
        "prefetch_done": totals["prefetch_done"],
        "prefetch_useful": totals["prefetch_useful"],
        "prefetch_useless": totals["prefetch_useless"],
        "prefetch_refused": totals["prefetch_refused"],
        "mean_batch_size": weighted(steps["running"], steps["duration"]),
        **{f"{kind}_share": shares[kind] for kind in MEMORY_KINDS},
        "kernel": facts["used"]["kernel"],
        "layout": facts["used"]["layout"],
        "dtype": facts["used"]["dtype"],
    }
    return summary


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys([f"{name}_mean", *(f"{name}_p{q}" for q in _QUANTILES)])
    marks = np.percentile(values, _QUANTILES)
    spread: dict[str, float | None] = {f"{name}_mean": float(np.mean(values))}
    return spread | {f"{name}_p{q}": float(v) for q, v in zip(_QUANTILES, marks)}


def weighted(values: Iterable[float], weights: Iterable[float]) -> float | None:
    """Return the mean of ``values``, each counting as its weight; None if there is none (equal if all weigh 0)."""
    v, w = np.array(list(values), dtype=float), np.array(list(weights), dtype=float)
    if not len(v):
        return None
    return float(np.average(v, weights=w if w.sum() > 0 else None))


def while_waiting(columns: dict[str, Columns]) -> list[int]:
    """Return the steps during which requests waited, or all if none ever did: when memory was what was short."""
    waiting = columns["steps"]["waiting"]
    return [i for i, n in enumerate(waiting) if n] or list(range(len(waiting)))


def memory_shares(columns: dict[str, Columns], rows: Sequence[int] | None = None) -> dict[str, float | None]:
    """Return the share of the pool of each kind, averaged over time; over the steps ``rows`` only, if given."""
    memory, durations = columns["memory"], columns["steps"]["duration"]
    rows = range(len(durations)) if rows is None else rows
    w = [durations[i] for i in rows]
    return {
        kind: weighted([memory[f"{kind}_share"][i] for i in rows], w) if w else None for kind in MEMORY_KINDS
    }


def waste(columns: dict[str, Columns], rows: Sequence[int] | None = None) -> float | None:
    """Return the share of the memory held by running sequences that stores no token, averaged over time."""
    shares = memory_shares(columns, rows)
    held = [shares[k] or 0.0 for k in ("stored", "reserved", "internal", "external")]
    return 1 - held[0] / sum(held) if sum(held) > 0 else None


def half_block_bound(columns: dict[str, Columns], block_size: int, rows: Sequence[int]) -> float | None:
    """Return PagedAttention's expected waste as a share of the memory held: (block_size - 1) / 2 tokens a sequence.

    A sequence's last block is, at any time, filled to a length that is uniform over 1 .. block_size (Kwon et al.,
    SOSP 2023, section 4.2).
    """
    steps, memory = columns["steps"], columns["memory"]
    w = [steps["duration"][i] for i in rows]
    held = weighted([sum(memory[k][i] for k in ("stored", "reserved", "internal")) for i in rows], w)
    running = weighted([steps["running"][i] for i in rows], w)
    return running * (block_size - 1) / 2 / held if held and running is not None else None
