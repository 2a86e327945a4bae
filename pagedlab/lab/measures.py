"""What is computed from a run's tables: speed, latency, and where the memory went.

Memory is averaged over time: each step counts as long as it took. Nothing here needs pandas.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagedlab.errors import ConfigError
from pagedlab.policies.prefetch import FATES

Array = NDArray[np.float64]
Columns = dict[str, Any]
"""A table: each column a list, or a numpy array [num_rows] if it holds nothing but numbers."""
LINKS = ("to_host", "to_device", "copied", "to_disk", "from_disk")
"""Ways that blocks are moved: device to host, host to device, copied inside the device (on write), host to disk, and
disk to host, whence they go on to the device.
"""

MEMORY_KINDS = ("stored", "reserved", "internal", "external", "cached", "free")
"""Where a token slot can be; together they are the pool."""
_QUANTILES = (50, 90, 95, 99)
TIMES = ("queue_time", "ttft", "tpot", "latency", "itl")
"""What a person waits for: see `summarise`."""
DONE = ("stop", "length")
"""How sequences end that finished: with their last token."""


def summarise(columns: dict[str, Columns], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the run in numbers. What cannot be said (no output, no step) is None.

    ``tokens_per_s`` counts output tokens from the start of the first step to the end of the last. ``queue_time``,
    ``ttft``, ``tpot`` and ``latency`` (with ``_mean``, ``_p50``, ``_p90``, ``_p95``, ``_p99``) are seconds from arrival
    to first admission, from arrival to the first token, per token after it, and from arrival to the end, of sequences
    that finished. ``itl`` is the time between one token and the next, all such pairs of these sequences pooled: a
    stall shows in its percentiles, where a sequence's ``tpot`` averages over it. ``hit_ratio`` is the share of
    prompt tokens found in the cache at first admission. ``waste`` is the share of the memory held by running
    sequences that stores nothing: (reserved + internal + external) / (stored + reserved + internal + external).
    ``mean_batch_size`` is in sequences. ``blocks_to_host``, ``blocks_to_device`` and ``blocks_copied`` are the blocks
    that were moved from the device to the host, back, and inside the device (copy-on-write); ``blocks_to_disk`` and
    ``blocks_from_disk`` what was written to the disk tier and read from it (what was read went on to the device, so it
    is in ``blocks_to_device`` too); ``bytes_to_host`` ... are the same in bytes, None where a block's weight is not
    known. ``tier_faults`` counts the copies to and from the disk that failed. ``prefetch_done`` are the blocks that
    were prefetched, each of which was in the end ``prefetch_useful``, ``_late``, ``_harmful`` or ``_useless``;
    ``prefetch_refused`` found no room. See `pagedlab.policies.prefetch`.
    """
    requests, steps, totals = columns["requests"], columns["steps"], facts["totals"]
    reasons = requests["finish_reason"]
    output = sum(requests["output_tokens"])
    duration = _duration(steps)
    summary: dict[str, Any] = {
        "requests": len(set(requests["request_id"])),
        "sequences": len(reasons),
        "finished": sum(r in DONE for r in reasons),
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
    for name in TIMES:
        summary.update(_spread(name, *times(columns, name)))
    shares = memory_shares(columns)
    summary |= {
        "hit_ratio": totals["hit_tokens"] / totals["prompt_tokens"] if totals["prompt_tokens"] else None,
        "waste": waste(columns),
        "preemptions": totals["preemptions"],
        "recomputed_tokens": totals["recomputed_tokens"],
        "swapped_out": totals["swapped_out"],
        **{f"blocks_{link}": totals[f"blocks_{link}"] for link in LINKS},
        **{f"bytes_{link}": moved_bytes(totals[f"blocks_{link}"], facts) for link in LINKS},
        "tier_faults": totals["tier_faults"],
        **{f"prefetch_{fate}": totals[f"prefetch_{fate}"] for fate in FATES},
        "mean_batch_size": weighted(steps["running"], steps["duration"]),
        **{f"{kind}_share": shares[kind] for kind in MEMORY_KINDS},
        "kernel": facts["used"]["kernel"],
        "layout": facts["used"]["layout"],
        "dtype": facts["used"]["dtype"],
    }
    return summary


def moved_bytes(blocks: Any, facts: dict[str, Any]) -> Any:
    """Return what ``blocks`` (a number or an array of them) weigh; None if that, or what a block weighs, is unknown."""
    weight = facts["used"].get("kv_bytes_per_block")
    return None if blocks is None or not weight else blocks * weight


def _duration(steps: Columns) -> float:
    start, duration = steps["start"], steps["duration"]
    return float(start[-1] + duration[-1] - start[0]) if len(start) else 0.0


def times(columns: dict[str, Columns], name: str) -> tuple[Array, NDArray[np.int64] | None]:
    """Return one of `TIMES` in seconds, of sequences that finished, and how often each occurred (None: once)."""
    if name == "itl":
        return inter_token(columns)
    requests = columns["requests"]
    known = (t for t, r in zip(requests[name], requests["finish_reason"]) if t is not None and r in DONE)
    return np.fromiter(known, dtype=float), None


def _spread(name: str, values: Array, counts: NDArray[np.int64] | None = None) -> dict[str, float | None]:
    """Return mean and percentiles of ``values``, the i-th of which occurs ``counts[i]`` times (None: once)."""
    if not len(values):
        return dict.fromkeys([f"{name}_mean", *(f"{name}_p{q}" for q in _QUANTILES)])
    marks = np.percentile(values, _QUANTILES) if counts is None else _percentiles(values, counts)
    spread: dict[str, float | None] = {f"{name}_mean": float(np.average(values, weights=counts))}
    return spread | {f"{name}_p{q}": float(v) for q, v in zip(_QUANTILES, marks)}


def _percentiles(values: Array, counts: NDArray[np.int64]) -> Array:
    """Return what ``np.percentile(np.repeat(values, counts), _QUANTILES)`` would, without writing them all down."""
    order = np.argsort(values)
    ranked, upto = values[order], np.cumsum(counts[order])
    at = np.array(_QUANTILES) / 100 * (upto[-1] - 1)
    low, high = (ranked[np.searchsorted(upto, f(at), side="right")] for f in (np.floor, np.ceil))
    between: Array = low + (high - low) * (at - np.floor(at))
    return between


def inter_token(columns: dict[str, Columns]) -> tuple[Array, NDArray[np.int64]]:
    """Return the times between one token of a sequence and its next, in seconds, and how often each occurred.

    Of sequences that finished, all pooled. In a run of steps that gave a sequence a token each, the time is a step's,
    and the same for all whom that step served: so there is one entry a step, however many tokens it made.
    """
    steps, spans, requests = columns["steps"], columns["spans"], columns["requests"]
    done = {s for s, r in zip(requests["seq"], requests["finish_reason"]) if r in DONE}
    kept = np.isin(spans["seq"], list(done))
    if not kept.any():
        return np.empty(0), np.empty(0, dtype=np.int64)
    end = np.asarray(steps["start"]) + np.asarray(steps["duration"])
    seq = np.asarray(spans["seq"])[kept]
    first = np.searchsorted(steps["step"], np.asarray(spans["first_step"])[kept])
    last = first + np.asarray(spans["steps"])[kept] - 1
    # A sequence counts at every step of a run but the first: one more from there on, one less after the last.
    change = np.zeros(len(end) + 1, dtype=np.int64)
    np.add.at(change, first + 1, 1)
    np.add.at(change, last + 1, -1)
    served = np.cumsum(change)[1:-1]
    # From the last token of a run to the first of the next: it was preempted, or others had the step.
    pause = np.flatnonzero(seq[1:] == seq[:-1])
    gaps = np.concatenate([np.diff(end)[served > 0], end[first[pause + 1]] - end[last[pause]]])
    return gaps, np.concatenate([served[served > 0], np.ones(len(pause), dtype=np.int64)])


def tokens_per_step(columns: dict[str, Columns]) -> NDArray[np.int64]:
    """Return the output tokens of each step [num_steps], those of sequences that never finished included."""
    steps, spans = np.asarray(columns["steps"]["step"]), columns["spans"]
    change = np.zeros(len(steps) + 1, dtype=np.int64)
    if len(spans["seq"]):
        first = np.searchsorted(steps, spans["first_step"])
        np.add.at(change, first, 1)
        np.add.at(change, first + np.asarray(spans["steps"]), -1)
    made: NDArray[np.int64] = np.cumsum(change)[:-1]
    return made


def hit_ratios(columns: dict[str, Columns]) -> tuple[Array, Array]:
    """Return when requests were admitted first, in seconds, and the prefix-hit ratio of all up to each of them."""
    requests = columns["requests"]
    names = ("arrival", "queue_time", "hit_tokens", "prompt_tokens", "sample")
    # Parallel samples share the prompt that the first of them was admitted with.
    rows = [(a + q, h, p) for a, q, h, p, s in zip(*(requests[n] for n in names)) if q is not None and not s]
    at, hit, prompt = np.array(sorted(rows, key=itemgetter(0)), dtype=float).reshape(-1, 3).T
    return at, np.cumsum(hit) / np.maximum(np.cumsum(prompt), 1)


class Goodput(NamedTuple):
    """How much of a run's work was done in time."""

    share: float | None
    """``met`` / ``finished``; None if no request finished."""
    per_s: float | None
    """``met`` per second, from the start of the first step to the end of the last; None if no time passed."""
    met: int
    """Requests that finished in time."""
    finished: int
    """Requests of which every sample finished: neither refused, failed, cancelled nor under way."""


def goodput(columns: dict[str, Columns], *, ttft: float | None = None, tpot: float | None = None) -> Goodput:
    """Return how many requests had their first token within ``ttft`` seconds, the others at ``tpot`` or faster.

    A bound that is left out is not asked for; a request of one token meets every ``tpot``. All samples of a request
    must be in time. `ConfigError` if both are left out, or one is no number above 0.
    """
    bounds = check_bounds(ttft, tpot)
    requests = columns["requests"]
    wanted = dict(zip(requests["request_id"], requests["samples"]))
    finished, met = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    measured = zip(*(requests[name] for name in bounds))
    rows = zip(requests["request_id"], requests["finish_reason"], measured)
    for name, reason, times in rows:
        if reason in DONE:
            finished[name] += 1
            met[name] += all(t is None or t <= most for t, most in zip(times, bounds.values()))
    ended = sum(finished[name] == n for name, n in wanted.items())
    good = sum(met[name] == n for name, n in wanted.items())
    duration = _duration(columns["steps"])
    return Goodput(good / ended if ended else None, good / duration if duration > 0 else None, good, ended)


def check_bounds(ttft: float | None, tpot: float | None) -> dict[str, float]:
    """Return the bounds that are given, in seconds; `ConfigError` if there is none or one makes no sense."""
    bounds = {name: most for name, most in (("ttft", ttft), ("tpot", tpot)) if most is not None}
    if not bounds:
        raise ConfigError("goodput needs ttft, tpot or both, in seconds")
    for name, most in bounds.items():
        number = isinstance(most, int | float | np.number) and not isinstance(most, bool)
        if not number or not 0 < most < math.inf:
            raise ConfigError(f"{name} must be a number of seconds above 0, not {most!r}")
    return bounds


def offered_rate(columns: dict[str, Columns]) -> float | None:
    """Return the requests that arrived per second between the first and the last; None if all came at once."""
    requests = columns["requests"]
    arrivals = dict(zip(requests["request_id"], requests["arrival"])).values()
    span = max(arrivals) - min(arrivals) if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0 else None


def weighted(values: ArrayLike, weights: ArrayLike) -> float | None:
    """Return the mean of ``values``, each counting as its weight; None if there is none (equal if all weigh 0)."""
    v, w = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    if not len(v):
        return None
    return float(np.average(v, weights=w if w.sum() > 0 else None))


def while_waiting(columns: dict[str, Columns]) -> NDArray[np.int64]:
    """Return the steps during which requests waited, or all if none ever did: when memory was what was short."""
    waiting = np.asarray(columns["steps"]["waiting"])
    rows: NDArray[np.int64] = np.flatnonzero(waiting)
    return rows if len(rows) else np.arange(len(waiting))


def memory_shares(columns: dict[str, Columns], rows: ArrayLike | None = None) -> dict[str, float | None]:
    """Return the share of the pool of each kind, averaged over time; over the steps ``rows`` only, if given."""
    memory, durations = columns["memory"], np.asarray(columns["steps"]["duration"], dtype=float)
    at = slice(None) if rows is None else np.asarray(rows, dtype=int)
    w = durations[at]
    return {kind: weighted(np.asarray(memory[f"{kind}_share"], dtype=float)[at], w) for kind in MEMORY_KINDS}


def waste(columns: dict[str, Columns], rows: ArrayLike | None = None) -> float | None:
    """Return the share of the memory held by running sequences that stores no token, averaged over time."""
    shares = memory_shares(columns, rows)
    held = [shares[k] or 0.0 for k in ("stored", "reserved", "internal", "external")]
    return 1 - held[0] / sum(held) if sum(held) > 0 else None


def half_block_bound(columns: dict[str, Columns], block_size: int, rows: ArrayLike) -> float | None:
    """Return PagedAttention's expected waste as a share of the memory held: (block_size - 1) / 2 tokens a sequence.

    A sequence's last block is, at any time, filled to a length that is uniform over 1 .. block_size (Kwon et al.,
    SOSP 2023, section 4.2).
    """
    steps, memory = columns["steps"], columns["memory"]
    at = np.asarray(rows, dtype=int)
    w = np.asarray(steps["duration"], dtype=float)[at]
    held = weighted(
        sum(np.asarray(memory[k], dtype=float)[at] for k in ("stored", "reserved", "internal")), w
    )
    running = weighted(np.asarray(steps["running"], dtype=float)[at], w)
    return running * (block_size - 1) / 2 / held if held and running is not None else None
